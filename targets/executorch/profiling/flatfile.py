"""Flatbuffers as plain dictionaries, read and written by the schemas that the runtime's own package ships.

A table is a dictionary of the fields that it has; a union's member is under the field's name, the member's name under ``NAME_type``, an
enumeration's value is its number, a vector of bytes ``bytes``. Known is what ExecuTorch's ``program.fbs`` and XNNPACK's ``runtime_schema.fbs``
use: tables, unions, enumerations, strings, vectors of scalars, strings and tables. Format: https://flatbuffers.dev/internals.
"""

from __future__ import annotations

import functools
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Row = dict[str, Any]

_SCALARS = {
    "bool": "?",
    "byte": "b",
    "ubyte": "B",
    "short": "h",
    "ushort": "H",
    "int": "i",
    "uint": "I",
    "long": "q",
    "ulong": "Q",
    "float": "f",
    "double": "d",
    "int32": "i",
    "int64": "q",
    "uint32": "I",
    "uint64": "Q",
}
"""Names in schemas -> codes of the module struct."""
_UNION_TAG = "B"
_BYTES_ALIGNMENT = 16
"""Vectors of bytes hold tensors and delegates, which both schemas align to this."""


@dataclass(frozen=True)
class _Field:
    """``code``: of a scalar (or a vector's scalars) as struct writes it, else ""; ``type``: "string", a table's or a union's name."""

    name: str
    code: str
    type: str
    vector: bool
    default: int | float


@dataclass
class Schema:
    """What a .fbs file declares. ``unions``: members' names and their tables; ``enums``: values' names and their numbers."""

    tables: dict[str, list[_Field]] = field(default_factory=dict)
    unions: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    enums: dict[str, dict[str, int]] = field(default_factory=dict)
    identifier: bytes = b""
    root: str = ""


def schema(path: Path) -> Schema:
    """The schema in ``path``, with what it includes.

    Raises:
        OSError: the runtime's package does not have it.
    """
    found = Schema()
    _declare(path, found)
    return found


def _declare(path: Path, found: Schema) -> None:
    text = re.sub(r"//[^\n]*", "", path.read_text(encoding="utf-8"))
    for name in re.findall(r'include\s+"([^"]+)"', text):
        _declare(path.parent / name, found)
    codes = {}
    for name, kind, body in re.findall(r"enum\s+(\w+)\s*:\s*(\w+)\s*\{([^}]*)\}", text):
        codes[name] = _SCALARS[kind]
        found.enums[name] = {key: int(value) for key, value in re.findall(r"(\w+)\s*=\s*(\d+)", body)}
    codes |= {name: "b" for name in found.enums if name not in codes}
    for name, body in re.findall(r"union\s+(\w+)\s*\{([^}]*)\}", text):
        members = [part.partition(":") for part in body.split(",") if part.strip()]
        found.unions[name] = [(member.strip(), (alias or member).strip()) for member, _, alias in members]
    for name, body in re.findall(r"table\s+(\w+)\s*\{([^}]*)\}", text):
        found.tables[name] = [f for line in body.split(";") if ":" in line for f in _fields(line, codes, found)]
    found.identifier = "".join(re.findall(r'file_identifier\s+"(\w+)"', text)).encode() or found.identifier
    found.root = "".join(re.findall(r"root_type\s+(\w+)", text)) or found.root


def _fields(line: str, codes: dict[str, str], found: Schema) -> list[_Field]:
    matched = re.match(r"\s*(\w+)\s*:\s*(\[?)(\w+)\]?\s*(?:=\s*([-\w.]+))?", line)
    assert matched is not None, line
    name, bracket, kind, default = matched.groups()
    code = _SCALARS.get(kind) or codes.get(kind, "")
    value = found.enums.get(kind, {}).get(default or "", None)
    number = value if value is not None else float(default) if default and "." in default else int(default or 0)
    tag = [_Field(f"{name}_type", _UNION_TAG, "", False, 0)] if kind in found.unions else []
    return [*tag, _Field(name, code, kind, bool(bracket), number)]


@dataclass(frozen=True)
class Reader:
    """Reads tables out of ``data`` by ``schema``."""

    data: memoryview
    schema: Schema

    def root(self) -> Row:
        """The whole file.

        Raises:
            ValueError: it is not of this schema, or broken.
        """
        if bytes(self.data[4:8]) != self.schema.identifier:
            raise ValueError(f"not a flatbuffer {self.schema.identifier.decode()}: {bytes(self.data[4:8])!r}")
        try:
            return self._table(self._follow(0), self.schema.root)
        except struct.error as error:
            raise ValueError(f"a broken flatbuffer {self.schema.identifier.decode()}: {error}") from error

    def _one(self, code: str, position: int) -> Any:
        return struct.unpack_from(f"<{code}", self.data, position)[0]

    def _follow(self, position: int) -> int:
        return position + int(self._one("I", position))

    def _table(self, position: int, name: str) -> Row:
        vtable = position - self._one("i", position)
        slots = self._one("H", vtable) // 2 - 2
        row: Row = {}
        for slot, spec in enumerate(self.schema.tables[name]):
            offset = self._one("H", vtable + 4 + 2 * slot) if slot < slots else 0
            if offset:
                row[spec.name] = self._value(position + offset, spec, row)
            elif spec.code and not spec.vector:
                row[spec.name] = spec.default
        return row

    def _value(self, position: int, spec: _Field, row: Row) -> Any:
        if spec.vector:
            return self._vector(self._follow(position), spec)
        if spec.code:
            return self._one(spec.code, position)
        return self._referred(self._follow(position), spec, row)

    def _referred(self, position: int, spec: _Field, row: Row) -> Any:
        if spec.type == "string":
            return bytes(self.data[position + 4 : position + 4 + self._one("I", position)]).decode()
        if spec.type in self.schema.unions:
            member, table = self.schema.unions[spec.type][row[f"{spec.name}_type"] - 1]
            row[f"{spec.name}_type"] = member
            return self._table(position, table)
        return self._table(position, spec.type)

    def _vector(self, position: int, spec: _Field) -> Any:
        count, start = self._one("I", position), position + 4
        if spec.code == "B":
            return bytes(self.data[start : start + count])
        if spec.code:
            return list(struct.unpack_from(f"<{count}{spec.code}", self.data, start))
        return [self._referred(self._follow(start + 4 * i), spec, {}) for i in range(count)]


def written(row: Row, schema: Schema) -> bytes:
    """The flatbuffer of ``row``, a root table."""
    from flatbuffers import Builder

    writer = _Writer(Builder(1024), schema)
    root = writer.table(row, schema.root)
    writer.builder.Finish(root, file_identifier=schema.identifier)
    return bytes(writer.builder.Output())


@dataclass(frozen=True)
class _Writer:
    builder: Any
    schema: Schema

    def table(self, row: Row, name: str) -> int:
        fields = self.schema.tables[name]
        tags = self._tags(row, fields)
        parts = {f.name: self._part(row[f.name], f, row) for f in fields if (f.vector or not f.code) and row.get(f.name) is not None}
        self.builder.StartObject(len(fields))
        for slot, spec in enumerate(fields):
            if spec.name in parts:
                self.builder.PrependUOffsetTRelativeSlot(slot, parts[spec.name], 0)
            elif spec.code and not spec.vector and spec.name in row:
                self.builder.PrependSlot(_flags(spec.code), slot, tags.get(spec.name, row[spec.name]), spec.default)
        return int(self.builder.EndObject())

    def _tags(self, row: Row, fields: list[_Field]) -> dict[str, int]:
        unions = [f for f in fields if f.type in self.schema.unions and row.get(f.name) is not None]
        return {f"{f.name}_type": 1 + self._members(f).index(row[f"{f.name}_type"]) for f in unions}

    def _members(self, spec: _Field) -> list[str]:
        return [member for member, _ in self.schema.unions[spec.type]]

    def _part(self, value: Any, spec: _Field, row: Row) -> int:
        if not spec.vector:
            return self._referred(value, spec, row)
        if spec.code == "B":
            return self._bytes(value)
        if spec.code:
            return self._scalars(value, spec.code)
        parts = [self._referred(item, spec, {}) for item in value]
        self.builder.StartVector(4, len(parts), 4)
        for part in reversed(parts):
            self.builder.PrependUOffsetTRelative(part)
        return int(self.builder.EndVector())

    def _referred(self, value: Any, spec: _Field, row: Row) -> int:
        if spec.type == "string":
            return int(self.builder.CreateSharedString(value))
        if spec.type in self.schema.unions:
            tables = dict(self.schema.unions[spec.type])
            return self.table(value, tables[row[f"{spec.name}_type"]])
        return self.table(value, spec.type)

    def _bytes(self, value: bytes) -> int:
        return self._raw(value, len(value), 1, _BYTES_ALIGNMENT)

    def _scalars(self, value: list[Any], code: str) -> int:
        content = struct.pack(f"<{len(value)}{code}", *value)
        size = struct.calcsize(f"<{code}")
        return self._raw(content, len(value), size, size)

    def _raw(self, content: bytes, count: int, size: int, alignment: int) -> int:
        self.builder.StartVector(size, count, alignment)
        self.builder.head -= len(content)
        self.builder.Bytes[self.builder.head : self.builder.head + len(content)] = content
        return int(self.builder.EndVector())


@functools.cache
def _flags(code: str) -> Any:
    from flatbuffers import number_types

    return getattr(number_types, f"{_FLAGS[code]}Flags")


_FLAGS = dict(zip("?bBhHiIqQfd", ["Bool", "Int8", "Uint8", "Int16", "Uint16", "Int32", "Uint32", "Int64", "Uint64", "Float32", "Float64"], strict=True))
