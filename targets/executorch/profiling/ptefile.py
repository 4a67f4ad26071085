"""A ``.pte`` file: a flatbuffer with the program, and segments with constants and delegates behind it."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from .flatfile import Reader, Row, Schema, schema, written

_HEADER = struct.Struct("<4sIQQQ")
"""Magic, header's size, size of program and header, where the segments start, their size; as in ExecuTorch's ``extended_header.h``."""
_HEADER_AT, _MAGIC = 8, b"eh00"
_SEGMENT_ALIGNMENT = 128


@dataclass(frozen=True)
class PteFile:
    """``program`` is the root table of ``program.fbs``; ``segments`` are the bytes that its segments' offsets count from."""

    program: Row
    segments: bytes
    schema: Schema

    @classmethod
    def read(cls, content: bytes, package: Path) -> PteFile:
        """Read ``content`` with the schema in ``package``, the folder of the installed executorch.

        Raises:
            ValueError: it is no ``.pte`` file, broken, or from before files had segments.
        """
        if len(content) < _HEADER_AT + _HEADER.size:
            raise ValueError("this is no .pte file: it is too short")
        magic, _, _, start, size = _HEADER.unpack_from(content, _HEADER_AT)
        if magic != _MAGIC:
            raise ValueError("this is no .pte file, or one from before such files had segments")
        known = schema(package / "schema" / "program.fbs")
        return cls(Reader(memoryview(content), known).root(), content[start : start + size], known)

    def written(self) -> bytes:
        """The file."""
        flat = written(self.program, self.schema)
        (root,) = struct.unpack_from("<I", flat)
        size = len(flat) + _HEADER.size
        start = -(-size // _SEGMENT_ALIGNMENT) * _SEGMENT_ALIGNMENT
        header = _HEADER.pack(_MAGIC, _HEADER.size, size, start, len(self.segments))
        return b"".join((struct.pack("<I", root + _HEADER.size), flat[4:_HEADER_AT], header, flat[_HEADER_AT:], bytes(start - size), self.segments))

    def method(self, name: str) -> Row:
        """The execution plan called ``name``.

        Raises:
            ValueError: there is none.
        """
        found = next((plan for plan in self.program["execution_plan"] if plan["name"] == name), None)
        if found is None:
            raise ValueError(f"the file has no method {name}")
        return dict(found)

    def delegate(self, reference: Row) -> bytes:
        """What a ``BackendDelegateDataReference`` refers to."""
        if reference["location"] == 0:
            return bytes(self.program["backend_delegate_data"][reference["index"]]["data"])
        segment = self.program["segments"][reference["index"]]
        return self.segments[segment["offset"] : segment["offset"] + segment["size"]]

    def with_text(self, name: str, text: str) -> PteFile:
        """The same file with one more method, which takes nothing and returns ``text``."""
        plan = method_row(name, [{"val_type": "String", "val": {"string_val": text}}], [], [0], [])
        return PteFile({**self.program, "execution_plan": [*self.program["execution_plan"], plan]}, self.segments, self.schema)


def method_row(name: str, values: list[Row], inputs: list[int], outputs: list[int], instructions: list[tuple[str, Row]]) -> Row:
    """An execution plan without operators, delegates or memory. ``instructions``: kind and arguments of each."""
    chain = {"inputs": [], "outputs": [], "instructions": [{"instr_args_type": kind, "instr_args": arguments} for kind, arguments in instructions]}
    return {
        "name": name,
        "container_meta_type": {"encoded_inp_str": "", "encoded_out_str": ""},
        "values": values,
        "inputs": inputs,
        "outputs": outputs,
        "chains": [chain],
        "operators": [],
        "delegates": [],
        "non_const_buffer_sizes": [0],
    }
