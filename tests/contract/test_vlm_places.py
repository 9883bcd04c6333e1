# SPDX-License-Identifier: Apache-2.0
"""System prompts, and pictures in and inside later turns: learned as transformers would, asked as they were learned."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vlm
from aced_sdk.errors import DataError
from vlm.data.chat import _TURNS, _template
from vlm.data.rows import encode, make_rows, messages
from vlm.data.skips import Skips
from vlm.generation import _inputs, _prompt, asked

sys.path.insert(0, str(Path(__file__).parent))
from test_vlm import config, language, samples, student
from test_vlm_adapt import own_loss, packed_loss

RED, GREEN, BLUE = (sample.images[0] for sample in samples(1)[::2])
QUESTION = "what is it ?"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("parts")
    return student(folder / "student"), language(folder / "language")


@pytest.fixture(scope="module")
def model(folders: tuple[Path, Path]) -> tuple[Any, Any]:
    return vlm.build(*folders)


def placed() -> list[vlm.Sample]:
    """System prompts and pictures everywhere; the first ones share the pictures, and not all share what is before."""
    both = (RED, GREEN)
    return [
        vlm.Sample("first", (("what is it ?", "red"), ("is it blue ?", "no")), both),
        vlm.Sample("again", (("what colour is it ?", "green"),), both),
        vlm.Sample("system", (("what is it ?", "red"),), both, system="yes or no"),
        vlm.Sample("again", (("what is this ?", "red"),), both, system="yes or no"),
        vlm.Sample("inside", (("is <image> a picture ? is <image> it ?", "no"),), both),
        vlm.Sample("later", (("<image>what is it ?", "red"), ("<image>is it red ?", "no")), both),
        vlm.Sample("late", (("what is red ?", "a colour"), ("is this <image> red ?", "yes")), (RED,), system="yes"),
        vlm.Sample("words", (("what is red ?", "a colour"),), system="yes or no"),
    ]


@pytest.mark.parametrize("chatml", [True, False])
def test_conversations_have_transformers_own_loss_wherever_their_pictures_are(
    folders: tuple[Path, Path], tmp_path: Path, chatml: bool
) -> None:
    llava, processor = vlm.build(folders[0], language(tmp_path / "words", chatml=chatml))
    with torch.no_grad():
        for part in (placed(), *([one] for one in placed())):
            ours, theirs = packed_loss(llava, processor, part), own_loss(llava, processor, part)
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)
    rows, _ = make_rows(placed(), processor, 9, conversations_per_row=4, limit=256)
    assert [row.samples for row in rows] == [2, 2, 1, 1, 1, 1]  # whoever has the same tokens before shares them


def test_a_question_has_the_tokens_that_were_learned(model: tuple[Any, Any]) -> None:
    """Every turn of every conversation, with the turns before it."""
    _, processor = model
    for sample in placed():
        ids, _ = encode(sample, processor, 9)
        marked = any("<image>" in question for question, _ in sample.turns)
        for turn, (question, _) in enumerate(sample.turns):
            before = list(sample.turns[:turn])
            shown = sum(q.count("<image>") for q, _ in sample.turns[: turn + 1]) if marked else len(sample.images)
            (one,) = asked([sample.images[:shown]], [[*before, question]])
            one = type(one)(one.turns, one.images, sample.system)
            (prompt,) = _inputs(processor, [_prompt(processor, one)], [one.images])["input_ids"].tolist()
            assert prompt == ids[: len(prompt)], (sample.key, turn)


def test_gemma_reads_the_system_prompt_at_the_start_of_the_first_question(model: tuple[Any, Any]) -> None:
    _, processor = model
    talk = vlm.Sample("s", (("one", "two"), ("three", "four")), (RED,), system="Be brief.")
    text = processor.apply_chat_template(messages(talk), chat_template=_template(*_TURNS["Gemma"]), tokenize=False)
    assert text == (
        "<start_of_turn>user\nBe brief.\n\n<image>one<end_of_turn>\n<start_of_turn>model\ntwo<end_of_turn>\n"
        "<start_of_turn>user\nthree<end_of_turn>\n<start_of_turn>model\nfour<end_of_turn>\n"
    )


# -- scores -----------------------------------------------------------------------------------------------------------


def test_questions_without_pictures_are_scored_and_not_asked_blind(model: tuple[Any, Any]) -> None:
    words = [vlm.Sample(f"w{n}", (("what is red ?", "a colour"),), kind="words") for n in range(3)]
    scores = vlm.evaluate(*model, [*samples(1), *words], max_new_tokens=2)
    assert (scores.total.count, scores.kinds["words"].count) == (9, 3)
    assert (scores.kinds["words"].blind, scores.kinds["words"].blind_metrics) == (None, None)
    told = [one.blind_answer for one in scores.samples]
    assert [answer is None for answer in told] == [False] * 6 + [True] * 3
    kinds = [scores.kinds[name] for name in ("colour", "yes_no")]
    assert scores.blind == pytest.approx(sum(kind.count * (kind.blind or 0) for kind in kinds) / 6)
    alone = vlm.evaluate(*model, words, metric="captions", max_new_tokens=2)
    assert (alone.blind, alone.total.blind_metrics) == (None, None)


def test_turns_are_asked_with_their_system_prompt_and_the_pictures_up_to_them(
    model: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[Any] = []

    def listen(model: Any, processor: Any, questions: Any, *_: Any) -> list[str]:
        heard.append(questions)
        return [_prompt(processor, one) for one in questions]  # what cannot be written fails here

    monkeypatch.setattr("vlm.scoring.evaluate.answers", listen)
    vlm.evaluate(*model, [*placed(), *samples(1)])
    said, blind = heard
    assert len(blind) == sum(bool(one.images) for one in said)
    shown = {(one.system, one.turns[0][0]): one.images for one in said}
    assert shown["", "is it blue ?"] == (RED, GREEN)
    assert shown["", "<image>what is it ?"] == (RED,)
    assert shown["", "<image><image>is it red ?"] == (RED, GREEN)
    assert shown["yes", "what is red ?"] == ()
    assert shown["yes", "is this <image> red ?"] == (RED,)
    assert shown["yes or no", "what is it ?"] == (RED, GREEN)


# -- questions --------------------------------------------------------------------------------------------------------


def test_a_question_may_follow_a_conversation(model: tuple[Any, Any]) -> None:
    talk = [("what is it ?", "red"), ("is it blue ?", "no"), "what colour is it ?"]
    for form in (talk, tuple(talk), [["what is it ?", "red"], ["is it blue ?", "no"], "what colour is it ?"]):
        assert vlm.answer(*model, [RED], [form], 4) == vlm.answer(*model, [RED], [talk], 4)
    texts = [_prompt(model[1], one) for one in asked([RED, RED], [talk, talk[-1]])]
    assert [text.count("<|im_start|>assistant") for text in texts] == [3, 1]
    assert "".join(vlm.stream_answer(*model, RED, talk, 4)) == vlm.answer(*model, [RED], [talk], 4)[0]
    assert len(vlm.answer(*model, [(RED, BLUE)], ["is <image> it or is <image> it ?"], 4)) == 1
    assert len(vlm.answer(*model, iter([RED, BLUE]), np.array([QUESTION] * 2), 4)) == 2


TALK = [("What is this?", "a cross"), "What colour?"]
NO_QUESTIONS: list[Any] = [
    {"question": "What?"},
    [{"role": "user", "content": "What?"}],
    [TALK],
    [("What is this?", "a cross")],
    [("What is this?",), "What colour?"],
    [("a", "b", "c"), "What colour?"],
    ["What is this?", "What colour?"],
    [],
    None,
    7,
    b"What?",
    [("What is this?", None), "What colour?"],
]


@pytest.mark.parametrize("question", NO_QUESTIONS)
def test_questions_in_another_form_are_refused(model: tuple[Any, Any], question: Any) -> None:
    with pytest.raises(DataError, match=r"a question is .*\(question, answer\) pairs.*field: questions"):
        vlm.answer(*model, [RED], [question])
    with pytest.raises(DataError, match="field: questions"):
        vlm.stream_answer(*model, RED, question)


@pytest.mark.parametrize(
    "shown", [None, 7, b"x", {"path": "a.png"}, [None], [[RED]], {RED.mode}, np.zeros((1, 1, 3)), iter([RED])]
)
def test_pictures_in_another_form_are_refused(model: tuple[Any, Any], shown: Any) -> None:
    with pytest.raises(DataError, match=r"the pictures of a question are .*field: images"):
        vlm.answer(*model, [shown], [QUESTION])
    with pytest.raises(DataError, match="field: images"):
        vlm.stream_answer(*model, shown, QUESTION)


@pytest.mark.parametrize("values", [None, 7, b"x", {"a": 1}, {"a"}])
def test_lists_in_another_form_are_refused(model: tuple[Any, Any], values: Any) -> None:
    for images, questions in ((values, [QUESTION]), ([RED], values)):
        with pytest.raises(DataError, match="come as lists"):
            vlm.answer(*model, images, questions)
    with pytest.raises(DataError, match="come as lists"):
        vlm.caption(*model, values)


def test_half_characters_are_refused_everywhere(
    model: tuple[Any, Any], folders: tuple[Path, Path], tmp_path: Path
) -> None:
    llava, processor = model
    odd = "red \ud83d"
    for question in (odd, [(odd, "red"), QUESTION], [(QUESTION, odd), QUESTION]):
        with pytest.raises(DataError, match="unpaired surrogate"):
            vlm.answer(llava, processor, [RED], [question])
    with pytest.raises(DataError, match="unpaired surrogate"):
        vlm.caption(llava, processor, [RED], prompt=odd)
    for sample in (
        vlm.Sample("odd", ((odd, "red"),), (RED,)),
        vlm.Sample("odd", ((QUESTION, odd),), (RED,)),
        vlm.Sample("odd", ((QUESTION, "red"),), (RED,), system=odd),
    ):
        with pytest.raises(DataError, match=r"'odd' has half a character \(an unpaired surrogate\)"):
            vlm.tune(llava, processor, [sample], config(), directory=tmp_path)
        with pytest.raises(DataError, match="'odd' has half a character"):
            vlm.evaluate(llava, processor, [sample])
        with pytest.raises(DataError, match="'odd' has half a character"):
            vlm.lit_decoder(folders[0], [sample])
    assert not list(tmp_path.iterdir())


# -- what is left out of a tuning -------------------------------------------------------------------------------------


def test_tuning_leaves_out_and_counts_bad_conversations(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    llava, processor = vlm.build(*folders)
    bad = [
        vlm.Sample("empty", ((QUESTION, " "),), (RED,)),
        vlm.Sample("long", (("what is it ? " * 60, "red"),), (RED,)),
        vlm.Sample("odd", ((QUESTION, "red \ud800"),)),
    ]
    data = [*samples(20), *bad]
    plan = vlm.TuneConfig(stages=[vlm.Align(steps=1)], max_unusable_fraction=0.05)
    result = vlm.tune(llava, processor, data, plan, directory=tmp_path / "run")
    assert [name in text for name, text in zip(("empty", "long", "odd"), result.skipped, strict=True)] == [True] * 3
    words = "3 of 123 conversations are left out: 1 empty answer, 1 too long, 1 unpaired surrogate"
    assert words in capsys.readouterr().err
    left = make_rows(data, processor, 9, 4, 128, Skips())[0]
    assert list(left) == list(make_rows(samples(20), processor, 9, 4, 128)[0])
    with pytest.raises(DataError, match=r"3 of 123 conversations cannot be used .*the first: .*'empty'"):
        vlm.tune(
            llava, processor, data, plan.model_copy(update={"max_unusable_fraction": 0.02}), directory=tmp_path / "b"
        )
    assert not (tmp_path / "b").exists()


def test_evaluate_leaves_out_what_cannot_be_read(model: Any, tmp_path: Path) -> None:
    (tmp_path / "torn.png").write_bytes(b"no picture")
    odd = [
        vlm.Sample("words", (("say \ud800", "red"),), (RED,)),
        vlm.Sample("torn", ((QUESTION, "red"),), (tmp_path / "torn.png",)),
        vlm.Sample("floats", ((QUESTION, "red"),), (Image.new("F", (24, 24)),)),
    ]
    with pytest.raises(DataError, match=r"3 of \d+ conversations cannot be used .*'words'.*max_unusable_fraction"):
        vlm.evaluate(*model, [*samples(), *odd], max_new_tokens=2)
    scores = vlm.evaluate(*model, [*samples(), *odd], max_new_tokens=2, max_unusable_fraction=0.5)
    assert scores.reasons == {"unpaired surrogate": 1, "unreadable picture": 1, "samples of 32 bits": 1}
    expected = vlm.evaluate(*model, samples(), max_new_tokens=2)
    assert (scores.total, scores.samples) == (expected.total, expected.samples)
