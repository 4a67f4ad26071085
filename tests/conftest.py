"""Before torch is imported: its threads sleep while they wait, so that the suite does not crawl on a shared machine."""

from __future__ import annotations

import os

from edgesmith.compiler.cli import WAITING

os.environ.setdefault(*WAITING)
