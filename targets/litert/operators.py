"""What litert-torch 0.10 lowers: read once from its own registry, so that asking needs no import of it.

A slow test compares both tables with the installed converter.
"""

from __future__ import annotations

LOWERED = frozenset(
    f"aten.{name}"
    for name in """
    _adaptive_avg_pool2d.default _adaptive_avg_pool3d.default _cdist_forward.default _fft_r2c.default _log_softmax.default
    _native_batch_norm_legit_no_training.default _pdist_forward.default _softmax.default _to_copy.default _unsafe_index.Tensor
    _unsafe_index.Tensor_hacked_twin _unsafe_view.default abs.default acos.default acosh.default add.Scalar add.Tensor addbmm.default addmm.default
    addmm.dtype addmv.default alias.default amax.default amin.default any.default any.dim any.dims arange.default arange.start arange.start_step
    argmax.default argmin.default as_strided.default as_strided_copy.default asin.default asinh.default atan.default atan2.default atanh.default
    avg_pool2d.default avg_pool3d.default bitwise_and.Scalar bitwise_and.Scalar_Tensor bitwise_and.Tensor bitwise_not.default bitwise_or.Scalar
    bitwise_or.Scalar_Tensor bitwise_or.Tensor bitwise_xor.Scalar bitwise_xor.Scalar_Tensor bitwise_xor.Tensor bmm.default bmm.dtype cat.default
    ceil.default clamp.Tensor clamp.default clone.default constant_pad_nd.default convolution.default copy.Dict_Tensor copy.default cos.default
    cosh.default cumsum.default detach.default diagonal.default div.Scalar div.Scalar_mode div.Tensor div.Tensor_mode dot.default einsum.default
    elu.default embedding.default empty.memory_format eq.Scalar eq.Tensor erf.default exp.default expand.default expand_copy.default expm1.default
    fill.Scalar fill.Tensor flip.default floor.default fmod.Scalar fmod.Tensor full.default full_like.default gather.default ge.Scalar ge.Tensor
    gelu.default glu.default gt.Scalar gt.Tensor hann_window.default hann_window.periodic hardtanh.default index.Tensor index.Tensor_hacked_twin
    index_copy.default index_put.default index_put.hacked_twin index_select.default isinf.default isnan.default le.Scalar le.Tensor leaky_relu.default
    lift_fresh_copy.default linalg_vector_norm.default log.default log10.default log1p.default log2.default logical_and.default logical_not.default
    logical_or.default logical_xor.default lt.Scalar lt.Tensor max.default max.dim max.other max_pool2d_with_indices.default
    max_pool2d_with_indices_backward.default max_pool3d_with_indices.default maximum.default mean.default mean.dim min.default min.dim min.other
    minimum.default mm.default mm.dtype mul.Scalar mul.Tensor native_batch_norm.default native_layer_norm.default native_layer_norm_backward.default
    ne.Scalar ne.Tensor neg.default nonzero.default outer.default permute.default permute_copy.default pow.Scalar pow.Tensor_Scalar pow.Tensor_Tensor
    prod.default prod.dim_int rand.default rand.generator randn.default randn.generator reciprocal.default reflection_pad1d.default relu.default
    remainder.Scalar remainder.Scalar_Tensor remainder.Tensor repeat.default reshape.default roll.default round.decimals round.default rsqrt.default
    scalar_tensor.default scatter.src scatter.value scatter_add.default scatter_reduce.two select.int select_copy.int select_scatter.default
    sigmoid.default sign.default silu.default sin.default sinh.default slice.Tensor slice_copy.Tensor slice_scatter.default sort.default sort.stable
    split.Tensor split.default split.sizes split_copy.Tensor split_with_sizes.default sqrt.default squeeze.default squeeze.dim squeeze.dims
    squeeze_copy.default squeeze_copy.dim squeeze_copy.dims stack.default sub.Scalar sub.Tensor sum.default sum.dim_IntList t.default tan.default
    tanh.default tensor_split.sections to.device to.dtype topk.default transpose.int transpose_copy.int triu.default true_divide.Scalar
    true_divide.Tensor trunc.default unbind.int unbind_copy.int unfold.default unsqueeze.default unsqueeze_copy.default var.correction
    var_mean.correction view.default view.dtype view_as_complex.default view_as_real.default view_copy.default view_copy.dtype where.ScalarOther
    where.ScalarSelf where.self
""".split()  # noqa: SIM905
) | {"prims.broadcast_in_dim.default", "prims.var.default"}
"""Operators that the converter's registry has a lowering for (those that return tensors and write no output argument)."""

ALSO_DECOMPOSED = (
    "aten._adaptive_avg_pool2d.default",
    "aten._native_batch_norm_legit.no_stats",
    "aten._native_batch_norm_legit_functional.default",
    "aten.addmm.default",
    "aten.grid_sampler_2d.default",
    "aten.native_dropout.default",
    "aten.native_group_norm.default",
    "aten.upsample_bilinear2d.vec",
    "aten.upsample_nearest2d.vec",
)
"""Operators that the converter decomposes beyond ``torch.export.default_decompositions()``."""

NOT_DECOMPOSED = ("aten.einsum.default", "aten.roll.default")
"""Operators that the default table decomposes and the converter does not."""

REPLACED = frozenset(
    {
        "aten._prelu_kernel.default",
        "aten._safe_softmax.default",
        "aten.alias.default",
        "aten.conv1d.default",
        "aten.detach.default",
        "aten.linear.default",
        "aten.pixel_shuffle.default",
        "aten.pixel_unshuffle.default",
        "aten.upsample_nearest2d.default",
    }
)
"""Operators for which the converter has a decomposition of its own, into operators of ``LOWERED``."""
