# SPDX-License-Identifier: Apache-2.0
"""Malformed conversations and annotation files are refused by name; nothing is read as words that nobody wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
from PIL import Image
from tiny import encoder

import vlm
from aced_sdk import towers
from aced_sdk.config import Engine
from aced_sdk.errors import AcedError, ConfigError, DataError, EvaluationError
from vlm.data.pictures import same_picture
from vlm.data.rows import make_rows
from vlm.scoring.evaluate import deal

PICTURE = Image.new("RGB", (8, 8))


def llava(folder: Path, **changes: Any) -> vlm.Sample:
    PICTURE.save(folder / "a.png")
    entry = {"id": "odd", "image": "a.png", "conversations": turns("<image>\nWhat?", "red")} | changes
    (folder / "data.json").write_text(json.dumps([entry]))
    (sample,) = vlm.load_llava(folder / "data.json", folder)
    return sample


def turns(question: Any, answer: Any) -> list[dict[str, Any]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image": 5}, "'odd' is not in LLaVA's form"),
        ({"image": [None]}, "'odd' is not in LLaVA's form"),
        ({"image": None}, "'odd' has 1 <image> markers and 0 pictures"),
        ({"answers": "red"}, "'odd' is not in LLaVA's form .*one text, not a list"),
        ({"answers": [{"answer": "red"}]}, "'odd' is not in LLaVA's form .*is no text"),
        ({"answers": 3}, "'odd' is not in LLaVA's form"),
        ({"conversations": turns("<image>\nWhat?", None)}, "'odd' is not in LLaVA's form .*None is no text"),
        ({"conversations": turns("<image>\nWhat?", "<image>")}, "'odd' has 2 <image> markers and 1 pictures"),
        ({"conversations": turns("What?", "<image>")}, "'odd' has an <image> marker in its words, outside of"),
    ],
)
def test_a_malformed_entry_is_named(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(AcedError, match=words):
        llava(tmp_path, **changes)


def test_null_is_what_is_not_there(tmp_path: Path) -> None:
    sample = llava(tmp_path, id=None, image=None, kind=None, answers=None, conversations=turns("Why?", "So."))
    assert sample == vlm.Sample("0", (("Why?", "So."),))


def test_pictures_before_and_behind_the_words(tmp_path: Path) -> None:
    for question in ("<image><image>\nAlike?", "Alike?\n<image> <image>", "<image>\nAlike?\n<image>"):
        sample = llava(tmp_path, image=["a.png", "a.png"], conversations=turns(question, "yes"))
        assert (sample.turns, len(sample.images)) == ((("Alike?", "yes"),), 2)


def row(**changes: Any) -> dict[str, Any]:
    content = [{"type": "image"}, {"type": "text", "text": "What?"}]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "red"}]} | changes


def test_rows_hold_pictures_as_trl_takes_them() -> None:
    for held in ({"images": [PICTURE]}, {"images": PICTURE}, {"image": PICTURE}):
        assert vlm.load_messages([row(**held)])[0].images == (PICTURE,)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (None, "'0' is not in the form of messages"),
        ("abc", "'0' is not in the form of messages"),
        (row(images=[{"bytes": b"x", "path": None}]), "images of conversation '0' are .*bytes"),
        (row(images=[None]), r"images of conversation '0' are \(None,\)"),
        (row(images=5), "'0' is not in the form of messages"),
        (row(images=[PICTURE], answers=7), "'0' is not in the form of messages"),
        (row(messages=[{"role": "user", "content": [{"type": "text", "text": None}]}]), "None is no text"),
    ],
)
def test_a_malformed_row_is_named(bad: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        vlm.load_messages([bad])


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"turns": ("What?", "red")}, "turns"),
        ({"turns": (("What?", None),)}, "turns"),
        ({"turns": (("What?", "red", "blue"),)}, "turns"),
        ({"images": "a.png"}, "images"),
        ({"images": PICTURE}, "images"),
        ({"answers": "red"}, "answers"),
    ],
)
def test_samples_that_are_written_wrong_by_hand(fields: dict[str, Any], name: str) -> None:
    with pytest.raises(DataError, match=f"the {name} of conversation 'odd' are .*field: {name}"):
        vlm.Sample(**({"key": "odd", "turns": (("What?", "red"),)} | fields))


def test_data_that_holds_no_samples(tmp_path: Path) -> None:
    data: Any = [vlm.Sample("fine", (("What?", "red"),), (PICTURE,)), {"image": "a.png"}]
    student = towers.save(encoder(1), tmp_path / "student")
    model = processor = cast("Any", None)  # refused before they are used
    for read in (
        lambda: make_rows(data[1:], processor, image_tokens=4, conversations_per_row=1, limit=8),
        lambda: vlm.evaluate(model, processor, data[1:]),
        lambda: vlm.lit_decoder(student, data[1:]),
        lambda: vlm.rank_encoders({"a": student}, data[:1], data[1:]),
    ):
        with pytest.raises(DataError, match=r"number 0 is a dict, no vlm.Sample.*vlm\.load_llava.*field: data"):
            read()
    with pytest.raises(DataError, match="number 1 is a dict"):
        vlm.evaluate(model, processor, data)


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("image", "caption", "words"),
    [
        ({"id": [1]}, {"image_id": [1]}, r"number 0 of 'images' .* has \[1\] for its id"),
        ({"file_name": None}, {}, "has None for its file_name"),
        ({}, {"caption": None}, "number 0 of 'annotations' .* has None for its caption"),
    ],
)
def test_captions_of_another_form(tmp_path: Path, image: dict[str, Any], caption: dict[str, Any], words: str) -> None:
    PICTURE.save(tmp_path / "a.png")
    content = {
        "images": [{"id": 1, "file_name": "a.png"} | image],
        "annotations": [{"image_id": 1, "caption": "red"} | caption],
    }
    with pytest.raises(DataError, match=words):
        vlm.load_coco_captions(write(tmp_path / "c.json", content), tmp_path)


ASKED = {"question_id": 1, "image_id": 1, "question": "What?"}
ANSWERED = {
    "question_id": 1,
    "image_id": 1,
    "answer_type": "other",
    "multiple_choice_answer": "red",
    "answers": [{"answer": "red"}] * 10,
}


@pytest.mark.parametrize(
    ("asked", "answered", "name", "words"),
    [
        ([ASKED] * 2, [ANSWERED], "{image_id}.png", r"q\.json has 2 entries for 1 questions"),
        ([ASKED], [ANSWERED, ANSWERED | {"multiple_choice_answer": "blue"}], "", r"a\.json has 2 entries"),
        ([ASKED], [ANSWERED | {"question_id": "1"}], "", "2 of 2 .*2 question in one file alone"),
        ([ASKED | {"question_id": [1]}], [ANSWERED], "", r"has \[1\] for its question_id"),
        ([ASKED], [ANSWERED | {"multiple_choice_answer": None}], "", "has None for its multiple_choice_answer"),
        ([ASKED], [ANSWERED], "{image_id.x}.png", "question 1 has no picture name"),
    ],
)
def test_questions_of_another_form(tmp_path: Path, asked: Any, answered: Any, name: str, words: str) -> None:
    questions = write(tmp_path / "q.json", {"questions": asked})
    annotations = write(tmp_path / "a.json", {"annotations": answered})
    with pytest.raises(DataError, match=words):
        vlm.load_vqav2(questions, annotations, tmp_path, image_name=name or None)


def test_samples_with_several_pictures_are_dealt_none_of_their_own() -> None:
    images = [("a", "b"), ("b",), ("b", "c"), ("d",), ("e", "f"), ("d", "g"), ("h",), ("a",)]
    for seed in range(20):
        dealt = deal(images, seed)
        assert sorted(dealt) == sorted(images)
        for own, other in zip(images, dealt, strict=True):
            assert {same_picture(one) for one in own}.isdisjoint(other)
    with pytest.raises(EvaluationError, match="in so many samples"):
        deal([("a", "b"), ("a",), ("a", "c")], 0)


# -- LiT-decoders -----------------------------------------------------------------------------------------------------


def asked(key: str, colour: str, question: str = "What?", answer: str = "red") -> vlm.Sample:
    return vlm.Sample(key, ((question, answer),), (Image.new("RGB", (16, 16), colour),), "caption")


def test_encoders_come_as_a_list_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [towers.save(encoder(seed), tmp_path / str(seed)) for seed in (0, 1)]
    plan = vlm.LitDecoder(steps=1, width=16, heads=2, layers=1)
    learned, held_out = [asked("0", "red"), asked("1", "blue")], [asked("2", "green"), asked("3", "white")]
    ranking = vlm.rank_encoders(folders, learned, held_out, plan, seeds=(0,), max_new_tokens=2)
    assert {one.name for one in ranking.encoders} == set(map(str, folders))
    alone = vlm.rank_encoders(folders[:1], learned, held_out, plan, seeds=(0,), max_new_tokens=2, captions="other")
    assert "accuracy" in alone.encoders[0].scores  # a text is one kind, not its letters
    for bad in ([folders[0]] * 2, [encoder()]):
        with pytest.raises(ConfigError, match=r"names one twice, or holds a loaded one.*field: encoders"):
            vlm.rank_encoders(bad, learned, held_out, plan)  # type: ignore[arg-type]

    def trained(*_: Any) -> None:
        raise AssertionError("what cannot be scored was trained first")

    monkeypatch.setattr("vlm.probing.ranking.train", trained)
    long = [held_out[0], asked("long", "white", "why " * 200)]
    with pytest.raises(DataError, match="do not fit into 128 places: 'why why"):
        vlm.rank_encoders(folders, learned, long, plan)
    with pytest.raises(ConfigError, match="max_new_tokens is 0"):
        vlm.rank_encoders(folders, learned, held_out, plan, max_new_tokens=0)


def test_a_decoder_is_not_taught_nothing() -> None:
    plan = vlm.LitDecoder(steps=1, width=16, heads=2, layers=1)
    good = asked("0", "red")
    for bad in (asked("bad", "blue", answer=" "), vlm.Sample("bad", (), good.images)):
        with pytest.raises(DataError, match="nothing can be learned from conversation 'bad'"):
            vlm.lit_decoder(encoder(), [good, bad], plan)
    assert vlm.lit_decoder(encoder(), [good], plan).answer([], []) == []


def test_an_unknown_stage_is_named() -> None:
    with pytest.raises(ConfigError, match=r"stages.0.stage: unknown stage 'algn' \(did you mean 'align'\?\)"):
        vlm.TuneConfig(**{"stages": [{"stage": "algn"}]})
    with pytest.raises(ConfigError, match=r"stages\.0\.stage: 'stage' is missing"):
        vlm.TuneConfig(**{"stages": [{}]})
    with pytest.raises(ConfigError, match="tuning has a micro_batch in each stage"):
        vlm.TuneConfig(stages=(vlm.Align(steps=1),), engine=Engine(kind="single", micro_batch=4))
