"""Losses against what their definitions promise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import special, stats

from edgesmith.passes.train.losses import LOSSES, correlation, dist, kl, standardized_kl


@pytest.fixture
def logits() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(12, 7, generator=generator, dtype=torch.float64), torch.randn(12, 7, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", LOSSES)
def test_agreement_costs_nothing_and_disagreement_does(name: str, logits: tuple[torch.Tensor, torch.Tensor]) -> None:
    student, teacher = logits
    assert abs(float(LOSSES[name](teacher, teacher))) < 1e-6
    assert float(LOSSES[name](student, teacher)) > 0.01


@pytest.mark.parametrize("name", LOSSES)
def test_a_step_down_the_gradient_brings_the_student_nearer(name: str, logits: tuple[torch.Tensor, torch.Tensor]) -> None:
    student, teacher = logits[0].clone().requires_grad_(), logits[1]
    before = LOSSES[name](student, teacher)
    (gradient,) = torch.autograd.grad(before, student)
    assert float(LOSSES[name](student.detach() - 1e-3 * gradient, teacher)) < float(before.detach())


def test_kl_is_scipys(logits: tuple[torch.Tensor, torch.Tensor]) -> None:
    student, teacher = (special.softmax(x.numpy() / 4, axis=1) for x in logits)
    expected = 16 * np.mean([stats.entropy(t, s) for s, t in zip(student, teacher, strict=True)])
    assert float(kl(*logits)) == pytest.approx(expected, rel=1e-9)


def test_standardized_kl_ignores_scale_and_offset_of_each_side(logits: tuple[torch.Tensor, torch.Tensor]) -> None:
    student, teacher = logits
    scale, offset = torch.linspace(0.5, 20, 12, dtype=torch.float64)[:, None], torch.linspace(-9, 9, 12, dtype=torch.float64)[:, None]
    expected = float(standardized_kl(student, teacher))
    assert float(standardized_kl(student * scale + offset, teacher)) == pytest.approx(expected, rel=1e-6)
    assert float(standardized_kl(student, teacher * scale + offset)) == pytest.approx(expected, rel=1e-6)
    assert abs(float(standardized_kl(teacher * scale + offset, teacher))) < 1e-6
    assert float(kl(teacher * scale + offset, teacher)) > 0.1


def test_correlation_is_zero_for_affine_students(logits: tuple[torch.Tensor, torch.Tensor]) -> None:
    _, teacher = logits
    assert abs(float(correlation(3 * teacher + 2, teacher))) < 1e-6
    assert float(correlation(-teacher, teacher)) == pytest.approx(4, abs=1e-6)


def test_dist_is_pearsons_correlation_of_softmax_outputs_both_ways(logits: tuple[torch.Tensor, torch.Tensor]) -> None:
    student, teacher = (special.softmax(x.numpy() / 2, axis=1) for x in logits)
    inter = np.mean([1 - stats.pearsonr(s, t)[0] for s, t in zip(student, teacher, strict=True)])
    intra = np.mean([1 - stats.pearsonr(s, t)[0] for s, t in zip(student.T, teacher.T, strict=True)])
    assert float(dist(*logits)) == pytest.approx(4 * (inter + intra), rel=1e-6)
    offset = torch.arange(12, dtype=torch.float64)[:, None]
    assert abs(float(dist(logits[1] + offset, logits[1]))) < 1e-6


@pytest.mark.parametrize("name", LOSSES)
def test_constant_rows_give_finite_gradients(name: str) -> None:
    student = torch.zeros(4, 5, requires_grad=True)
    LOSSES[name](student, torch.ones(4, 5)).backward()
    assert student.grad is not None and torch.isfinite(student.grad).all()
