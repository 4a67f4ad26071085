"""A graph run with some units dead: what removal must be equal to.

Every value goes with a mask of the elements that are alive. A dead element is zero, so that it adds nothing to a product or a
sum; a statistic is taken over what is alive. The masks are found by running the operators on them, not by the
analysis of axes, of which nothing is used here.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import fx
from torch.utils import _pytree as pytree

from edgesmith.compiler import graph as graphs
from edgesmith.compiler.axes import masked_statistics as statistics
from edgesmith.compiler.axes.choices import CHOICES
from edgesmith.compiler.errors import UnsupportedError

aten = torch.ops.aten

Alive = torch.Tensor | None
"""True where an element is alive; None where all are."""
Call = tuple[tuple[Any, ...], dict[str, Any]]


def _packets(*lines: str) -> set[Any]:
    return {getattr(aten, name) for line in lines for name in line.split()}


_ELEMENTWISE = {
    aten.alias.default,
    aten.contiguous.default,
    aten.copy.default,
    aten.detach.default,
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
    aten.floor_divide.default,
    aten.floor_divide.Scalar,
    aten.hardsigmoid.default,
    aten.hardswish.default,
    aten.lift_fresh_copy.default,
    aten.log_sigmoid.default,
    aten.masked_fill.Tensor,
    aten.real.default,
    aten.to.device,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten._to_copy.default,
    aten.clip.default,
    aten.__and__.Scalar,
    aten.__and__.Tensor,
    aten.__or__.Scalar,
    aten.__or__.Tensor,
    aten.where.ScalarSelf,
    aten.where.ScalarOther,
    aten.where.Scalar,
    aten.rrelu.default,
}
_OF_FIRST = {
    aten.type_as.default,
    aten.to.other,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.empty_like.default,
    aten.cumsum.default,
    aten.cumprod.default,
    aten.fill.Scalar,
    aten.fill.Tensor,
    aten.tril.default,
    aten.triu.default,
}
_MOVES = _packets(
    "view reshape _unsafe_view view_as reshape_as unflatten flatten ravel squeeze unsqueeze atleast_1d atleast_2d atleast_3d",
    "permute transpose t numpy_T mT adjoint swapaxes swapdims movedim moveaxis expand expand_as broadcast_to broadcast_tensors repeat tile repeat_interleave",
    "cat concat concatenate stack split split_with_sizes chunk tensor_split unbind select slice narrow roll flip",
    "index _unsafe_index gather embedding pixel_shuffle pixel_unshuffle channel_shuffle constant_pad_nd pad",
)
_JOINS = {aten.cat.default, aten.concat.default, aten.concatenate.default}
_SHAPED_LIKE = {aten.expand_as.default, aten.view_as.default, aten.reshape_as.default}
_WINDOWS = _packets(
    "max_pool1d max_pool2d max_pool3d max_pool2d_with_indices avg_pool1d avg_pool2d avg_pool3d",
    "adaptive_avg_pool1d adaptive_avg_pool2d _adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool2d",
    "upsample_linear1d upsample_nearest1d upsample_bilinear2d upsample_bicubic2d upsample_nearest2d upsample_nearest3d upsample_trilinear3d",
    "_upsample_bilinear2d_aa _upsample_bicubic2d_aa _upsample_nearest_exact2d",
    "reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d im2col col2im topk sort argsort",
)
_CONVOLUTIONS = _packets("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution")
_PRODUCTS = _CONVOLUTIONS | _packets("linear matmul mm bmm mv dot outer einsum addmm baddbmm")
_RECURRENT = {aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input}
_ADDENDS = {aten.addmm: 0, aten.baddbmm: 0, aten.linear: 2} | dict.fromkeys(_CONVOLUTIONS, 2)
"""Where the operator takes what it adds to the product."""


class MaskedInterpreter(fx.Interpreter):
    """Runs a graph with parts of its parameters, buffers and constants dead: ``dead`` is tensor id -> alive mask.

    ``choices`` are what operators that choose by value have given, by the names of their nodes.
    """

    def __init__(self, graph: fx.GraphModule, dead: Mapping[int, torch.Tensor]) -> None:
        super().__init__(graph)
        self._dead = dead
        self.alive: dict[fx.Node, Any] = {}
        self.choices: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        """The value of a node; its mask goes to ``alive`` for as long as it is needed. Dead elements of the value are zero."""
        value = self._run(n)
        if n.target in CHOICES:
            self.choices[n.name] = value
        for past in self.user_to_last_uses.get(n, ()) if n.op != "output" else ():
            self.alive.pop(past, None)
        return value

    def _run(self, n: fx.Node) -> Any:
        if n.op == "get_attr":
            value = graphs.tensor(self.module, str(n.target))  # type: ignore[arg-type]
            mask = self._dead.get(id(value))
            self.alive[n] = mask
            return value if mask is None else zeroed(value, mask)
        if n.op != "call_function" or not any(self._any_dead(a) for a in n.all_input_nodes):
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        masks: Any = pytree.tree_map_only(fx.Node, lambda a: _Mask(self.alive.get(a)), (n.args, n.kwargs))
        value, alive = self._dispatch(n, (args, kwargs), masks)
        self.alive[n] = [_some(m) for m in alive] if isinstance(alive, (list, tuple)) else _some(alive)
        return value

    def _any_dead(self, node: fx.Node) -> bool:
        mask = self.alive.get(node)
        return any(m is not None for m in mask) if isinstance(mask, (list, tuple)) else mask is not None

    def _dispatch(self, node: fx.Node, call: Call, masks: Call) -> tuple[Any, Any]:
        target: Any = node.target
        if target is operator.getitem:
            mask = masks[0][0].alive
            return call[0][0][call[0][1]], mask[call[0][1]] if mask is not None else None
        packet = getattr(target, "overloadpacket", None)
        for known, handler in _HANDLERS:
            if target in known or packet in known:
                return handler(target, call, masks)
        if torch.Tag.pointwise in getattr(target, "tags", ()):
            return _elementwise(target, call, masks)
        if not isinstance(node.meta.get("val"), (torch.Tensor, tuple, list)):
            return target(*call[0], **call[1]), None
        raise UnsupportedError(f"a removal through {target} cannot be proven", where=graphs.source(node), hint="exclude its group")


def _some(alive: Alive) -> Alive:
    """None where nothing is dead."""
    return None if alive is None or bool(alive.all()) else alive


class _Mask:
    """The mask of one argument (a leaf to the argument mapper)."""

    def __init__(self, alive: Any) -> None:
        self.alive = alive


def zeroed(value: torch.Tensor, alive: Alive) -> torch.Tensor:
    """``value`` with zeros where it is dead."""
    return value if alive is None else torch.where(alive, value, torch.zeros((), dtype=value.dtype, device=value.device))


def _elementwise(target: Any, call: Call, masks: Call) -> tuple[Any, Alive]:
    value = target(*call[0], **call[1])
    alive = torch.ones(value.shape, dtype=torch.bool)
    for mask in [*masks[0], *masks[1].values()]:
        if isinstance(mask, _Mask) and mask.alive is not None:
            alive = alive & mask.alive
    return zeroed(value, alive), alive


def _new(target: Any, call: Call, masks: Call) -> tuple[Any, Alive]:
    """What takes nothing but its type from a tensor."""
    return target(*call[0], **call[1]), None


def _of_first(target: Any, call: Call, masks: Call) -> tuple[Any, Alive]:
    value = target(*call[0], **call[1])
    alive = masks[0][0].alive if isinstance(masks[0][0], _Mask) else None
    return zeroed(value, alive), alive


def _numbers(given: Any, mask: Any) -> Any:
    """An argument with each tensor replaced by its mask as numbers."""
    if isinstance(given, (list, tuple)):
        return [_numbers(g, m) for g, m in zip(given, mask, strict=True)]
    if not isinstance(given, torch.Tensor):
        return given
    return torch.ones(given.shape) if mask.alive is None else mask.alive.to(torch.float32)


def _positive(result: Any) -> Any:
    return [r > 0.5 for r in result] if isinstance(result, (list, tuple)) else result > 0.5


def _move(target: Any, call: Call, masks: Call) -> tuple[Any, Any]:
    """Data goes where the operator puts it, and so does its mask."""
    if target not in _SHAPED_LIKE and any(isinstance(m, _Mask) and m.alive is not None for m in masks[0][1:]):
        raise UnsupportedError(f"a removal along the indices of {target} cannot be proven")
    if target is aten.view.default:
        target = aten.reshape.default  # what is masked may lie in memory otherwise than what was captured
    value = target(*call[0], **call[1])
    numbers, kwargs = _numbers(call[0][0], masks[0][0]), dict(call[1])
    if target in {aten.constant_pad_nd.default, aten.pad.default}:
        alive = _padded(target, numbers, *call[0][1:], **kwargs)
        return zeroed(value, alive), alive
    if target in _JOINS:
        dim = call[0][1] if len(call[0]) > 1 else kwargs.get("dim", 0)
        alive = _positive(target(_joined(numbers, [m.alive for m in masks[0][0]], dim), *call[0][1:], **kwargs))
        return zeroed(value, alive), alive
    return value, _positive(target(numbers, *call[0][1:], **kwargs))


def _padded(target: Any, numbers: torch.Tensor, pad: Any, *rest: Any, **kwargs: Any) -> torch.Tensor:
    """A constant in the padding is alive where anything is along the dimensions that are padded."""
    by_constant = target is aten.constant_pad_nd.default or (rest[0] if rest else kwargs.get("mode", "constant")) == "constant"
    if not by_constant:
        return cast("torch.Tensor", target(numbers, pad, *rest, **kwargs) > 0.5)
    padded = [numbers.dim() - 1 - i for i in range(len(pad) // 2) if pad[2 * i] or pad[2 * i + 1]]
    inside = torch.constant_pad_nd(torch.ones_like(numbers), pad) > 0.5
    return torch.where(inside, torch.constant_pad_nd(numbers, pad) > 0.5, numbers.amax(padded, keepdim=True) > 0.5 if padded else inside)


def _selected(target: Any, call: Call, masks: Call) -> tuple[Any, Alive]:
    """Alive where both what is looked up and the number that it is looked up by are."""
    value = target(*call[0], **call[1])
    alive = target(_numbers(call[0][0], masks[0][0]), *call[0][1:]) > 0.5
    numbers = masks[0][2].alive
    if numbers is not None:
        alive = alive & numbers.reshape(-1, *[1] * (value.dim() - call[0][1] % value.dim() - 1))
    return zeroed(value, alive), alive


def _differences(target: Any, call: Call, masks: Call) -> tuple[Any, Alive]:
    """Of neighbours along one dimension, all of whose places stay: dead along the others where what it is taken of is."""
    value = target(*call[0], **call[1])
    dim = {**dict(zip(("self", "n", "dim"), call[0], strict=False)), **call[1]}.get("dim", -1)
    mask = masks[0][0].alive
    alive = None if mask is None else mask.any(dim, keepdim=True).expand(value.shape)
    return zeroed(value, alive), alive


def _grid(target: Any, call: Call, masks: Call) -> tuple[Any, Any]:
    """Alive where all the vectors are."""
    value = target(*call[0], **call[1])
    alive = torch.stack(target(_numbers(call[0][0], masks[0][0]), **call[1])).amin(0) > 0.5
    return [zeroed(v, alive) for v in value], [alive] * len(value)


def _placed(target: Any, call: Call, masks: Call) -> tuple[Any, Alive]:
    """Written at places along one dimension: along the others, what is dead in any tensor is dead."""
    value = target(*call[0], **call[1])
    dim, alive = call[0][1], torch.ones_like(call[0][0], dtype=torch.bool)
    for mask in masks[0]:
        if isinstance(mask, _Mask) and mask.alive is not None:
            alive = alive & mask.alive.any(dim, keepdim=True)
    return zeroed(value, alive), alive


def _put(target: Any, call: Call, masks: Call) -> tuple[Any, Alive]:
    """Written at places along some dimensions that lie together: along the others, what is dead in any tensor is dead."""
    value = target(*call[0], **call[1])
    indices = [index for index in call[0][1] if index is not None]
    places = [d for d, index in enumerate(call[0][1]) if index is not None]
    if any(m.alive is not None for m in masks[0][1] if isinstance(m, _Mask)) or places != list(range(places[0], places[-1] + 1)):
        raise UnsupportedError(f"a removal along the indices of {target} cannot be proven")
    behind = value.dim() - places[-1] - 1
    alive = torch.ones_like(call[0][0], dtype=torch.bool)
    for mask, written in ((masks[0][0].alive, len(places)), (masks[0][2].alive, max(index.dim() for index in indices))):
        if mask is not None:
            gone = [d for d in range(mask.dim() - behind - written, mask.dim() - behind) if d >= 0]
            left = mask.any(gone) if gone else mask
            alive = alive & left.reshape(*left.shape[: max(left.dim() - behind, 0)], *[1] * len(places), *left.shape[max(left.dim() - behind, 0) :])
    return zeroed(value, alive), alive


def _joined(numbers: list[torch.Tensor], masks: list[Alive], dim: int) -> list[torch.Tensor]:
    """What the graph fills in (it has no mask) is dead where everything that it is put beside is."""
    beside = [mask for mask in masks if mask is not None]
    live = torch.cat(beside, dim).any(dim, keepdim=True)
    return [n if mask is not None or n.dim() != live.dim() else live.to(n.dtype).expand(n.shape) for n, mask in zip(numbers, masks, strict=True)]


def _window(target: Any, call: Call, masks: Call) -> tuple[Any, Any]:
    """Dead units are dead at every place that the window slides over."""
    value = target(*call[0], **call[1])
    numbers = _numbers(call[0][0], masks[0][0])
    left, whole = (target(x, *call[0][1:], **call[1]) for x in (numbers, torch.ones_like(numbers)))
    if isinstance(value, torch.Tensor):
        alive = _kept(left, whole)
        return zeroed(value, alive), alive
    alive = _kept(left[0], whole[0])
    return [zeroed(v, alive) for v in value], [alive] * len(value)


def _sampled(target: Any, call: Call, masks: Call) -> tuple[Any, Alive]:
    """Alive where the image and the grid are."""
    value = target(*call[0], **call[1])
    image, grid = masks[0][:2]
    alive = torch.ones_like(value, dtype=torch.bool)
    if image.alive is not None:
        alive = alive & image.alive.flatten(2).any(2)[(...,) + (None,) * (value.dim() - 2)]
    if grid.alive is not None:
        alive = alive & grid.alive.any(-1).unsqueeze(1)
    return zeroed(value, alive), alive


def _kept(left: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """Where what is left of a weighted sum of ones is not nothing; where nothing was added up, all is alive."""
    return (left > 0.5 * whole) | (whole <= 0)


def _recurrent(target: Any, call: Call, masks: Call) -> tuple[Any, Any]:
    """A unit whose rows are zero stays zero in every state: it is dead where the last layer's states are not read back."""
    value = target(*call[0], **call[1])
    per_layer, directions = (4 if call[0][3] else 2), (2 if call[0][7] else 1)
    read_back = [call[0][2][i] for i in range(1, len(call[0][2]), per_layer)]
    marks = [masks[0][2][i].alive for i in range(1, len(call[0][2]), per_layer)]
    columns = [torch.ones(w.shape[1], dtype=torch.bool) if m is None else m.any(0) for w, m in zip(read_back, marks, strict=True)]
    last = torch.cat(columns[-directions:])
    states = torch.stack(columns)[:, None]
    alive = [last.expand(value[0].shape), *(states.expand(v.shape) for v in value[1:])]
    return [zeroed(v, a) for v, a in zip(value, alive, strict=True)], alive


def _product(target: Any, call: Call, masks: Call) -> tuple[Any, Alive]:
    """A result is dead if everything that it adds up is."""
    value = target(*call[0], **call[1])
    addend = _ADDENDS.get(target.overloadpacket)
    args = [_numbers(g, m) for g, m in zip(call[0], masks[0], strict=True)]
    whole = [torch.ones_like(a) if isinstance(a, torch.Tensor) else a for a in args]
    extra = None
    if addend is not None and addend < len(args) and isinstance(args[addend], torch.Tensor):
        extra = args[addend] > 0.5
        if addend == 2:
            args[2] = whole[2] = None
            extra = extra if target is aten.linear.default else extra.view(-1, *[1] * (value.dim() - 2))
        else:
            args[0], whole[0] = torch.zeros_like(args[0]), torch.zeros_like(whole[0])
    if target is aten.einsum.default:
        whole[1] = [torch.ones_like(a) for a in args[1]]
    alive = (target(*args, **call[1]) > 0.5) | (target(*whole, **call[1]) < 0.5)
    alive = alive if extra is None else alive & extra
    return zeroed(value, alive), alive


def _statistic(target: Any, call: Call, masks: Call) -> tuple[Any, Any]:
    """Taken over what is alive: see ``masked_statistics``."""
    names = [a.name for a in target._schema.arguments]
    defaults = {a.name: a.default_value for a in target._schema.arguments}
    given = defaults | dict(zip(names, call[0], strict=False)) | call[1]
    marks = dict(zip(names, masks[0], strict=False)) | masks[1]
    alive = {name: mask.alive for name, mask in marks.items() if isinstance(mask, _Mask) and mask.alive is not None}
    return statistics.TABLE[target](target, given, alive)


Handler = Callable[[Any, Call, Call], tuple[Any, Any]]
_HANDLERS: tuple[tuple[Any, Handler], ...] = (
    (_ELEMENTWISE, _elementwise),
    (_OF_FIRST, _of_first),
    (_packets("new_zeros new_ones new_full new_empty"), _new),
    ({aten.index_select}, _selected),
    ({aten.meshgrid}, _grid),
    ({aten.diff}, _differences),
    (_MOVES, _move),
    ({aten.scatter, aten.scatter_add, aten.scatter_reduce}, _placed),
    ({aten.index_put}, _put),
    (_WINDOWS, _window),
    (_packets("grid_sampler grid_sampler_2d"), _sampled),
    (_PRODUCTS, _product),
    (_RECURRENT, _recurrent),
    (statistics.TABLE, _statistic),
)
