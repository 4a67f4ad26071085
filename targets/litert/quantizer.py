"""The only module that knows ai-edge-quantizer: choices per operator and numbers per tensor in, an int8 ``.tflite`` out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from edgesmith.compiler.errors import DefectError
from edgesmith.compiler.quantplan import STATIC_SCHEMES, STEPS16, Scheme
from edgesmith.compiler.quiet import quiet
from edgesmith.targets.litert.flatfile import Array, Op

WIDE_BITS = 16


@dataclass(frozen=True)
class Numbers:
    """The real interval that a tensor's grid of ``bits`` covers. Of the tensor's rank: one element, or one per channel of a weight."""

    low: Array
    high: Array
    bits: int = 8

    @property
    def ends(self) -> tuple[float, float]:
        """Both ends of an activation's range."""
        return float(self.low.item()), float(self.high.item())

    @property
    def grid(self) -> tuple[float, int]:
        """Scale and zero point of an activation (TensorFlow Lite 8-bit quantization specification; of 16 bits, its 16x8 mode)."""
        low, high = self.ends
        if self.bits == WIDE_BITS:
            return max(-low, high, 1e-9) / STEPS16, 0
        scale = max(high - low, 1e-9) / 255
        return scale, int(np.rint(-128 - low / scale))

    def reshaped(self, rank: int) -> Numbers:
        """The same range for a tensor of another rank."""
        return replace(self, low=self.low.reshape((1,) * rank), high=self.high.reshape((1,) * rank))

    def same_grid(self, other: Numbers) -> bool:
        """Whether two activations have one grid."""
        return self.ends == other.ends and self.bits == other.bits


def quantized(content: bytes, schemes: Mapping[str, tuple[Op, Scheme]], numbers: Mapping[str, Numbers]) -> bytes:
    """``content`` with the operators that write the tensors named in ``schemes`` quantized, the rest left in float32.

    Args:
        content: a float32 ``.tflite`` file.
        schemes: name of an operator's output tensor -> the operator and how it runs.
        numbers: tensor name -> its range. Every activation of a static operator needs one; a weight without one gets its own extremes.
    """
    with quiet():
        from ai_edge_quantizer import qtyping, quantizer

        tool = quantizer.Quantizer(content)
        for name, (op, scheme) in schemes.items():
            scope, kind = f"^{re.escape(name)};$", qtyping.TFLOperationName(op.kind)
            if scheme in STATIC_SCHEMES:
                tool.add_static_config(scope, kind, activation_num_bits=WIDE_BITS if scheme is Scheme.STATIC16X8 else 8, weight_num_bits=8)
            else:
                tool.add_dynamic_config(scope, kind, num_bits=8)
        statistics = {name: {"min": n.low, "max": n.high} for name, n in numbers.items()}
        try:
            result = tool.quantize(statistics, enable_progress_report=False, enable_progress_bar=False).quantized_model
        except (ValueError, RuntimeError) as error:
            raise DefectError("ai-edge-quantizer refused the legalised plan", why=str(error)) from error
    assert result is not None
    return bytes(result)
