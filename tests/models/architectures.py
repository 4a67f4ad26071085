"""Architectures that nobody here wrote, small, built from configurations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from edgesmith.compiler.model import Model
from edgesmith.compiler.testing import randomise_weights

transformers = pytest.importorskip("transformers")

_WIDTHS = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
_TEXT = {"vocab_size": 100, "max_position_embeddings": 32, **_WIDTHS}
_DECODER = {"vocab_size": 100, "max_position_embeddings": 64, "num_key_value_heads": 2, "use_cache": False, **_WIDTHS}
_STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_labels": 5}
_HEADED = {"num_attention_heads": [1, 2, 3, 4], "mlp_ratios": [2, 2, 2, 2], **_STAGES}
_SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 12, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "num_labels": 5}
_SPEECH = {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, **_WIDTHS}
_PATCHES = {"image_size": 32, "patch_size": 8, "num_labels": 5, **_WIDTHS}


class Wrapped(nn.Module):
    """Positional inputs under the names that the model gives them; its first tensor is the output."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: torch.Tensor) -> Any:
        out = self.model(**dict(zip(self.names, inputs, strict=True)))
        return next(out[key] for key in ("logits", "last_hidden_state") if key in out)


def image(size: int, count: int = 2) -> tuple[torch.Tensor, ...]:
    return (torch.randn(count, 3, size, size),)


def text(size: int, count: int = 2) -> tuple[torch.Tensor, ...]:
    return torch.randint(1, 90, (count, size)), torch.ones(count, size, dtype=torch.long)


def ids(size: int, count: int = 2) -> tuple[torch.Tensor, ...]:
    return (torch.randint(1, 90, (count, size)),)


def wave(size: int, count: int = 2) -> tuple[torch.Tensor, ...]:
    return (torch.randn(count, size),)


def spectrum(size: int, count: int = 2) -> tuple[torch.Tensor, ...]:
    """Time, then frequency."""
    return (torch.randn(count, size, 16),)


def mel(size: int, count: int = 2) -> tuple[torch.Tensor, ...]:
    """Frequency, then time."""
    return (torch.randn(count, 16, size),)


Maker = Callable[..., tuple[torch.Tensor, ...]]
_NAMES: dict[Maker, tuple[str, ...]] = {
    image: ("pixel_values",),
    text: ("input_ids", "attention_mask"),
    ids: ("input_ids",),
    wave: ("input_values",),
    spectrum: ("input_values",),
    mel: ("input_features",),
}
ALWAYS: dict[str, tuple[str, dict[str, Any], Maker, int]] = {
    "ViTForImageClassification": ("ViTConfig", _PATCHES, image, 32),
    "ResNetForImageClassification": ("ResNetConfig", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "num_labels": 5}, image, 32),
    "MobileNetV2ForImageClassification": ("MobileNetV2Config", {"image_size": 32, "depth_multiplier": 0.35, "num_labels": 5}, image, 32),
    "BertForSequenceClassification": ("BertConfig", _TEXT, text, 8),
    "LlamaForCausalLM": ("LlamaConfig", {**_DECODER, "tie_word_embeddings": True}, ids, 8),
}
SLOW: dict[str, tuple[str, dict[str, Any], Maker, int]] = {
    "DeiTForImageClassification": ("DeiTConfig", _PATCHES, image, 32),
    "BeitForImageClassification": ("BeitConfig", {**_PATCHES, "use_relative_position_bias": True}, image, 32),
    "SwinForImageClassification": ("SwinConfig", _SWIN, image, 32),
    "Swinv2ForImageClassification": ("Swinv2Config", _SWIN, image, 32),
    "ConvNextForImageClassification": ("ConvNextConfig", _STAGES, image, 64),
    "ConvNextV2ForImageClassification": ("ConvNextV2Config", _STAGES, image, 64),
    "MobileViTForImageClassification": (
        "MobileViTConfig",
        {"image_size": 64, "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 12, 16, 16, 16, 32], "num_labels": 5},
        image,
        64,
    ),
    "MobileViTV2ForImageClassification": ("MobileViTV2Config", {"image_size": 64, "width_multiplier": 0.25, "num_labels": 5}, image, 64),
    "RegNetForImageClassification": ("RegNetConfig", {**_STAGES, "embedding_size": 8, "groups_width": 4}, image, 64),
    "EfficientNetForImageClassification": (
        "EfficientNetConfig",
        {"image_size": 64, "width_coefficient": 0.25, "depth_coefficient": 0.4, "hidden_dim": 320, "num_labels": 5},
        image,
        64,
    ),
    "MobileNetV1ForImageClassification": ("MobileNetV1Config", {"image_size": 64, "depth_multiplier": 0.25, "num_labels": 5}, image, 64),
    "LevitForImageClassification": (
        "LevitConfig",
        {
            "image_size": 64,
            "hidden_sizes": [16, 24, 32],
            "num_attention_heads": [2, 3, 4],
            "depths": [1, 1, 1],
            "key_dim": [8, 8, 8],
            "down_ops": [["Subsample", 8, 2, 4, 2, 2], ["Subsample", 8, 3, 4, 2, 2], [""]],
            "num_labels": 5,
        },
        image,
        64,
    ),
    "PoolFormerForImageClassification": ("PoolFormerConfig", _STAGES, image, 64),
    "PvtForImageClassification": ("PvtConfig", {**_HEADED, "image_size": 64}, image, 64),
    "PvtV2ForImageClassification": ("PvtV2Config", {**_HEADED, "image_size": 64}, image, 64),
    "SegformerForSemanticSegmentation": ("SegformerConfig", {**_HEADED, "decoder_hidden_size": 16}, image, 64),
    "Dinov2WithRegistersForImageClassification": (
        "Dinov2WithRegistersConfig",
        {"image_size": 28, "patch_size": 7, "num_labels": 5, "mlp_ratio": 2, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4},
        image,
        28,
    ),
    "HieraForImageClassification": (
        "HieraConfig",
        {"image_size": [64, 64], "embed_dim": 8, "num_heads": [1, 2, 4, 8], "depths": [1, 1, 2, 1], "num_labels": 5},
        image,
        64,
    ),
    "FocalNetForImageClassification": (
        "FocalNetConfig",
        {
            "image_size": 32,
            "patch_size": 2,
            "embed_dim": 12,
            "hidden_sizes": [12, 24],
            "depths": [1, 1],
            "focal_levels": [2, 2],
            "focal_windows": [3, 3],
            "num_labels": 5,
        },
        image,
        32,
    ),
    "BitForImageClassification": ("BitConfig", {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 2], "num_groups": 4, "num_labels": 5}, image, 64),
    "SwiftFormerForImageClassification": (
        "SwiftFormerConfig",
        {"image_size": 64, "depths": [1, 1, 1, 1], "embed_dims": [8, 16, 24, 32], "num_labels": 5},
        image,
        64,
    ),
    "DistilBertForSequenceClassification": ("DistilBertConfig", {"vocab_size": 100, "dim": 24, "n_layers": 2, "n_heads": 4, "hidden_dim": 40}, text, 8),
    "RobertaForSequenceClassification": ("RobertaConfig", _TEXT, text, 8),
    "ElectraForSequenceClassification": ("ElectraConfig", {**_TEXT, "embedding_size": 16}, text, 8),
    "AlbertForSequenceClassification": ("AlbertConfig", {**_TEXT, "embedding_size": 16}, text, 8),
    "DebertaV2ForSequenceClassification": (
        "DebertaV2Config",
        {**_TEXT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 4},
        text,
        8,
    ),
    "MobileBertForSequenceClassification": (
        "MobileBertConfig",
        {**_TEXT, "embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16},
        text,
        8,
    ),
    "SqueezeBertForSequenceClassification": (
        "SqueezeBertConfig",
        {**_TEXT, "embedding_size": 24, "q_groups": 2, "k_groups": 2, "v_groups": 2, "intermediate_groups": 2, "output_groups": 2},
        text,
        8,
    ),
    "MPNetForSequenceClassification": ("MPNetConfig", _TEXT, text, 8),
    "ModernBertForSequenceClassification": (
        "ModernBertConfig",
        {**_TEXT, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1, "cls_token_id": 1, "sep_token_id": 1, "local_attention": 4},
        text,
        8,
    ),
    "T5EncoderModel": (
        "T5Config",
        {"vocab_size": 100, "d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": 2, "num_heads": 4, "feed_forward_proj": "gated-gelu"},
        text,
        8,
    ),
    "Qwen2ForCausalLM": ("Qwen2Config", _DECODER, ids, 8),
    "Qwen3ForCausalLM": ("Qwen3Config", {**_DECODER, "head_dim": 8}, ids, 8),
    "GemmaForCausalLM": ("GemmaConfig", {**_DECODER, "head_dim": 8}, ids, 8),
    "GPT2LMHeadModel": ("GPT2Config", {"vocab_size": 100, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 32, "use_cache": False}, ids, 8),
    "MambaForCausalLM": (
        "MambaConfig",
        {"vocab_size": 100, "hidden_size": 24, "num_hidden_layers": 2, "state_size": 4, "time_step_rank": 4, "use_cache": False},
        ids,
        8,
    ),
    "Wav2Vec2ForSequenceClassification": ("Wav2Vec2Config", {**_SPEECH, "classifier_proj_size": 8}, wave, 400),
    "HubertForSequenceClassification": ("HubertConfig", {**_SPEECH, "classifier_proj_size": 8}, wave, 400),
    "Dinov2ForImageClassification": ("Dinov2Config", _PATCHES, image, 32),
    "CvtForImageClassification": (
        "CvtConfig",
        {"embed_dim": [8, 16, 24], "num_heads": [1, 2, 4], "depth": [1, 2, 3], "num_labels": 5},
        image,
        64,
    ),
    "ASTForAudioClassification": ("ASTConfig", {**_WIDTHS, "max_length": 32, "num_mel_bins": 16, "patch_size": 8, "num_labels": 5}, spectrum, 32),
    "WhisperForAudioClassification": (
        "WhisperConfig",
        {
            "num_mel_bins": 16,
            "d_model": 24,
            "encoder_layers": 2,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 40,
            "decoder_layers": 1,
            "decoder_attention_heads": 4,
            "decoder_ffn_dim": 40,
            "max_source_positions": 16,
            "vocab_size": 100,
            "classifier_proj_size": 8,
            "num_labels": 5,
        },
        mel,
        32,
    ),
    "BambaForCausalLM": (
        "BambaConfig",
        {**_DECODER, "attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 12, "mamba_d_state": 6, "mamba_n_groups": 2, "mamba_chunk_size": 4},
        ids,
        8,
    ),
}

EXPERTS: dict[str, tuple[str, dict[str, Any], Maker, int]] = {
    "MixtralForCausalLM": ("MixtralConfig", {**_DECODER, "num_local_experts": 4, "num_experts_per_tok": 2}, ids, 8),
}
"""Mixtures of experts, whose sorting by expert not every runtime knows."""


def module_of(name: str) -> nn.Module:
    """The architecture ``name``, small, with random weights."""
    config, options, maker, _ = (ALWAYS | SLOW | EXPERTS)[name]
    torch.manual_seed(0)
    return randomise_weights(Wrapped(getattr(transformers, name)(getattr(transformers, config)(**options)), _NAMES[maker]))


def built(name: str) -> Model:
    """The same, captured."""
    return Model.from_module(module_of(name), samples(name, 2))


def samples(name: str, count: int) -> tuple[torch.Tensor, ...]:
    """Random inputs of the architecture ``name``."""
    _, _, maker, size = (ALWAYS | SLOW | EXPERTS)[name]
    return maker(size, count)
