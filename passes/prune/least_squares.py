"""Weights that give what is wanted from what there is to read: ridge regression towards the weights as they are, its firmness chosen on samples held out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Candidates for how firmly the weights as they are are held, as a share of the inputs' mean variance; leaving them alone is one, too."""


@dataclass(frozen=True)
class Wanted:
    """Sums over ``count`` pairs of a vector x that is read and what is wanted of it, y, for each group of an operator, float64.

    ``within`` (groups, d, d) of x x', ``across`` (groups, d, outputs) of x y', ``read`` (groups, d), ``wanted`` (groups, outputs), ``energy`` of all y'y.
    """

    within: torch.Tensor
    across: torch.Tensor
    read: torch.Tensor
    wanted: torch.Tensor
    energy: float
    count: int

    def __add__(self, other: Wanted) -> Wanted:
        return Wanted(
            self.within + other.within,
            self.across + other.across,
            self.read + other.read,
            self.wanted + other.wanted,
            self.energy + other.energy,
            self.count + other.count,
        )

    @classmethod
    def of(cls, x: torch.Tensor, y: torch.Tensor) -> Wanted:
        """Of rows (groups, n, d) and (groups, n, outputs)."""
        turned = x.transpose(1, 2)
        return cls((turned @ x).double(), (turned @ y).double(), x.sum(1).double(), y.sum(1).double(), float(y.double().square().sum()), x.shape[1])

    def error(self, weight: torch.Tensor, shift: torch.Tensor) -> float:
        """Mean square of what ``weight`` x + ``shift`` differs from what is wanted by, added up over all outputs."""
        x, y = self.read / self.count, self.wanted / self.count
        quadratic = ((weight @ self.within) * weight).sum() - 2 * (weight.transpose(1, 2) * self.across).sum()
        constant = (shift * (shift + 2 * ((weight @ x[..., None])[..., 0] - y))).sum()
        return float((self.energy + quadratic) / self.count + constant)


@dataclass(frozen=True)
class Fit:
    """``weight`` (groups, outputs, d) and ``shift`` (groups, outputs); the error on samples held out, as it was and now."""

    weight: torch.Tensor
    shift: torch.Tensor
    before: float
    after: float


def fitted(weight: torch.Tensor, fitting: Wanted, held: Wanted, *, shifted: bool) -> Fit:
    """The best of leaving ``weight`` alone and of a fit with every ridge; with a constant to be added if ``shifted``.

    Args:
        weight: (groups, outputs, d) as it is, float64.
        fitting: samples to fit.
        held: others, to choose by; then they are fitted, too.
        shifted: whether a constant may be added.
    """
    nothing = torch.zeros(weight.shape[:2], dtype=torch.float64)
    before = held.error(weight, nothing)
    errors = {ridge: held.error(*found) for ridge, found in _ridge(weight, fitting, RIDGES, shifted=shifted)}
    best = min(errors, key=errors.__getitem__, default=None)
    if best is None or errors[best] >= before:
        return Fit(weight, nothing, before, before)
    ((_, made),) = _ridge(weight, fitting + held, (best,), shifted=shifted)
    return Fit(*made, before, errors[best])


def _ridge(weight: torch.Tensor, fitting: Wanted, ridges: Sequence[float], *, shifted: bool) -> Iterator[tuple[float, tuple[torch.Tensor, torch.Tensor]]]:
    """Weight and shift of each ridge; not of those for which the inputs' moments are too near to singular."""
    x, y = fitting.read / fitting.count, fitting.wanted / fitting.count
    within, across = fitting.within / fitting.count, fitting.across / fitting.count
    if shifted:
        within, across = within - x[:, :, None] * x[:, None], across - x[:, :, None] * y[:, None]
    lacking = across - within @ weight.transpose(1, 2)
    level = within.diagonal(dim1=1, dim2=2).mean(1)[:, None, None].clamp(min=torch.finfo(torch.float64).tiny)
    for ridge in ridges:
        factor, failed = torch.linalg.cholesky_ex(within + ridge * level * torch.eye(within.shape[1], dtype=torch.float64))
        if not bool(failed.any()):
            made = weight + torch.cholesky_solve(lacking, factor).transpose(1, 2)
            yield ridge, (made, y - (made @ x[..., None])[..., 0] if shifted else torch.zeros_like(y))
