"""What each operator says about axes: one file for each family, one small function for each kind of operator."""

from __future__ import annotations

from typing import Any

import torch

from edgesmith.compiler.axes.rules import constant, conv, index, join, linear, norm, recurrent, reduce, shape
from edgesmith.compiler.axes.rules.elementwise import elementwise
from edgesmith.compiler.axes.rules.table import TABLE, Rule, rule

__all__ = ["TABLE", "Rule", "constant", "conv", "find", "index", "join", "linear", "norm", "recurrent", "reduce", "rule", "shape"]


def find(target: Any) -> Rule | None:
    """The rule of an operator: that of the table, or the elementwise one if torch tags it as pointwise."""
    known = TABLE.get(target)
    if known is None and torch.Tag.pointwise in getattr(target, "tags", ()):
        return elementwise
    return known
