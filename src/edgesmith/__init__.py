"""edgesmith: a fine-tuned PyTorch model and a budget become measured files that a phone runs."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgesmith.compiler.axes import Axes as Axes
    from edgesmith.compiler.axes import remove as remove
    from edgesmith.compiler.budget import AccuracyGoal as AccuracyGoal
    from edgesmith.compiler.budget import Budget as Budget
    from edgesmith.compiler.budget import Finding as Finding
    from edgesmith.compiler.budget import Verdict as Verdict
    from edgesmith.compiler.build import build as build
    from edgesmith.compiler.data import Data as Data
    from edgesmith.compiler.data import PassData as PassData
    from edgesmith.compiler.data import Split as Split
    from edgesmith.compiler.diagnostics import Diagnostic as Diagnostic
    from edgesmith.compiler.diagnostics import Severity as Severity
    from edgesmith.compiler.errors import EdgesmithError as EdgesmithError
    from edgesmith.compiler.errors import UserError as UserError
    from edgesmith.compiler.model import Model as Model
    from edgesmith.compiler.model import TensorSpec as TensorSpec
    from edgesmith.compiler.passbase import Numerics as Numerics
    from edgesmith.compiler.passbase import Pass as Pass
    from edgesmith.compiler.passbase import PassContext as PassContext
    from edgesmith.compiler.passbase import PassResult as PassResult
    from edgesmith.compiler.pipeline import Pipeline as Pipeline
    from edgesmith.compiler.profile.protocol import compare as compare
    from edgesmith.compiler.profile.protocol import measure as measure
    from edgesmith.compiler.quantplan import QuantPlan as QuantPlan
    from edgesmith.compiler.quantplan import Scheme as Scheme
    from edgesmith.compiler.target import Artifact as Artifact
    from edgesmith.compiler.target import Target as Target

    targets: Mapping[str, Target]

_HOME = {
    "AccuracyGoal": "compiler.budget",
    "Artifact": "compiler.target",
    "Axes": "compiler.axes",
    "Budget": "compiler.budget",
    "Data": "compiler.data",
    "Diagnostic": "compiler.diagnostics",
    "EdgesmithError": "compiler.errors",
    "Finding": "compiler.budget",
    "Model": "compiler.model",
    "Numerics": "compiler.passbase",
    "Pass": "compiler.passbase",
    "PassContext": "compiler.passbase",
    "PassData": "compiler.data",
    "PassResult": "compiler.passbase",
    "Pipeline": "compiler.pipeline",
    "QuantPlan": "compiler.quantplan",
    "Scheme": "compiler.quantplan",
    "Severity": "compiler.diagnostics",
    "Split": "compiler.data",
    "Target": "compiler.target",
    "TensorSpec": "compiler.model",
    "UserError": "compiler.errors",
    "Verdict": "compiler.budget",
    "build": "compiler.build",
    "compare": "compiler.profile.protocol",
    "measure": "compiler.profile.protocol",
    "remove": "compiler.axes",
    "targets": "targets",
}

__all__ = sorted(_HOME)  # noqa: PLE0605
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'edgesmith' has no attribute {name!r}")
    module = importlib.import_module(f"edgesmith.{_HOME[name]}")
    return module if _HOME[name] == name else getattr(module, name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
