"""Rewrite a Model into what XNNPACK runs well."""

from __future__ import annotations

from edgesmith.compiler.diagnostics import Diagnostic
from edgesmith.compiler.model import Model


def legalise(model: Model) -> tuple[Model, tuple[Diagnostic, ...]]:
    """The model to lower, and what of its quantization plan could not be honoured."""
    return model, ()
