"""What is installed, what conflicts, what is missing, and what the processor can do. Imports nothing heavy."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

from packaging.requirements import Requirement

DISTRIBUTION = "edgesmith"
GROUPS = ("onnxruntime", "litert", "executorch", "huggingface")
"""The extras that a user chooses between."""
OK, MISSING, CONFLICT = "ok", "missing", "conflict"


@dataclass(frozen=True)
class Finding:
    """One requirement against what is installed. ``extra`` is empty for what edgesmith itself needs; ``by`` names who requires it."""

    extra: str
    name: str
    wanted: str
    installed: str | None
    by: str = DISTRIBUTION

    @property
    def status(self) -> str:
        """``ok``, ``missing`` or ``conflict``."""
        if self.installed is None:
            return MISSING
        return OK if not self.wanted or Requirement(f"{self.name}{self.wanted}").specifier.contains(self.installed, prereleases=True) else CONFLICT


@dataclass(frozen=True)
class Health:
    """Everything that doctor looked at. ``installed`` is False where edgesmith is run without being installed, so that its bounds are not known."""

    installed: bool
    direct: tuple[Finding, ...]
    indirect: tuple[Finding, ...]
    machine: dict[str, str]

    @property
    def broken(self) -> tuple[Finding, ...]:
        """What keeps edgesmith, or an extra that is installed, from working."""
        extras = {extra for extra in GROUPS if any(f.extra == extra and f.status != MISSING for f in self.direct)}
        whole = {extra for extra in extras if all(f.status != MISSING for f in self.direct if f.extra == extra)}
        direct = [f for f in self.direct if f.status == CONFLICT or (f.status == MISSING and not f.extra)]
        return (*direct, *(f for f in self.indirect if not f.extra or f.extra in whole))

    @property
    def missing_extras(self) -> tuple[str, ...]:
        """Extras of which a part is not installed."""
        return tuple(extra for extra in GROUPS if any(f.extra == extra and f.status == MISSING for f in self.direct))


def examine() -> Health:
    """Look at the installed distributions and at this machine."""
    from edgesmith.compiler.profile.devices import environment

    requirements = list(_requirements(DISTRIBUTION, GROUPS))
    direct = tuple(Finding(extra, r.name, str(r.specifier), _version(r.name)) for extra, r in requirements)
    indirect = tuple(f for extra in ("", *GROUPS) for f in _unmet_below([r for e, r in requirements if e == extra], extra))
    machine = {"python": platform.python_version(), **environment()}
    return Health(_version(DISTRIBUTION) is not None, direct, _distinct(indirect), machine)


def _distinct(findings: tuple[Finding, ...]) -> tuple[Finding, ...]:
    seen: dict[tuple[str, str], Finding] = {}
    for finding in findings:
        seen.setdefault((finding.by, finding.name), finding)
    return tuple(seen.values())


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _requirements(name: str, extras: tuple[str, ...] = ()) -> Iterator[tuple[str, Requirement]]:
    """(extra, requirement) of an installed distribution on this machine; the extra is empty for what it always needs."""
    try:
        texts = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return
    for requirement in map(Requirement, texts):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield "", requirement
            continue
        for extra in extras:
            if requirement.marker.evaluate({"extra": extra}):
                yield extra, requirement


def _unmet_below(roots: list[Requirement], extra: str) -> Iterator[Finding]:
    """What the installed ones of ``roots``, and all below them, require in vain."""
    waiting = [(r.name, tuple(sorted(r.extras))) for r in roots if _version(r.name) is not None]
    seen = set(waiting)
    while waiting:
        name, extras = waiting.pop()
        for _, requirement in _requirements(name, extras):
            finding = Finding(extra, requirement.name, str(requirement.specifier), _version(requirement.name), by=name)
            if finding.status != OK:
                yield finding
                continue
            key = (requirement.name, tuple(sorted(requirement.extras)))
            if key not in seen:
                seen.add(key)
                waiting.append(key)
