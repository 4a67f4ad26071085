"""The exception tree.

    EdgesmithError
    ├── UserError            exit 2: something the user can put right
    │   ├── BuildFileError     edgesmith.toml: unknown key, wrong type, missing file
    │   ├── SpecError          a pass or target name, or one of its options
    │   ├── SourceError        the model's source or weights cannot be read
    │   ├── CaptureError       the model cannot be captured as one graph
    │   ├── DataError          empty, wrongly shaped or wrongly typed data
    │   ├── UnsupportedError   a pass or target refuses this model
    │   ├── MissingExtraError  an optional dependency is not installed
    │   └── OutputError        the output folder or the disk refuses
    ├── NumericsError        exit 70: a step broke the numbers; it is named
    ├── RunnerError          exit 70: a runtime died, hung or refused its own artifact
    └── DefectError          exit 70: a broken promise of ours

A foreign error is translated at the border where it enters, by name.
"""

from __future__ import annotations


class EdgesmithError(Exception):
    """Anything that edgesmith raises on purpose.

    ``what`` says what is wrong, ``where`` the place (file, line and key, or the source path of a layer),
    ``why`` the reason and ``hint`` what to do about it. ``str()`` is the one message a user reads.
    """

    exit_code = 70

    def __init__(self, what: str, *, where: str = "", why: str = "", hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.why = why
        self.hint = hint

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        if self.why:
            text += f": {self.why}"
        if self.hint:
            text += f"\n  hint: {self.hint}"
        return text


class UserError(EdgesmithError):
    """Something the user can put right; the command line ends with exit code 2."""

    exit_code = 2


class BuildFileError(UserError):
    """The build file has an unknown key, a wrong type or names a missing file."""


class SpecError(UserError):
    """A pass or target is unknown, or one of its options is."""


class SourceError(UserError):
    """A model source, or its weights, cannot be read."""


class CaptureError(UserError):
    """A model cannot be captured as one graph."""


class DataError(UserError):
    """Data is empty, wrongly shaped, wrongly typed or out of range."""


class UnsupportedError(UserError):
    """A pass or a target refuses this model before anything ran."""


class MissingExtraError(UserError):
    """An optional dependency is not installed.

    Args:
        module: the import that failed.
        extra: the extra of the ``edgesmith`` distribution that brings it.
    """

    def __init__(self, module: str, extra: str) -> None:
        super().__init__(f"{module} is not installed", hint=f"pip install 'edgesmith[{extra}]'")
        self.module = module
        self.extra = extra


class OutputError(UserError):
    """An output folder cannot be written, or the disk is full."""


class NumericsError(EdgesmithError):
    """The outputs after a step differ from those before by more than the step's numerics allow."""


class RunnerError(EdgesmithError):
    """A runner process died, hung or could not load an artifact."""


class DefectError(EdgesmithError):
    """A promise of edgesmith's own code was broken."""
