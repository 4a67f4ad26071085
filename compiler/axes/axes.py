"""Axes, and the terms made of them: the arithmetic of dimensions.

A dimension is a *term*: an ordered product of axes, outermost first (a fused qkv weight's rows are ``3 x heads x head_dim``).
An axis is a leaf, or a concatenation of terms (``parts``), or has been found to be another term (``link``). Every operation
here states an equality between terms; what follows from it holds wherever the axes occur. A size of 1 is the empty product.

Sizes fall strictly along ``link`` products and ``parts``, so that no structure can contain itself.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import prod


class Trait(enum.IntFlag):
    """What the operators that an axis meets say about it."""

    NONE = 0
    STATISTIC = 1
    """A mean, a norm or a softmax runs over it."""
    HEADS = 2
    """It counts independent products of two activations."""
    HEAD_DIM = 4
    """It is contracted or carried by a product of two activations."""
    ADDED = 8
    """Different producers are added along it."""
    CONVOLVED = 16
    """A convolution produces it."""


@dataclass(frozen=True)
class Reason:
    """Why an axis must keep its size: the source path of the operator that says so, and why."""

    where: str
    why: str


class Axis:
    """One axis. A leaf has neither ``link`` nor ``parts``; ``pin`` and ``traits`` mean something on leaves only."""

    __slots__ = ("link", "parts", "pin", "size", "traits")

    def __init__(self, size: int, pin: Reason | None = None, traits: int = 0) -> None:
        self.size = size
        self.pin = pin
        self.traits = traits
        self.link: Term | None = None
        self.parts: tuple[Term, ...] | None = None

    def __repr__(self) -> str:
        if self.link is not None:
            return show(self.link)
        return f"({' + '.join(show(part) for part in self.parts)})" if self.parts is not None else f"{self.size}{'!' if self.pin else ''}"


Term = tuple[Axis, ...]
"""A dimension: the ordered product of these axes."""


def show(term: Term) -> str:
    """``3x12x64`` for a product, ``(32 + 32)`` for a concatenation; ``!`` marks pinned axes."""
    return "x".join(repr(axis) for axis in term) or "1"


def fresh(size: int, pin: Reason | None = None) -> Term:
    """A new dimension of ``size`` units that nothing is known about yet."""
    return (Axis(size, pin),) if size != 1 else ()


def size(term: Term) -> int:
    """Number of units along ``term``."""
    return prod([axis.size for axis in term])


def resolve(term: Term) -> Term:
    """``term`` in its present form: leaves and concatenations."""
    for axis in term:
        if axis.link is not None:
            break
    else:
        return term
    found: list[Axis] = []
    for axis in term:
        if axis.link is None:
            found.append(axis)
        else:
            axis.link = resolve(axis.link)
            found.extend(axis.link)
    return tuple(found)


def leaves(term: Term) -> Iterator[Axis]:
    """The leaves below ``term``, in order, as often as they occur."""
    for axis in resolve(term):
        if axis.parts is None:
            yield axis
        else:
            for part in axis.parts:
                yield from leaves(part)


def concatenation(parts: Sequence[Term]) -> Term:
    """The dimension that holds ``parts`` one after the other."""
    filled = tuple(part for part in parts if size(part))
    if len(filled) == 1:
        return filled[0]
    axis = Axis(sum(size(part) for part in filled))
    axis.parts = filled
    return (axis,)


def mark(term: Term, *, pin: Reason | None = None, traits: int = 0) -> None:
    """Pin every leaf of ``term`` (the first reason stays) and add ``traits`` to it."""
    for axis in resolve(term):
        if axis.parts is not None:
            for part in axis.parts:
                mark(part, pin=pin, traits=traits)
        else:
            axis.pin = axis.pin or pin
            axis.traits |= traits


def pinned(term: Term) -> bool:
    """Whether no leaf of ``term`` may change its size."""
    return all(leaf.pin is not None for leaf in leaves(term))


def cut(term: Term, offsets: Sequence[int]) -> list[Term] | None:
    """``term`` cut at ``offsets`` (increasing, inside it) into consecutive pieces; None where a cut would go through a block."""
    term = resolve(term)
    if not offsets:
        return [term]
    inner = term[1:]
    step = size(inner)
    if any(offset % step for offset in offsets):
        return None
    pieces = _cut_axis(term[0], [offset // step for offset in offsets])
    return None if pieces is None else [resolve(piece) + inner for piece in pieces]


def _cut_axis(axis: Axis, offsets: Sequence[int]) -> list[Term] | None:
    if axis.parts is None:
        bounds = [0, *offsets, axis.size]
        axis.parts = tuple((Axis(stop - start, axis.pin, axis.traits),) if stop - start > 1 else () for start, stop in pairwise(bounds))
        return list(axis.parts)
    parts: list[Term] = []
    pieces: list[list[Term]] = [[]]
    wanted = set(offsets)
    start = 0
    for part in axis.parts:
        stop = start + size(part)
        smaller = cut(part, [offset - start for offset in offsets if start < offset < stop])
        if smaller is None:
            return None
        for piece in smaller:
            if start in wanted:
                pieces.append([])
            pieces[-1].append(piece)
            start += size(piece)
        parts.extend(smaller)
    axis.parts = tuple(parts)
    return [concatenation(piece) for piece in pieces]


def unify(left: Term, right: Term, reason: Reason) -> None:
    """State that ``left`` and ``right`` (of equal sizes) are the same dimension.

    Where the factors do not align, the smallest misaligned block of both is pinned for ``reason``.
    """
    if left is right:
        return
    left, right = resolve(left), resolve(right)
    while left and right:
        a, b = left[0], right[0]
        if a is b or (a.size == b.size and _merge(a, b, reason)):
            left, right = resolve(left[1:]), resolve(right[1:])
            continue
        if a.size != b.size:
            small, large = (a, b) if a.size < b.size else (b, a)
            if large.size % small.size == 0:
                rest = Axis(large.size // small.size)
                if _factor(large, (small, rest), reason):
                    left, right = resolve(left), resolve(right)
                    continue
        left, right = _freeze_block(left, right, reason)


def factored(term: Term, sizes: Sequence[int], reason: Reason) -> list[Term]:
    """``term`` as a product of dimensions of ``sizes``: one term for each."""
    factors = [fresh(n) for n in sizes]
    unify(term, sum(factors, ()), reason)
    return [resolve(factor) for factor in factors]


def _merge(a: Axis, b: Axis, reason: Reason) -> bool:
    """Make two axes of equal size one; False where two concatenations cannot be cut alike."""
    if a.parts is None:
        return _become(a, (b,))
    if b.parts is None:
        return _become(b, (a,))
    offsets = sorted({*_bounds(a), *_bounds(b)})
    left, right = _cut_axis(a, offsets), _cut_axis(b, offsets)
    if left is None or right is None:
        return False
    for x, y in zip(left, right, strict=True):
        unify(x, y, reason)
    a.link = (b,)
    return True


def _factor(axis: Axis, product: Term, reason: Reason) -> bool:
    """State that ``axis`` is ``product``; False where a concatenation's boundaries go through it."""
    if axis.parts is None:
        return _become(axis, product)
    pieces = cut(product, _bounds(axis))
    if pieces is None:
        return False
    for part, piece in zip(axis.parts, pieces, strict=True):
        unify(part, piece, reason)
    axis.link = product
    return True


def _become(leaf: Axis, term: Term) -> bool:
    leaf.link = term
    mark(term, pin=leaf.pin, traits=leaf.traits)
    return True


def _bounds(axis: Axis) -> list[int]:
    assert axis.parts is not None
    return list(accumulate(size(part) for part in axis.parts))[:-1]


def _freeze_block(left: Term, right: Term, reason: Reason) -> tuple[Term, Term]:
    """Pin the shortest prefixes of equal size, and return what follows them."""
    i = j = 1
    while (a := size(left[:i])) != (b := size(right[:j])):
        if a < b:
            i += 1
        else:
            j += 1
    for block in (left[:i], right[:j]):
        mark(block, pin=reason)
    return resolve(left[i:]), resolve(right[j:])
