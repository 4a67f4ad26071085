"""What a student may learn from: distances between rows of logits, by name.

Every function takes student and teacher logits [rows, classes] and gives a scalar; it is at least 0 up to rounding, and 0 where both agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch.nn import functional as F

TEMPERATURE = 2.0
"""Softens both sides before a divergence; z-scored logits of ten classes at 2 spread like usual ones at 4."""

_EPS = 1e-6

Distance = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def kl(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 4.0) -> torch.Tensor:
    """Kullback-Leibler divergence from teacher to student at ``temperature``, times its square (Hinton et al. 2015, section 2)."""
    log_student, log_teacher = (F.log_softmax(x / temperature, dim=1) for x in (student, teacher))
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * temperature**2


def standardized_kl(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """``kl`` of z-scored rows: the student may have any offset and scale of its own (Sun et al. 2024, "Logit Standardization", algorithm 1)."""
    return kl(_z_scored(student), _z_scored(teacher), TEMPERATURE)


def dist(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """One minus Pearson's correlation between classes of a sample, plus the same between samples of a class (Huang et al. 2022, "DIST", section 3).

    Correlations are of softmax outputs as in the paper's section 3.3, at the temperature ``TEMPERATURE``, scaled by its square.
    """
    p, q = (F.softmax(x / TEMPERATURE, dim=1) for x in (student, teacher))
    return TEMPERATURE**2 * (_uncorrelated(p, q) + _uncorrelated(p.T, q.T))


def correlation(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """``dist`` on raw logits: 0 where each row and column of the student is a positive affine map of the teacher's. Fits outputs that are no logits."""
    return _uncorrelated(student, teacher) + _uncorrelated(student.T, teacher.T)


def mse(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean squared difference."""
    return F.mse_loss(student, teacher)


LOSSES: Mapping[str, Distance] = MappingProxyType({"kl": kl, "standardized-kl": standardized_kl, "dist": dist, "correlation": correlation, "mse": mse})
"""The distances that an option may name."""


def _z_scored(rows: torch.Tensor) -> torch.Tensor:
    """Mean 0 and variance 1 in each row; a constant row (a masked token, say) becomes zero, with finite gradients."""
    centred = rows - rows.mean(dim=1, keepdim=True)
    return F.normalize(centred, dim=1, eps=_EPS) * math.sqrt(rows.shape[1])


def _uncorrelated(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Mean over rows of one minus Pearson's correlation."""
    a, b = (x - x.mean(dim=1, keepdim=True) for x in (a, b))
    return 1 - F.cosine_similarity(a, b, dim=1, eps=_EPS).mean()
