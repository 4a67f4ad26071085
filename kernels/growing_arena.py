"""An arena that grows by doubling, and hands out the best fit: which of its pages are ever written.

After the allocator of TensorFlow and ONNX Runtime, "best-fit with coalescing" (onnxruntime/core/framework/bfc_arena.cc, itself a simple form of
Doug Lea's malloc).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

GRAIN_BYTES = 256
FIRST_REGION_BYTES = 1 << 20
PAGE_BYTES = 4096


@dataclass
class _Chunk:
    region: int
    offset: int
    size: int
    free: bool = True


@dataclass
class GrowingArena:
    """Chunks in order of place; ``touched`` holds numbers of pages, by region."""

    chunks: list[_Chunk] = field(default_factory=list)
    touched: list[set[int]] = field(default_factory=list)
    next_region_bytes: int = FIRST_REGION_BYTES

    @property
    def touched_bytes(self) -> int:
        """Pages that were written at some time: they stay the process's."""
        return PAGE_BYTES * sum(map(len, self.touched))

    @property
    def reserved_bytes(self) -> int:
        """All regions, written or not."""
        return sum(chunk.size for chunk in self.chunks)

    def take(self, size_bytes: int) -> _Chunk:
        """A chunk of at least ``size_bytes``, of which that many are written."""
        wanted = max(1, -(-size_bytes // GRAIN_BYTES)) * GRAIN_BYTES
        fitting = [chunk for chunk in self.chunks if chunk.free and chunk.size >= wanted]
        chunk = min(fitting, key=lambda c: (c.size, c.region, c.offset)) if fitting else self._grown(wanted)
        if chunk.size >= 2 * wanted:
            self.chunks.insert(self.chunks.index(chunk) + 1, _Chunk(chunk.region, chunk.offset + wanted, chunk.size - wanted))
            chunk.size = wanted
        chunk.free = False
        self.touched[chunk.region].update(range(chunk.offset // PAGE_BYTES, (chunk.offset + size_bytes - 1) // PAGE_BYTES + 1))
        return chunk

    def _grown(self, wanted: int) -> _Chunk:
        doubled = False
        while self.next_region_bytes < wanted:
            self.next_region_bytes *= 2
            doubled = True
        chunk = _Chunk(len(self.touched), 0, self.next_region_bytes)
        if not doubled:
            self.next_region_bytes *= 2
        self.chunks.append(chunk)
        self.touched.append(set())
        return chunk

    def give_back(self, chunk: _Chunk) -> None:
        """Free ``chunk``, and join it with free neighbours."""
        chunk.free = True
        at = self.chunks.index(chunk)
        for left in (at, at - 1):
            if 0 <= left < len(self.chunks) - 1:
                first, second = self.chunks[left], self.chunks[left + 1]
                if first.free and second.free and first.region == second.region:
                    first.size += second.size
                    del self.chunks[left + 1]


@dataclass(frozen=True)
class Event:
    """Tensor ``tensor`` is allocated with ``size_bytes``, or given back (``size_bytes`` is 0)."""

    tensor: int
    size_bytes: int


def replay(arena: GrowingArena, events: Iterable[Event]) -> None:
    """Allocate and give back, in order; what is still held at the end is given back then."""
    held: dict[int, _Chunk] = {}
    for event in events:
        if event.size_bytes:
            held[event.tensor] = arena.take(event.size_bytes)
        elif event.tensor in held:
            arena.give_back(held.pop(event.tensor))
    for chunk in held.values():
        arena.give_back(chunk)


def online_best_fit(events: Iterable[Event], alignment: int = 64) -> int:
    """Size in bytes of one block for all tensors, each placed as it comes into the tightest gap between those that are alive."""
    alive: dict[int, tuple[int, int]] = {}
    most = 0
    for event in events:
        if not event.size_bytes:
            alive.pop(event.tensor, None)
            continue
        size = -(-event.size_bytes // alignment) * alignment
        best, least, reached = None, 0, 0
        for start, end in sorted(alive.values()):
            if start - reached >= size and (best is None or start - reached < least):
                best, least = reached, start - reached
            reached = max(reached, end)
        place = reached if best is None else best
        alive[event.tensor] = place, place + size
        most = max(most, place + size)
    return most
