"""Arenas: what may share memory does, what lives at the same time does not, and by how much the layout misses the lower bound."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgesmith.kernels.arena import Block, Step, blocks, greedy_by_size, lower_bound_bytes, spans
from edgesmith.kernels.growing_arena import Event, GrowingArena, online_best_fit, replay

MB = 1 << 20
BLOCKS = st.lists(st.tuples(st.integers(1, 5000), st.integers(0, 20), st.integers(0, 5)).map(lambda t: Block(t[0], t[1], t[1] + t[2])), max_size=25)


def test_tensors_of_a_chain_take_turns() -> None:
    chain = [Step((0,), (1,)), Step((1,), (2,)), Step((2,), (3,))]
    sizes = {0: 640, 1: 6400, 2: 640, 3: 6400}
    assert spans(chain, sizes) == {0: (0, 0), 1: (0, 1), 2: (1, 2), 3: (2, 2)}
    assert greedy_by_size(blocks(chain, sizes)) == 6400 + 640, "1 and 3 never live together"
    assert greedy_by_size(blocks(chain, sizes, kept={0})) == 6400 + 640 + 640


def test_an_output_lies_over_an_input_of_its_size_that_nobody_reads_any_more() -> None:
    add = [Step((), (0,)), Step((0,), (1,)), Step((0, 1), (2,), in_place=True), Step((2,), (3,))]
    sizes = dict.fromkeys(range(4), 64)
    assert spans(add, sizes) == {0: (0, 3), 1: (1, 2), 3: (3, 3)}
    read_later = [*add[:3], Step((0, 2), (3,))]
    assert spans(read_later, sizes) == {0: (0, 3), 1: (1, 3), 3: (3, 3)}, "0 is read once more, so that 2 lies in 1"
    assert 2 in spans(read_later, {**sizes, 1: 128}), "and nowhere where neither fits"
    assert 2 in spans([*add[:2], Step((0, 1), (2,)), add[3]], sizes), "nor without being allowed to"


def test_a_view_keeps_what_it_shows() -> None:
    steps = [Step((), (0,)), Step((0,), (1,), view=True), Step((), (2,)), Step((1, 2), (3,))]
    assert spans(steps, {0: 64, 1: 64, 2: 64, 3: 64}) == {0: (0, 3), 2: (2, 3), 3: (3, 3)}


def test_scratch_counts_while_its_step_runs() -> None:
    steps = [Step((), (0,), scratch_bytes=640), Step((0,), (1,), scratch_bytes=1280)]
    assert greedy_by_size(blocks(steps, {0: 64, 1: 64})) == 1280 + 64 + 64


@given(BLOCKS)
def test_a_layout_is_no_smaller_than_what_lives_together_and_not_much_larger(wanted: list[Block]) -> None:
    least, found = lower_bound_bytes(wanted), greedy_by_size(wanted, alignment=1)
    assert least <= found <= sum(block.size_bytes for block in wanted)
    assert found <= 2 * least


@given(BLOCKS)
def test_placing_as_they_come_is_no_smaller_than_what_lives_together(wanted: list[Block]) -> None:
    events = []
    for step in range(27):
        events += [Event(n, b.size_bytes) for n, b in enumerate(wanted) if b.first == step]
        events += [Event(n, 0) for n, b in enumerate(wanted) if b.last == step]
    assert lower_bound_bytes(wanted) <= online_best_fit(events, alignment=1) <= sum(b.size_bytes for b in wanted)


def test_regions_double_and_only_what_is_written_is_counted() -> None:
    arena = GrowingArena()
    replay(arena, [Event(0, 100_000), Event(1, 1_000_000), Event(2, 3_000_000)])
    assert arena.reserved_bytes == (1 + 2 + 4) * MB
    assert arena.touched_bytes == pytest.approx(4_100_000, abs=3 * 4096)
    replay(arena, [Event(0, 900_000), Event(1, 1_900_000), Event(2, 3_900_000)])
    assert arena.reserved_bytes == 7 * MB, "what was given back is joined and taken again"
    assert arena.touched_bytes == pytest.approx(6_700_000, abs=3 * 4096)


@given(st.lists(st.integers(1, 3 * MB), max_size=12), st.integers(0, 2**32 - 1))
def test_an_arena_holds_all_that_is_alive(sizes: list[int], seed: int) -> None:
    arena = GrowingArena()
    rng = np.random.default_rng(seed)
    alive = most = 0
    held = []
    for size in sizes:
        held.append((arena.take(size), size))
        alive += size
        most = max(most, alive)
        if rng.random() < 0.5:
            chunk, freed = held.pop(int(rng.integers(len(held))))
            arena.give_back(chunk)
            alive -= freed
    assert arena.reserved_bytes >= most
    assert arena.touched_bytes + 4096 * len(arena.touched) >= max([0, *sizes])
    for chunk, _ in held:
        arena.give_back(chunk)
    assert len(arena.chunks) == len(arena.touched), "everything joined again: a chunk a region"
