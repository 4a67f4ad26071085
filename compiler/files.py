"""Files written whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgesmith.compiler.errors import OutputError


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``; when the body ends well it takes the place of ``path``, else it vanishes.

    Raises:
        OutputError: the folder cannot be written, or the disk is full.
    """
    with translated(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
        os.close(handle)
    temporary = Path(name)
    try:
        with translated(path):
            yield temporary
            temporary.chmod(0o644)
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def file_hash(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path``, whole or not at all.

    Raises:
        OutputError: the folder cannot be written, or the disk is full.
    """
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EFBIG: "the file would be too large",
}


_NO_TEMPORARY = "No usable temporary directory"
"""How Python's tempfile says that no folder for temporary files takes a byte: on a full disk, this error comes first."""


def refusal(error: OSError, path: str | Path = "") -> OutputError | None:
    """What a full or read-only disk said, as an ``OutputError`` about ``path`` (or what the error itself names); None for any other error."""
    where, hint = str(path or error.filename or ""), "free some space, or choose another folder with --out"
    if error.errno in _REASONS:
        return OutputError("cannot be written", where=where, why=_REASONS[error.errno], hint=hint)
    if _NO_TEMPORARY in str(error):
        return OutputError(
            "no folder for temporary files can be written", why="the disk is full", hint="free some space, or set TMPDIR to a folder that has some"
        )
    return None


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals to write into ``OutputError``."""
    try:
        yield
    except (PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError) as error:
        raise OutputError("cannot be written", where=str(path), why=error.strerror or str(error), hint="choose another folder with --out") from error
    except OSError as error:
        refused = refusal(error, path)
        if refused is None:
            raise
        raise refused from error
