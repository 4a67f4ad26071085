"""The choice of widths, against trying all of them."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from edgesmith.passes.prune import knapsack
from edgesmith.passes.prune.knapsack import Table, solve


def enumerated(sizes: dict[str, int], tables: list[Table], limits: list[float]) -> float | None:
    """The least error, by trying everything."""
    best = None
    for choice in product(*(range(size) for size in sizes.values())):
        total = totals(tables, dict(zip(sizes, choice, strict=True)))
        if (total[1:] <= np.array(limits) + 1e-12).all() and (best is None or total[0] < best):
            best = float(total[0])
    return best


def totals(tables: list[Table], chosen: dict[str, int]) -> np.ndarray:
    return np.sum([table.values[(slice(None), *(chosen[n] for n in table.groups))] for table in tables], axis=0)


def random_problem(seed: int, resources: int) -> tuple[dict[str, int], list[Table], list[float]]:
    """Groups of which some share costs, in a chain, a cycle or at random; errors rise and costs fall with the choice."""
    rng = np.random.default_rng(seed)
    names = [f"g{i}" for i in range(rng.integers(1, 6))]
    sizes = {name: int(rng.integers(1, 5)) for name in names}
    tables = [
        Table((n,), np.vstack([np.sort(rng.random(sizes[n]))[None], -np.sort(-rng.random((resources, sizes[n])), axis=1)])) for n in names if rng.random() < 0.9
    ]
    for _ in range(rng.integers(0, 2 * len(names))):
        several = tuple(rng.permutation(names)[: rng.integers(1, min(3, len(names)) + 1)])
        values = rng.random((1 + resources, *(sizes[n] for n in several)))
        values[0] *= rng.random() < 0.3
        tables.append(Table(several, values))
    most = sum((table.values[1:].reshape(resources, -1).max(axis=1) for table in tables), start=np.zeros(resources))
    return sizes, tables, list(most * rng.uniform(0.2, 1.0, resources))


@pytest.mark.parametrize("resources", [1, 2, 3])
@pytest.mark.parametrize("seed", range(60))
def test_the_choice_is_the_best_of_all(seed: int, resources: int) -> None:
    sizes, tables, limits = random_problem(seed, resources)
    best, found = enumerated(sizes, tables, limits), solve(sizes, tables, limits)
    assert (found is None) == (best is None)
    if found is not None and best is not None:
        total = totals(tables, found)
        assert (total[1:] <= np.array(limits) * (1 + 1e-9)).all()
        assert total[0] == pytest.approx(best, abs=1e-9)


def test_many_groups_are_chosen_nearly_as_well_as_if_choices_could_be_split() -> None:
    """Forty groups of thirty widths, where fronts are thinned: within a hundredth of the bound from below by duality."""
    rng = np.random.default_rng(0)
    sizes = {f"g{i}": 30 for i in range(40)}
    tables = [Table((n,), np.vstack([rng.random() * np.linspace(0, 1, 30) ** 2, rng.random() * np.linspace(1, 0.1, 30)])) for n in sizes]
    limit = 0.5 * sum(table.values[1, 0] for table in tables)
    found = solve(sizes, tables, [limit])
    assert found is not None
    total = totals(tables, found)
    bounds = [sum(float((t.values[0] + price * t.values[1]).min()) for t in tables) - price * limit for price in np.geomspace(1e-3, 1e3, 2000)]
    assert max(bounds) <= total[0] <= max(bounds) * 1.01
    assert total[1] <= limit


def test_where_every_two_groups_share_costs_some_are_held_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Costs are products of widths, as in densely connected layers; three groups at a time is all that is allowed."""
    monkeypatch.setattr(knapsack, "MOST_CHOICES", 100)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        sizes, widths = {f"g{i}": 4 for i in range(6)}, np.array([8, 6, 4, 2])
        tables = [Table((n,), np.vstack([rng.random() * np.array([0, 0.1, 0.5, 2]), np.zeros(4)])) for n in sizes]
        tables += [Table((a, b), np.stack([np.zeros((4, 4)), rng.random() * np.outer(widths, widths)])) for a in sizes for b in sizes if a < b]
        limits = [0.5 * float(sum(table.values[1].max() for table in tables))]
        best, found = enumerated(sizes, tables, limits), solve(sizes, tables, limits)
        assert best is not None and found is not None
        total = totals(tables, found)
        assert total[1] <= limits[0] * (1 + 1e-9)
        assert best - 1e-9 <= total[0] <= best * 1.1
