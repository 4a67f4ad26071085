"""Where an artifact can be measured, and what such a place is like."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgesmith.compiler.errors import UserError

CPU_INFO = Path("/proc/cpuinfo")
GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
FEATURES = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "sve", "sve2")
"""Instructions that decide how fast a matrix product is, as /proc/cpuinfo spells them (x86: flags, Arm: Features)."""
MODEL_KEYS = ("model name", "Hardware", "Model", "CPU part")


@dataclass(frozen=True)
class Device:
    """A machine that runs artifacts. ``name`` is what a build file says; ``summary`` is for people."""

    name: str
    summary: str


def devices() -> Mapping[str, Device]:
    """Every device that can be measured on, by name."""
    return {"host": Device("host", "this machine")}


def device(name: str) -> Device:
    """The device called ``name``.

    Raises:
        UserError: there is none of that name.
    """
    known = devices()
    if name not in known:
        raise UserError(f"unknown device {name!r}", hint=f"there is {', '.join(known)}")
    return known[name]


def environment() -> dict[str, str]:
    """What a number depends on beside the artifact: processor, its features, cores, governor, system, Python, load."""
    info = _cpu_info()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    return {
        "cpu": next((info[key] for key in MODEL_KEYS if key in info), platform.processor() or platform.machine()),
        "cpu_features": " ".join(feature for feature in FEATURES if feature in flags),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "governor": GOVERNOR.read_text(encoding="ascii").strip() if GOVERNOR.is_file() else "not readable",
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "load_average": f"{os.getloadavg()[0]:.2f}",
    }


def _cpu_info() -> dict[str, str]:
    """The first processor's lines of /proc/cpuinfo; empty where there is none."""
    if not CPU_INFO.is_file():
        return {}
    first, _, _ = CPU_INFO.read_text(encoding="utf-8", errors="replace").partition("\n\n")
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}
