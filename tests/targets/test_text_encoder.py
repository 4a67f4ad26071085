"""A sentence encoder of MiniLM's shape: embeddings of the INT8 files point where those of the float model do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edgesmith import Model, targets
from edgesmith.compiler.accuracy import model_outputs_of, outputs_of
from edgesmith.compiler.data import PassData, Split
from edgesmith.compiler.forms import FLOAT, forms
from edgesmith.compiler.passbase import PassContext
from edgesmith.compiler.profile.session import open_session
from edgesmith.compiler.testing import randomise_norms
from edgesmith.passes.quantize.equalise import Equalise
from edgesmith.passes.quantize.quantize import Quantize

pytestmark = pytest.mark.slow

LEAST_COSINE = 0.998
TOKENS, WORDS = 32, 2000


class Encoder(nn.Module):
    """Six layers of 384, the mean over the tokens that are not padding (Reimers and Gurevych, Sentence-BERT, EMNLP 2019)."""

    def __init__(self) -> None:
        from transformers import BertConfig, BertModel

        super().__init__()
        config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, vocab_size=WORDS)
        self.bert = BertModel(config, add_pooling_layer=False)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        states = self.bert(input_ids=ids, attention_mask=mask).last_hidden_state
        weight = mask.unsqueeze(-1).to(states.dtype)
        out: torch.Tensor = (states * weight).sum(1) / weight.sum(1)
        return out


def sentences(count: int, seed: int) -> Split:
    rng = np.random.default_rng(seed)
    mask = (np.arange(TOKENS) < rng.integers(6, TOKENS + 1, count)[:, None]).astype(np.int64)
    return Split((rng.integers(0, WORDS, (count, TOKENS)), mask), np.zeros(count, np.int64))


@pytest.fixture(scope="module")
def encoder() -> tuple[Model, Model, Split]:
    """The plan, the float model, and sentences that calibration did not see."""
    torch.manual_seed(0)
    train, test = sentences(64, 0), sentences(64, 1)
    inputs = tuple(torch.from_numpy(x[:2]) for x in train.inputs)
    ctx = PassContext(data=PassData(train, train))
    twin = Equalise().run(Model.from_module(randomise_norms(Encoder()).eval(), inputs), ctx).model
    return Quantize().run(twin, ctx).model, twin, test


@pytest.mark.parametrize("target", targets)
def test_embeddings_keep_their_direction(encoder: tuple[Model, Model, Split], target: str, tmp_path: Path) -> None:
    model, twin, test = encoder
    (exact,) = model_outputs_of(twin, test)
    least = {}
    for name, form in forms(model, twin).items():
        artifact = targets[target].lower(form, tmp_path, name)
        with open_session(artifact.path, targets[target].runner, extra=targets[target].extra) as session:
            (found,) = outputs_of(session, test)
        norms = np.linalg.norm(found, axis=1) * np.linalg.norm(exact, axis=1)
        least[name] = float(((found * exact).sum(1) / norms).min())
    assert least[FLOAT] > 0.999999
    assert len(least) > 1 and min(least.values()) >= LEAST_COSINE, least
