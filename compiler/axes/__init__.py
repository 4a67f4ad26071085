"""Axes: which units of a captured graph belong together, their removal, and the proof of it."""

from __future__ import annotations

from edgesmith.compiler.axes.analysis import Axes
from edgesmith.compiler.axes.groups import Member, Pinned, PruneGroup
from edgesmith.compiler.axes.proof import prove
from edgesmith.compiler.axes.surgery import remove

__all__ = ["Axes", "Member", "Pinned", "PruneGroup", "prove", "remove"]
