# SPDX-License-Identifier: Apache-2.0
"""Answers word by word, and prompts of the very tokens that were trained on. The models have random weights."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from PIL import Image
from tiny import encoder
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

import vlm
from aced_sdk.errors import DataError
from aced_sdk.files import printable
from vlm.cli import register
from vlm.data.rows import encode
from vlm.generation import _inputs, _prompt, _Words, asked

MARKS = ["<s>", "<|im_start|>", "<|im_end|>"]
PICTURE = Image.new("RGB", (16, 16), (200, 20, 20))


def language(folder: Path, begins: bool) -> Path:
    """A Llama of one layer whose tokens are bytes; its tokenizer puts `<s>` first, or not."""
    raw = Tokenizer(
        models.BPE(vocab={one: n for n, one in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(mark, special=True) for mark in MARKS])
    if begins:
        raw.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", raw.token_to_id("<s>"))]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="<|im_end|>")
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    lm = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=256, **sizes))
    torch.nn.init.normal_(lm.lm_head.weight, std=3.0)
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return vlm.build(encoder(), language(tmp_path_factory.mktemp("words"), begins=False))


# -- the prompt ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("begins", "written"), [(False, False), (True, False), (True, True), (False, True)])
def test_a_question_has_the_tokens_it_was_trained_with(tmp_path: Path, begins: bool, written: bool) -> None:
    llava, processor = vlm.build(encoder(), language(tmp_path, begins))
    if written:
        processor.chat_template = "{{ bos_token }}" + processor.chat_template
    trained, targets = encode(vlm.Sample("s", (("Red?", "yes"),), (PICTURE,)), processor, llava.config.image_seq_length)
    prefix = trained[: next(place for place, target in enumerate(targets) if target >= 0) + 1]
    (ids,) = _inputs(processor, [_prompt(processor, asked([PICTURE], ["Red?"])[0])], [(PICTURE,)])["input_ids"].tolist()
    assert ids == prefix
    assert ids.count(processor.tokenizer.bos_token_id) == (begins or written)


# -- words one after the other ------------------------------------------------------------------------------------


def test_pieces_joined_are_the_answer(model: tuple[Any, Any]) -> None:
    llava, processor = model
    llava.train()
    for question in ("What is this?", "Red?", "1"):
        pieces = list(vlm.stream_answer(llava, processor, PICTURE, question, max_new_tokens=40))
        assert ["".join(pieces)] == vlm.answer(llava, processor, [PICTURE], [question], max_new_tokens=40)
        assert all(pieces)
    two = "".join(vlm.stream_answer(llava, processor, [PICTURE, PICTURE], "Same?", max_new_tokens=12))
    assert [two] == vlm.answer(llava, processor, [[PICTURE, PICTURE]], ["Same?"], max_new_tokens=12)
    assert llava.training
    llava.eval()


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("a red circle", ["a", " red", " circle"]),
        (" a\n b \n", ["a", "\n b"]),
        ("\u732b\u3068\u72ac", ["\u732b", "\u3068", "\u72ac"]),
        ("ok \U0001f600 yes", ["ok", " \U0001f600", " yes"]),
        ("", []),
    ],
)
def test_pieces_are_whole_words(model: tuple[Any, Any], text: str, pieces: list[str]) -> None:
    _, processor = model
    words = _Words(processor)
    words.put(torch.tensor([[1, 2, 3]]))  # the prompt
    for token in processor.tokenizer.encode(text, add_special_tokens=False):
        words.put(torch.tensor([token]))
    words.end()
    assert [words.pieces.get() for _ in range(words.pieces.qsize())] == pieces


def test_words_come_before_the_answer_is_complete(model: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """And a reader who leaves early ends the generation."""
    llava, processor = model
    read, steps = threading.Event(), []

    def generate(*, streamer: _Words, **_: Any) -> torch.Tensor:
        streamer.put(torch.tensor([[1, 2, 3]]))
        for step, token in enumerate(processor.tokenizer.encode("one two " * 50)):
            if step == 6:
                assert read.wait(timeout=30)
            steps.append(step)
            streamer.put(torch.tensor([token]))
        streamer.end()
        return torch.zeros(1, 4, dtype=torch.long)

    monkeypatch.setattr(llava, "generate", generate)
    stream = vlm.stream_answer(llava, processor, PICTURE, "Red?")
    assert next(stream) == "one"
    before = threading.active_count()
    threading.Timer(0.2, read.set).start()  # after close() has said that nobody reads any more
    stream.close()
    assert len(steps) < 100
    assert threading.active_count() <= before


def test_an_error_of_the_generation_reaches_the_reader(model: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    llava, processor = model
    threads = threading.active_count()

    def torn(**_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(llava, "generate", torn)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(vlm.stream_answer(llava, processor, PICTURE, "Red?"))
    assert threading.active_count() == threads
    with pytest.raises(DataError, match="cannot be read"):
        vlm.stream_answer(llava, processor, "none.png", "Red?")


def test_the_command_streams_plain_text(model: tuple[Any, Any], tmp_path: Path) -> None:
    vlm.save(*model, tmp_path / "model")
    PICTURE.save(tmp_path / "p.png")
    (expected,) = vlm.answer(*model, [PICTURE], ["Red?"], max_new_tokens=10)
    app = typer.Typer()
    register(app)
    arguments = ["answer", str(tmp_path / "model"), "Red?", str(tmp_path / "p.png"), "--max-new-tokens", "10"]
    done = CliRunner().invoke(app, [*arguments, "--stream"])
    assert done.exit_code == 0, done.output
    assert done.stdout == printable(expected) + "\n"
