"""The table: ATen operator -> rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch._ops import OpOverload, OpOverloadPacket

from edgesmith.compiler.axes.op import Op, Result

Rule = Callable[[Op], Result]
"""Relates the terms of an operator's arguments and returns those of its result."""

TABLE: dict[Any, Rule] = {}
"""Filled by the modules of this package as they are imported."""


def rule(*operators: OpOverload | OpOverloadPacket) -> Callable[[Rule], Rule]:
    """Enter the decorated function for these operators; a packet stands for all its overloads."""

    def enter(function: Rule) -> Rule:
        for operator in operators:
            overloads = [operator] if isinstance(operator, OpOverload) else [getattr(operator, name) for name in operator.overloads()]
            for overload in overloads:
                assert overload not in TABLE, overload
                TABLE[overload] = function
        return function

    return enter
