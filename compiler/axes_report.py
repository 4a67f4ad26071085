"""What can be pruned in a model, what cannot and why: as text, as plain data, and as a picture."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgesmith.compiler.axes import Axes, Member
from edgesmith.compiler.axes.axes import Axis, Term, leaves, resolve
from edgesmith.compiler.axes.groups import named_shapes
from edgesmith.compiler.diagnostics import Severity
from edgesmith.compiler.errors import UserError
from edgesmith.compiler.files import written_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Plot

SIDES = {"producer": "made by", "consumer": "read by", "scale": "scaled by"}
MOST_NAMED, INDENT = 6, 12
PICTURES = (".svg", ".png", ".pdf")
ROW_IN, LABEL_IN, CHARACTER_IN, GAP_IN, MARGIN_IN = 0.24, 4.2, 0.085, 0.12, 0.3
DPI = 110
COLOURS, PALE = 20, 0.45


def data(axes: Axes) -> dict[str, Any]:
    """Everything: groups with their members, pinned dimensions with their reasons."""
    return {
        "coverage": axes.coverage,
        "groups": [
            {
                "name": g.name,
                "kind": g.kind,
                "size": g.size,
                "exact": g.exact,
                "members": [{"tensor": m.name, "dim": m.dim, "side": m.side, "slices_per_unit": _slices(m)} for m in g.members],
            }
            for g in axes.groups
        ],
        "pinned": [{"tensor": p.where, "dim": p.dim, "size": p.size, "why": p.reason, "by": p.by} for p in axes.pinned],
        "remarks": [{"severity": d.severity.value, "code": d.code, "where": d.where, "message": d.message, "hint": d.hint} for d in axes.diagnostics],
    }


def lines(axes: Axes, width: int) -> list[str]:
    """The same for people, ``width`` characters wide: of each group what makes, reads and scales it, then what must stay, by reason."""
    said = []
    for group in axes.groups:
        statistic = "" if group.exact else ", a statistic runs over them"
        said.append(f"{group.name}: {group.size} units of kind {group.kind}{statistic}")
        for side, verb in SIDES.items():
            said += _wrapped(verb, [f"{m.name}[{m.dim}]{f' x{_slices(m)}' if _slices(m) > 1 else ''}" for m in group.members if m.side == side], width)
    pinned: dict[tuple[str, str], list[str]] = {}
    for pin in axes.pinned:
        pinned.setdefault((pin.reason, pin.by), []).append(f"{pin.where}[{pin.dim}] of {pin.size}")
    for (why, by), where in pinned.items():
        said += [f"must stay: {why} ({by})", *_wrapped("", where, width)]
    said += [str(remark) for remark in axes.diagnostics if remark.severity is not Severity.INFO]
    return [*said, f"{axes.coverage:.1%} of the parameters lie along a dimension that can be pruned, in {len(axes.groups)} groups"]


def _wrapped(verb: str, names: Sequence[str], width: int) -> list[str]:
    more = [f"and {len(names) - MOST_NAMED} more"] if len(names) > MOST_NAMED else []
    text = ", ".join([*names[:MOST_NAMED], *more])
    indent = " " * INDENT
    return textwrap.wrap(text, width, initial_indent=f"  {verb}".ljust(INDENT), subsequent_indent=indent, break_on_hyphens=False) if names else []


def _slices(member: Member) -> int:
    """Indices along the member's dimension that go with one unit."""
    return len(member.indices(0))


@dataclass(frozen=True)
class Box:
    """A factor of a dimension: its text, and the number of its group; None where it must stay."""

    text: str
    group: int | None


def boxes(axes: Axes, term: Term) -> Iterator[Box | str]:
    """The factors of a dimension, with the signs between them."""
    number = {group.axis: place for place, group in enumerate(axes.groups)}
    factors = resolve(term)
    for place, factor in enumerate(factors):
        if place:
            yield "\N{MULTIPLICATION SIGN}"
        yield from _factor(axes, factor, number)
    if not factors:
        yield Box("1", None)


def _factor(axes: Axes, factor: Axis, number: dict[Axis, int]) -> Iterator[Box | str]:
    if factor.parts is None or not any(leaf in number for leaf in leaves((factor,))):
        yield Box(str(factor.size), number.get(factor))
        return
    yield "("
    for place, part in enumerate(factor.parts):
        if place:
            yield "+"
        yield from boxes(axes, part)
    yield ")"


def draw(axes: Axes, file: Path) -> None:
    """Write a picture: every tensor's dimensions as products of axes, those of one group in one colour, grey what must stay.

    Raises:
        UserError: the file's suffix names no picture.
    """
    if file.suffix not in PICTURES:
        raise UserError(f"{file} is no picture", why=f"{file.suffix or 'no suffix'} is not one of {', '.join(PICTURES)}")
    import matplotlib as mpl
    from matplotlib.figure import Figure

    rows = [(name, [list(boxes(axes, term)) for term in shape]) for name, shape in named_shapes(axes.state)]
    rows += [("", [])] + [(f"{group.name}  ({group.kind})", [[Box(str(group.size), place)]]) for place, group in enumerate(axes.groups)]
    width = LABEL_IN + max((sum(map(_width, terms)) for _, terms in rows), default=0) + MARGIN_IN
    with mpl.rc_context({"svg.fonttype": "none", "text.parse_math": False, "font.family": "monospace"}):
        figure = Figure(figsize=(width, ROW_IN * len(rows) + 2 * MARGIN_IN))
        plot = figure.add_axes((0, 0, 1, 1))
        plot.set(xlim=(0, width), ylim=(ROW_IN * len(rows) + MARGIN_IN, -MARGIN_IN))
        plot.axis("off")
        for place, (name, terms) in enumerate(rows):
            _draw_row(plot, place * ROW_IN, name, terms)
        with written_whole(file) as temporary:
            figure.savefig(temporary, format=file.suffix[1:], dpi=DPI, metadata={"Date": None} if file.suffix == ".svg" else None)


def _width(term: Sequence[Box | str]) -> float:
    return sum(CHARACTER_IN * (len(one.text) + 1 if isinstance(one, Box) else 1) for one in term) + GAP_IN


def _draw_row(plot: Plot, y: float, name: str, terms: Iterable[Sequence[Box | str]]) -> None:
    from matplotlib import colormaps

    palette = colormaps["tab20"]
    plot.text(LABEL_IN - GAP_IN, y, name, ha="right", va="center", fontsize=8)
    x = LABEL_IN
    for term in terms:
        for one in term:
            room = _width([one]) - GAP_IN
            box = None
            if isinstance(one, Box):
                colour = "0.88" if one.group is None else tuple(PALE + (1 - PALE) * c for c in palette(one.group % COLOURS)[:3])
                box = {"boxstyle": "round,pad=0.2", "facecolor": colour, "edgecolor": "none"}
            plot.text(x + room / 2, y, one.text if isinstance(one, Box) else one, ha="center", va="center", fontsize=8, bbox=box)
            x += room
        x += GAP_IN
