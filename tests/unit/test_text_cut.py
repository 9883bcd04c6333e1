# SPDX-License-Identifier: Apache-2.0
"""Texts cut to the longest of their batch: no embedding and no gradient changes, and it is done only where none can."""

from __future__ import annotations

import threading
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
    shorter = own._towers(own.model, images, tokens)
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


@pytest.mark.parametrize("training", [False, True])
def test_threads_and_interrupts_leave_the_model_as_it_was(training: bool) -> None:
    own = made("clip").train(training)
    expected = {text: own.encode_text([text]) for text in TEXTS}
    modes = [module.training for module in own.modules()]
    wrong: list[str] = []

    def encode() -> None:
        for text in TEXTS * 20:
            try:
                if not torch.allclose(own.encode_text([text]), expected[text], atol=1e-6):
                    wrong.append(text)
            except Exception as error:  # noqa: BLE001  the main thread looks at them
                wrong.append(repr(error))

    threads = [threading.Thread(target=encode) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    handle = own.model.transformer.register_forward_pre_hook(interrupt)  # type: ignore[union-attr]
    with pytest.raises(KeyboardInterrupt):
        own.encode_text(TEXTS[:1])
    handle.remove()
    assert own.model.positional_embedding.shape[0] == own.model.attn_mask.shape[0] == 77  # type: ignore[union-attr]
    assert [module.training for module in own.modules()] == modes
    assert own.model.state_dict().keys() == made("clip").model.state_dict().keys()


def test_no_dropout_and_no_batch_statistics_in_a_model_that_is_in_training() -> None:
    from torch import nn

    from aced_sdk.towers.replica import evaluating

    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.5)))
    x = torch.randn(8, 4)
    expected = model.eval()(x)
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.testing.assert_close(evaluating(model)(x), expected)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("pad", "tokens", "expected"),
    [
        (1, [[5, 6, 7, 1, 1, 1]], [3]),
        (1, [[1, 1, 1, 5, 6, 7]], [6]),  # padded on the left
        (1, [[5, 1, 6, 7, 1, 1]], [4]),  # the pad token is inside the text
        (1, [[1, 1, 1, 1, 1, 1]], [1]),
        (None, [[5, 6, 7, 0, 0, 0]], [6]),  # no pad token
    ],
)
def test_padding_is_cut_only_where_it_is_a_tail(pad: int | None, tokens: list[list[int]], expected: list[int]) -> None:
    from types import SimpleNamespace

    from open_clip.hf_model import HFTextEncoder
    from torch import nn

    tower = HFTextEncoder.__new__(HFTextEncoder)
    nn.Module.__init__(tower)
    tower.config = SimpleNamespace(pad_token_id=pad)
    model = nn.Module()
    model.text = tower
    assert lengths(model, torch.tensor(tokens)).tolist() == expected
