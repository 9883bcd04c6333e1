# SPDX-License-Identifier: Apache-2.0
"""Language models of many families: held as they are or refused by name; the picture token is never an answer."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, GenerationConfig

import vlm
from aced_sdk.errors import ModelError, UnsupportedError
from vlm.data.pictures import Features
from vlm.data.rows import collate, make_rows
from vlm.model.adapters import prepare
from vlm.model.loss import AnswerLoss

sys.path.insert(0, str(Path(__file__).parent))
from test_vlm import language, samples, student
from test_vlm_adapt import mixed, own_loss, packed_loss

PICTURES = [sample.images[0] for sample in samples(1)[::2]]
QUESTIONS = ["what is it ? what is it ? what colour ?", "what ?", "is this red ?"]
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


@pytest.fixture(scope="module")
def eyes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return student(tmp_path_factory.mktemp("eyes") / "student")


# -- tied under another name, or of another kind ----------------------------------------------------------------------

HELD: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neo": {"attention_types": [[["global"], 2]]},
    "gpt_neox": {},
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 64, "layerdrop": 0.9},
    "falcon": {},
    "mixtral": EXPERTS,
}


@pytest.mark.parametrize("family", HELD)
def test_families_are_learned_saved_and_asked_as_transformers_does(eyes: Path, tmp_path: Path, family: str) -> None:
    llava, processor = vlm.build(eyes, language(tmp_path / "words", family=family, **HELD[family]))
    with torch.no_grad():
        ours, theirs = packed_loss(llava, processor, mixed()), own_loss(llava, processor, mixed())
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)
    plan = vlm.TuneConfig(stages=[vlm.Adapt(steps=2, batch_size=4, lora=None)])
    tuned = vlm.tune(llava, processor, samples(1), plan, directory=tmp_path / "run").model
    folder = vlm.save(tuned, processor, tmp_path / "saved")
    answers = vlm.answer(tuned, processor, PICTURES, QUESTIONS, 4)
    assert answers == [vlm.answer(tuned, processor, [p], [q], 4)[0] for p, q in zip(PICTURES, QUESTIONS, strict=True)]
    plain = AutoModelForImageTextToText.from_pretrained(folder)
    assert vlm.answer(plain, processor, PICTURES, QUESTIONS, 4) == answers
    for name, value in llava.state_dict().items():
        assert torch.equal(plain.state_dict()[name], value), name


REFUSED: dict[str, dict[str, Any]] = {
    "bloom": {},
    "mpt": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "falcon": {"alibi": True},
    "falcon_h1": {},
    "minimax": EXPERTS,
    "mamba": {},
    "gptj": {},
    "bert": {"is_decoder": True},
}


@pytest.mark.parametrize("family", REFUSED)
def test_families_that_would_be_changed_are_refused_by_name(eyes: Path, tmp_path: Path, family: str) -> None:
    """Their positions or states run over the conversations that share a picture, or their heads have a bias."""
    with pytest.raises(UnsupportedError, match=rf"a '{family}', and LLaVA has no place for .*field: language"):
        vlm.build(eyes, language(tmp_path / "words", family=family, **REFUSED[family]))


# -- the picture token ------------------------------------------------------------------------------------------------


def all_negative(folder: Path) -> Path:
    """A GPT-2 that gives every token a negative logit, whatever it reads."""
    language(folder, family="gpt2", tie_word_embeddings=False)
    lm = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        lm.transformer.ln_f.weight.zero_()
        lm.transformer.ln_f.bias.fill_(1.0)
        lm.lm_head.weight.copy_(-torch.rand(lm.lm_head.weight.shape) - 0.1)
    lm.save_pretrained(folder)
    return folder


def test_the_picture_token_is_never_an_answer(eyes: Path, tmp_path: Path) -> None:
    llava, processor = vlm.build(eyes, all_negative(tmp_path / "words"))
    image = llava.config.image_token_id
    with torch.no_grad():
        logits = llava(input_ids=torch.tensor([[3, 4, 5]])).logits[0, -1]
        assert (logits < 0).all()
        assert logits.argmax() != image
        hidden = 10 * torch.randn(1000, 32)
        assert not (llava.lm_head(hidden).argmax(-1) == image).any()
    # even where its row has been trained to win
    with torch.no_grad():
        llava.lm_head.weight[image] = 1.0
    folder = vlm.save(llava, processor, tmp_path / "saved")
    assert GenerationConfig.from_pretrained(folder).suppress_tokens == [image]
    plain = AutoModelForImageTextToText.from_pretrained(folder)
    ids = torch.tensor([[3, 4, 5]])
    assert plain(ids).logits[0, -1].argmax() == image
    assert image not in plain.generate(ids, max_new_tokens=4)[0].tolist()
    plain.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0)  # of a folder that says nothing
    answers = vlm.answer(plain, processor, PICTURES, QUESTIONS, 4)
    assert answers == vlm.answer(llava, processor, PICTURES, QUESTIONS, 4)
    assert not any("<image>" in text for text in answers)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("known", [True, False])
def test_tokens_without_a_row_get_the_mean_one(eyes: Path, tmp_path: Path, tied: bool, known: bool) -> None:
    """A tokenizer with more tokens than the model has rows, with and without a picture token of its own."""
    words = language(tmp_path / "words", tie_word_embeddings=tied)
    tokenizer = AutoTokenizer.from_pretrained(words)
    rows = AutoModelForCausalLM.from_pretrained(words).get_output_embeddings().weight.detach()
    tokenizer.add_tokens((["<image>"] if known else []) + ["<one>", "<two>"], special_tokens=True)
    tokenizer.save_pretrained(words)
    llava, processor = vlm.build(eyes, words)
    head = llava.lm_head.weight
    assert len(head) == len(rows) + 3
    assert torch.equal(head[: len(rows)], rows)
    torch.testing.assert_close(head[len(rows) :], rows.mean(0).expand(3, -1))
    assert (head is llava.get_input_embeddings().weight) is tied
    assert llava.config.image_token_id == processor.tokenizer.convert_tokens_to_ids("<image>")


def test_a_picture_token_of_the_language_model_is_not_generated_either(eyes: Path, tmp_path: Path) -> None:
    words = language(tmp_path / "words")
    tokens = json.loads((words / "tokenizer.json").read_text())
    tokens["model"]["vocab"]["<image>"] = tokens["model"]["vocab"].pop("picture")
    (words / "tokenizer.json").write_text(json.dumps(tokens))
    rows = AutoModelForCausalLM.from_pretrained(words).get_output_embeddings().weight.detach()
    llava, _ = vlm.build(eyes, words)
    image = llava.config.image_token_id
    others = torch.arange(len(rows)) != image
    assert image < len(rows) == len(llava.lm_head.weight)
    torch.testing.assert_close(llava.lm_head.weight[image], rows[others].mean(0))
    assert torch.equal(llava.lm_head.weight[others], rows[others])


# -- embeddings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "value", "good"), [(3, 0.0, True), (99, 0.0, False), (1, float("nan"), False)])
def test_word_embeddings_with_rows_of_zeros(eyes: Path, tmp_path: Path, rows: int, value: float, good: bool) -> None:
    words = language(tmp_path / "words")
    lm = AutoModelForCausalLM.from_pretrained(words)
    with torch.no_grad():
        lm.get_input_embeddings().weight[:rows] = value
    lm.save_pretrained(words)
    if not good:
        with pytest.raises(
            ModelError, match=r"(embeddings are all zero, or not all|has values that are not) finite.*field: language"
        ):
            vlm.build(eyes, words)
        return
    llava, _ = vlm.build(eyes, words)
    connector = llava.model.multi_modal_projector
    assert all(value.isfinite().all() for value in connector.state_dict().values())
    size = float(connector(torch.randn(64, 32)).pow(2).mean().sqrt())
    assert size == pytest.approx(float(llava.get_input_embeddings().weight.pow(2).mean().sqrt()), rel=0.2)


# -- ZeRO stage 3 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "mixtral"])
@pytest.mark.parametrize("kind", ["mlp", "pixel_shuffle"])
def test_every_trained_parameter_takes_part_in_every_backward(
    eyes: Path, tmp_path: Path, family: str, kind: Any
) -> None:
    """Stage 3 clears a parameter's gradient in a step's first backward: one that comes in later is added to old values.

    Rows without pictures, without words to learn, and the batch of a process that has no rows.
    """
    projector = vlm.Projector(kind=kind, factor=3)
    llava, processor = vlm.build(eyes, language(tmp_path / "words", family=family, **HELD.get(family, {})), projector)
    stages = [vlm.Align(steps=1), vlm.Adapt(steps=1, lora=None)]
    if family in ("llama", "mixtral"):
        stages.append(vlm.Adapt(steps=1, lora=vlm.Lora(rank=2, dora=family == "llama", layers=("q", "v"))))
    for stage in stages:
        prepare(llava, stage, 0)
        llava.train()
        module = AnswerLoss(llava)
        trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
        assert trained
        for data in ([], mixed()[:1], mixed()[2:3], mixed()):
            rows, pictures = make_rows(data, processor, llava.config.image_seq_length, 4, 128) if data else ([], [])
            batch = collate(rows, 0)
            features = Features(llava, processor, pictures, 1).of(batch.pictures)
            module.zero_grad(set_to_none=True)
            module(features, batch.ids, batch.targets, batch.positions, batch.segments, batch.owners).backward()
            missing = {name for name in trained if module.get_parameter(name).grad is None}
            assert missing == set(), (stage, len(data))
