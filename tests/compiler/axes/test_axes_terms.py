"""The arithmetic of dimensions: products, concatenations, cuts, and what equalities imply."""

from __future__ import annotations

from math import prod

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from edgesmith.compiler.axes.axes import Axis, Reason, Term, concatenation, cut, factored, fresh, leaves, mark, pinned, resolve, show, size, unify
from edgesmith.compiler.axes.groups import labels
from edgesmith.compiler.axes.rules.shape import regroup
from edgesmith.compiler.axes.surgery import kept_mask, kept_size

WHY = Reason("here", "a test")


def test_a_leaf_becomes_the_product_it_is_equal_to() -> None:
    rows = fresh(48)
    heads, dim = factored(rows, [4, 12], WHY)
    assert show(resolve(rows)) == "4x12"
    assert resolve(rows) == heads + dim


def test_a_fused_dimension_cut_in_three_is_three_times_the_same() -> None:
    whole = fresh(3 * 8)
    pieces = cut(whole, [8, 16])
    assert pieces is not None
    for piece in pieces[1:]:
        unify(pieces[0], piece, WHY)
    heads, dim = factored(pieces[0], [4, 2], WHY)
    assert show(resolve(whole)) == "(4x2 + 4x2 + 4x2)"
    assert list(leaves(whole)) == [*heads, *dim] * 3


def test_a_concatenation_viewed_as_a_product_is_cut_along_it() -> None:
    whole = concatenation([fresh(8), fresh(16)])
    outer, _ = factored(whole, [6, 4], WHY)
    assert show(outer) == "(2 + 4)"
    assert show(resolve(whole)) == "(2 + 4)x4"


def test_halves_that_change_places_are_the_same_half() -> None:
    first, second = fresh(3), fresh(3)
    unify(concatenation([first, second]), concatenation([second, first]), WHY)
    assert resolve(first) == resolve(second)


def test_only_the_misaligned_block_is_pinned() -> None:
    channels = fresh(5)
    left = fresh(8) + fresh(7) + channels
    right = fresh(28) + fresh(2) + fresh(5)
    unify(left, right, WHY)
    assert pinned(left[:2])
    assert pinned(right[:2])
    assert not pinned(channels)
    assert resolve(channels) == resolve(right[2:])


def test_a_cut_through_a_block_is_refused() -> None:
    term = fresh(4) + fresh(6)
    assert cut(term, [9]) is None
    assert cut(term, [12]) is not None


def test_pins_reach_every_part_and_the_first_reason_stays() -> None:
    whole = concatenation([fresh(2), fresh(3)])
    mark(whole, pin=WHY)
    mark(whole, pin=Reason("there", "later"))
    assert {leaf.pin for leaf in leaves(whole)} == {WHY}


@st.composite
def factorisations(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    factors = draw(st.lists(st.sampled_from([1, 2, 3, 4, 5, 6]), min_size=1, max_size=5))
    other = draw(st.permutations(factors))
    cuts = draw(st.lists(st.booleans(), min_size=len(factors) - 1, max_size=len(factors) - 1))
    grouped = [other[0]]
    for factor, joined in zip(other[1:], cuts, strict=True):
        if joined:
            grouped[-1] *= factor
        else:
            grouped.append(factor)
    return factors, grouped


@given(factorisations())
@settings(max_examples=300, deadline=None)
def test_regrouping_keeps_the_order_of_elements(pair: tuple[list[int], list[int]]) -> None:
    """Removing units before a reshape removes the same elements as removing them after it."""
    sizes, wanted = pair
    shape = tuple(fresh(n) for n in sizes)
    result = regroup(shape, wanted, WHY)
    assert [size(term) for term in result] == wanted
    rng = np.random.default_rng(prod(sizes))
    keep = {axis: _some(axis, rng) for term in (*shape, *result) for axis in leaves(term) if axis.pin is None}
    numbers = np.arange(prod(sizes)).reshape(sizes)
    for dim, term in enumerate(shape):
        numbers = numbers.compress(kept_mask(term, keep), axis=dim)
    after = np.arange(prod(sizes)).reshape(wanted)
    for dim, term in enumerate(result):
        after = after.compress(kept_mask(term, keep), axis=dim)
    assert after.shape == tuple(kept_size(term, keep) for term in result)
    assert numbers.reshape(-1).tolist() == after.reshape(-1).tolist()


def _some(axis: Axis, rng: np.random.Generator) -> np.ndarray:
    kept = rng.random(axis.size) < 0.6
    kept[int(rng.integers(axis.size))] = True
    return kept


@st.composite
def terms(draw: st.DrawFn, depth: int = 2) -> Term:
    parts = []
    for _ in range(draw(st.integers(1, 2))):
        if depth and draw(st.booleans()):
            parts.append(concatenation(draw(st.lists(terms(depth - 1), min_size=1, max_size=3))))
        else:
            parts.append(fresh(draw(st.integers(1, 4))))
    return sum(parts, ())


@given(terms(), st.randoms())
@settings(max_examples=200, deadline=None)
def test_labels_tell_the_units_that_a_mask_removes(term: Term, random: object) -> None:
    for axis in dict.fromkeys(leaves(term)):
        found = labels(term, axis)
        for unit in range(axis.size):
            kept = np.ones(axis.size, dtype=bool)
            kept[unit] = False
            assert ((found == unit).any(axis=0) == ~kept_mask(term, {axis: kept})).all()


@given(terms(), terms())
@settings(max_examples=200, deadline=None)
def test_equal_terms_have_equal_leaves_or_are_pinned(left: Term, right: Term) -> None:
    if size(left) != size(right):
        right = right + fresh(size(left))
        left = left + fresh(size(right) // size(left))
    unify(left, right, WHY)
    keep = {axis: np.arange(axis.size) % 2 == 0 for axis in {*leaves(left), *leaves(right)} if axis.pin is None and axis.size > 1}
    assert kept_mask(left, keep).tolist() == kept_mask(right, keep).tolist()
