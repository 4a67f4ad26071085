"""How much memory tensors need that share it when they do not live at the same time."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """One operator, by the numbers of the tensors that it reads and writes.

    ``in_place``: its output may lie where an input lay that is as large and that nobody reads any more. ``view``: its output always is
    its first input's memory. ``scratch_bytes`` are needed while it runs.
    """

    reads: tuple[int, ...]
    writes: tuple[int, ...]
    in_place: bool = False
    view: bool = False
    scratch_bytes: int = 0


@dataclass(frozen=True)
class Block:
    """Memory that is needed from step ``first`` to step ``last``, both included."""

    size_bytes: int
    first: int
    last: int


def blocks(steps: Sequence[Step], sizes_bytes: Mapping[int, int], kept: Collection[int] = ()) -> tuple[Block, ...]:
    """What ``steps``, run in order, need: a block per tensor of ``sizes_bytes`` (others lie elsewhere), and per scratch.

    A tensor lives from the step that writes it (the first step, if none does) to the last that reads it, and to the end if it is ``kept``.
    """
    scratch = (Block(step.scratch_bytes, number, number) for number, step in enumerate(steps) if step.scratch_bytes)
    return (*(Block(sizes_bytes[tensor], *span) for tensor, span in spans(steps, sizes_bytes, kept).items()), *scratch)


def spans(steps: Sequence[Step], sizes_bytes: Mapping[int, int], kept: Collection[int] = ()) -> dict[int, tuple[int, int]]:
    """First and last step of each tensor that has memory of its own, those that lie in it included."""
    owner = _owners(steps, sizes_bytes, kept)
    found: dict[int, tuple[int, int]] = {}
    for number, step in enumerate(steps):
        for tensor in step.reads:
            if tensor in owner:
                first, last = found.get(owner[tensor], (0, 0))
                found[owner[tensor]] = first, max(last, number)
        for tensor in step.writes:
            if tensor in owner:
                first, last = found.get(owner[tensor], (number, number))
                found[owner[tensor]] = first, max(last, number)
    for tensor in kept:
        if tensor in owner:
            found[owner[tensor]] = found.get(owner[tensor], (0, 0))[0], len(steps) - 1
    return found


def _owners(steps: Sequence[Step], sizes_bytes: Mapping[int, int], kept: Collection[int]) -> dict[int, int]:
    """Each tensor -> the one whose memory it lies in."""
    last_read = {tensor: number for number, step in enumerate(steps) for tensor in step.reads}
    last_read.update(dict.fromkeys(kept, len(steps)))
    owner = {tensor: tensor for tensor in sizes_bytes}
    until = dict(last_read)
    for number, step in enumerate(steps):
        if not (step.in_place or step.view) or not step.writes or step.writes[0] not in owner:
            continue
        output = step.writes[0]
        for tensor in step.reads[:1] if step.view else step.reads:
            home = owner.get(tensor)
            if home is not None and (step.view or (until.get(home, number) <= number and sizes_bytes[home] == sizes_bytes[output])):
                owner[output] = home
                until[home] = max(until.get(home, 0), last_read.get(output, number))
                break
    return owner


def lower_bound_bytes(wanted: Iterable[Block]) -> int:
    """The most that is alive at one step: no arena is smaller."""
    change: dict[int, int] = {}
    for block in wanted:
        change[block.first] = change.get(block.first, 0) + block.size_bytes
        change[block.last + 1] = change.get(block.last + 1, 0) - block.size_bytes
    most = alive = 0
    for step in sorted(change):
        alive += change[step]
        most = max(most, alive)
    return most


def greedy_by_size(wanted: Iterable[Block], alignment: int = 64) -> int:
    """Size in bytes of an arena laid out as TensorFlow Lite and XNNPACK do.

    The largest block first, each into the tightest gap between those that live at the same time (Pisarchyk and Lee 2020,
    "Efficient Memory Management for Deep Neural Net Inference", section 5.2).
    """
    placed: list[tuple[int, int, Block]] = []
    for block in sorted(wanted, key=lambda b: -b.size_bytes):
        size = -(-block.size_bytes // alignment) * alignment
        offset = _tightest(sorted((start, end) for start, end, other in placed if other.first <= block.last and block.first <= other.last), size)
        placed.append((offset, offset + size, block))
    return max((end for _, end, _ in placed), default=0)


def _tightest(taken: Iterable[tuple[int, int]], size: int) -> int:
    """Where the smallest gap of at least ``size`` starts; the end if there is none. ``taken`` is sorted."""
    best, least, reached = None, 0, 0
    for start, end in taken:
        gap = start - reached
        if gap >= size and (best is None or gap < least):
            best, least = reached, gap
        reached = max(reached, end)
    return reached if best is None else best
