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


def overloads_of(operator: OpOverload | OpOverloadPacket) -> list[OpOverload]:
    """The overload itself, or all those of a packet."""
    return [operator] if isinstance(operator, OpOverload) else [getattr(operator, name) for name in operator.overloads()]


def rule(*operators: OpOverload | OpOverloadPacket) -> Callable[[Rule], Rule]:
    """Enter the decorated function for these operators; a packet stands for all its overloads."""

    def enter(function: Rule) -> Rule:
        for operator in operators:
            for overload in overloads_of(operator):
                assert overload not in TABLE, overload
                TABLE[overload] = function
        return function

    return enter
