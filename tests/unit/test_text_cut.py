# SPDX-License-Identifier: Apache-2.0
"""Texts cut to the longest of their batch: no embedding and no gradient changes, and it is done only where none can."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import ARCHITECTURE
from torch import Tensor

from aced_sdk import towers
from aced_sdk.config import Student
from aced_sdk.towers import DualEncoder
from aced_sdk.towers.text import cut, lengths

TEXTS = ["a red boat", "", "two small stars over a very old and quite crooked tree in the garden of a house"]
TEXT: dict[str, Any] = ARCHITECTURE["text_cfg"] | {"context_length": 77}
KINDS: dict[str, dict[str, Any]] = {
    "clip": {"text_cfg": TEXT},
    "custom_text": {"text_cfg": TEXT, "custom_text": True},
    "eos": {"text_cfg": TEXT | {"pool_type": "eos", "eos_id": 49407}, "custom_text": True},
    "not_causal": {"text_cfg": TEXT | {"no_causal_mask": True}, "custom_text": True},
    "last": {"text_cfg": TEXT | {"pool_type": "last"}, "custom_text": True},
}


def made(kind: str) -> DualEncoder:
    return towers.build(Student(architecture=ARCHITECTURE | KINDS[kind]), 0).double()


def gradients(own: DualEncoder) -> dict[str, Tensor]:
    found = {name: value.grad for name, value in own.model.named_parameters() if value.grad is not None}
    own.zero_grad()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_and_gradients_are_those_of_the_whole_context(kind: str) -> None:
    own = made(kind)
    tokens, images = own.tokenize(TEXTS), torch.rand(3, 3, *own.preprocess_config.size, dtype=torch.float64)
    weights = torch.randn(2, 3, own.embedding_dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    whole = own.model(images, tokens)
    (whole["text_features"] * weights[0] + whole["image_features"] * weights[1]).sum().backward()
    want = gradients(own)
    shorter = own._towers(images, tokens)
    (shorter["text_features"] * weights[0] + shorter["image_features"] * weights[1]).sum().backward()
    got = gradients(own)

    torch.testing.assert_close(shorter["text_features"], whole["text_features"], atol=1e-12, rtol=0)
    torch.testing.assert_close(own.encode_text(TEXTS), whole["text_features"].float(), atol=1e-6, rtol=0)
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-12, rtol=0, msg=name)


@pytest.mark.parametrize(
    ("kind", "width"), [("clip", 24), ("custom_text", 24), ("eos", 24), ("not_causal", 77), ("last", 77)]
)
def test_only_texts_whose_end_is_what_is_pooled_are_cut(kind: str, width: int) -> None:
    own = made(kind)
    tokens = own.tokenize(TEXTS)
    short, tables = cut(own.model, tokens, int(lengths(own.model, tokens).max()))
    assert short.shape == (3, width)
    assert bool(tables) == (width < 77)
    assert torch.equal(short, tokens[:, :width])


def test_a_text_that_fills_the_context_is_left_whole() -> None:
    own = made("clip")
    tokens = own.tokenize(["star " * 100])
    assert int(lengths(own.model, tokens)) == 77
    assert cut(own.model, tokens, 77) == (tokens, {})


def test_a_frozen_table_stays_as_it_is() -> None:
    own = made("clip")
    table: Any = own.model.positional_embedding
    before = table.detach().clone()
    own.encode_text(TEXTS)
    assert table.shape == (77, TEXT["width"])
    assert torch.equal(table, before)
