"""Which groups may be cut, by kind and by source path, and how many units of each go for a given share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import fx

from edgesmith.compiler.axes import Axes, PruneGroup
from edgesmith.compiler.diagnostics import Diagnostic, Severity
from edgesmith.compiler.model import Model
from edgesmith.compiler.suggest import did_you_mean
from edgesmith.passes.prune.branches import Branch, residual_branches

BLOCKS = "blocks"
KINDS = ("channels", "hidden", "heads", "head_dim", "residual", BLOCKS)


@dataclass(frozen=True)
class Chooser:
    """Groups of ``kinds`` whose name, or a layer that makes their units, matches one of ``include`` (where it says anything) and none of ``exclude``."""

    kinds: tuple[str, ...]
    include: tuple[str, ...]
    exclude: tuple[str, ...]

    def groups(self, axes: Axes) -> list[PruneGroup]:
        """Those that may be cut, independently of each other."""
        return independent([group for group in axes.groups if self._allows(group)])

    def branches(self, model: Model) -> dict[str, Branch]:
        """Name -> residual branch that may go whole, where blocks may."""
        found: dict[str, Branch] = {}
        for branch in residual_branches(model) if BLOCKS in self.kinds else ():
            name = f"{branch.source}:block"
            name = name if name not in found else f"{name}#{sum(other.source == branch.source for other in found.values()) + 1}"
            if self._allows_paths({name, branch.source}):
                found[name] = branch
        return found

    def misfits(self, axes: Axes) -> Iterable[Diagnostic]:
        """Patterns that match nothing; a model of which nothing may go."""
        for pattern in (*self.include, *self.exclude):
            known = {path for group in axes.groups for path in _paths(group)}
            if BLOCKS in self.kinds:
                known |= {branch.source for branch in residual_branches(axes.model)}
            if not any(_matches(path, pattern) for path in known):
                yield Diagnostic(Severity.ERROR, "prune.unknown-path", pattern, "matches no layer that could be pruned", did_you_mean(pattern, known))
        if not self.groups(axes) and not self.branches(axes.model):
            yield Diagnostic(Severity.ERROR, "prune.nothing", "", "no group of units may go", self._why_none(axes))

    def _allows(self, group: PruneGroup) -> bool:
        return group.kind in self.kinds and self._allows_paths(_paths(group))

    def _allows_paths(self, paths: set[str]) -> bool:
        included = not self.include or any(_matches(path, pattern) for path in paths for pattern in self.include)
        return included and not any(_matches(path, pattern) for path in paths for pattern in self.exclude)

    def _why_none(self, axes: Axes) -> str:
        others = sorted({group.kind for group in axes.groups} - set(self.kinds))
        if others:
            return f"there are groups of the kinds {', '.join(others)}: kinds=[{','.join((*self.kinds, *others))}]"
        return f"{axes.pinned[0].where} stays: {axes.pinned[0].reason}" if axes.pinned else "the model has no parameters"


def independent(groups: Sequence[PruneGroup]) -> list[PruneGroup]:
    """``groups`` without those that are a factor of a dimension which a larger one of their kind is a factor of, too."""
    taken: dict[tuple[str, int], list[PruneGroup]] = {}
    for group in sorted(groups, key=lambda g: -g.size):
        if not any(_multiplied(group, other) for member in group.members for other in taken.get((member.name, member.dim), ())):
            for member in group.members:
                taken.setdefault((member.name, member.dim), []).append(group)
    chosen = {group.name for held in taken.values() for group in held}
    return [group for group in groups if group.name in chosen]


def _multiplied(group: PruneGroup, other: PruneGroup) -> bool:
    """Whether both are factors of one dimension (groups x width, key heads x repeats) and of one kind: cutting both would cut it twice."""
    if group.kind != other.kind:
        return False
    theirs = {(m.name, m.dim): m.labels for m in other.members}
    return any(bool(((m.labels >= 0).any(axis=0) & (theirs[m.name, m.dim] >= 0).any(axis=0)).any()) for m in group.members if (m.name, m.dim) in theirs)


def _paths(group: PruneGroup) -> set[str]:
    """The group's name and the layers that make its units; of those that only scale units where none makes them."""
    made = [m.name for m in group.members if m.side == "producer"] or [m.name for m in group.members]
    return {group.name, *(name.rpartition(".")[0] or name for name in made)}


def _matches(path: str, pattern: str) -> bool:
    return fnmatchcase(path, pattern) or path.startswith(f"{pattern}.")


def alike(axes: Axes, groups: Sequence[PruneGroup]) -> list[list[PruneGroup]]:
    """``groups`` in classes of the same structure, whose units' scores may be compared: the same operators make and read them at the same places.

    Sizes do not matter (Fang et al., Isomorphic Pruning for Vision Models, ECCV 2024, section 3.2).
    """
    reads: dict[str, list[str]] = {}
    for node in axes.model.graph.graph.find_nodes(op="get_attr"):
        reads.setdefault(str(node.target), []).extend(f"{user.target} {place}" for user in node.users for place in _places(user, node))
    classes: dict[object, list[PruneGroup]] = {}
    for group in groups:
        members = Counter((m.side, m.dim, tuple(sorted(reads.get(m.name, ())))) for m in group.members)
        classes.setdefault((group.kind, frozenset(members.items())), []).append(group)
    return list(classes.values())


def _places(user: fx.Node, node: fx.Node) -> list[int]:
    return [place for place, argument in enumerate(user.args) if argument is node]


def lowest(groups: Sequence[PruneGroup], scores: Mapping[str, torch.Tensor], share: float, least: int) -> dict[str, int]:
    """How many units of each group are among the lowest-scored ``share`` of the units of all ``groups``; each keeps ``least``."""
    entries = [(float(score), g.name) for g in groups for score in scores[g.name].sort(descending=True).values[least:].tolist()]
    total = sum(group.size for group in groups)
    gone = Counter(name for _, name in sorted(entries)[: int(share * total + 0.5)])
    return {group.name: gone[group.name] for group in groups}
