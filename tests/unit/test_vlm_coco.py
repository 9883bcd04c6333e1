# SPDX-License-Identifier: Apache-2.0
"""COCO's captions and VQAv2's questions: what is read, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import vlm
from aced_sdk.errors import DataError

Json = dict[str, Any]


def captions(folder: Path, **changes: Any) -> Path:
    """Two pictures, one of them with two captions."""
    content = {
        "info": {},
        "images": [{"id": 7, "file_name": "b.jpg", "height": 4}, {"id": 3, "file_name": "a.jpg", "height": 4}],
        "annotations": [
            {"id": 1, "image_id": 3, "caption": "A red square. "},
            {"id": 2, "image_id": 7, "caption": "Something blue"},
            {"id": 3, "image_id": 3, "caption": "red"},
        ],
    }
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (4, 4)).save(folder / name)
    path = folder / "captions.json"
    path.write_text(json.dumps(content | changes))
    return path


def test_captions_of_a_picture_are_one_sample_or_several(tmp_path: Path) -> None:
    path = captions(tmp_path)
    red, blue = vlm.load_coco_captions(path, tmp_path, prompt="Describe it.")
    assert red == vlm.Sample(
        "3",
        (("Describe it.", "A red square."),),
        (tmp_path / "a.jpg",),
        kind="caption",
        answers=("A red square.", "red"),
    )
    assert (blue.key, blue.answers) == ("7", ("Something blue",))
    each = vlm.load_coco_captions(path, tmp_path, each_caption=True)
    assert [(one.key, one.turns[0][1], one.answers) for one in each] == [
        ("3-0", "A red square.", ("A red square.",)),
        ("3-1", "red", ("red",)),
        ("7-0", "Something blue", ("Something blue",)),
    ]


def test_a_picture_without_caption_is_told(tmp_path: Path) -> None:
    read = vlm.load_coco_captions(captions(tmp_path, annotations=[{"image_id": 3, "caption": "red"}]), tmp_path)
    assert (len(read), read.skipped) == (1, ("picture 7 has no caption",))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"annotations": [{"image_id": 8, "caption": "x"}]}, "picture 8 in .* is of a picture that the file does not"),
        ({"annotations": [{"image_id": 3, "caption": " "}]}, "caption of picture 3 in .* is empty"),
        ({"annotations": [{"image_id": 3}]}, "number 0 of 'annotations' in .* has no caption"),
        ({"annotations": ["x"]}, "number 0 of 'annotations' in .* has no image_id, caption"),
        ({"images": None}, "has no list 'images'"),
        ({"images": [{"id": 3, "file_name": "a.jpg"}, {"id": 3, "file_name": "b.jpg"}]}, "id 3 to two pictures"),
        ({"annotations": []}, "there are no conversations"),
    ],
)
def test_captions_in_another_form(tmp_path: Path, changes: Json, words: str) -> None:
    with pytest.raises(DataError, match=words):
        vlm.load_coco_captions(captions(tmp_path, **changes), tmp_path)


def test_missing_pictures_are_counted_and_named(tmp_path: Path) -> None:
    path = captions(tmp_path)
    (tmp_path / "b.jpg").unlink()
    with pytest.raises(DataError, match=r"1 of 2 conversations cannot be used.*conversation '7'.*b\.jpg"):
        vlm.load_coco_captions(path, tmp_path)
    read = vlm.load_coco_captions(path, tmp_path, max_unusable_fraction=0.5)
    assert ([one.key for one in read], len(read.skipped)) == (["3"], 1)
    with pytest.raises(DataError, match=r"nothing\.json cannot be read.*field: annotations"):
        vlm.load_coco_captions(tmp_path / "nothing.json", tmp_path)


def question(number: int = 3000, picture: int = 300, **changes: Any) -> Json:
    return {"question_id": number, "image_id": picture, "question": "How many?"} | changes


def annotation(number: int = 3000, picture: int = 300, **changes: Any) -> Json:
    return {
        "question_id": number,
        "image_id": picture,
        "question_type": "how many",
        "answer_type": "number",
        "multiple_choice_answer": "2",
        "answers": [{"answer_id": n, "answer_confidence": "yes", "answer": a} for n, a in enumerate("2223")],
    } | changes


def read_vqa(folder: Path, asked: list[Json], answered: list[Json], **options: Any) -> Any:
    """The split val2014 with one picture, 300."""
    Image.new("RGB", (4, 4)).save(folder / "COCO_val2014_000000000300.jpg")
    (folder / "q.json").write_text(json.dumps({"data_subtype": "val2014", "questions": asked}))
    (folder / "a.json").write_text(json.dumps({"data_subtype": "val2014", "annotations": answered}))
    return vlm.load_vqav2(folder / "q.json", folder / "a.json", folder, **options)


def test_questions_meet_their_annotations(tmp_path: Path) -> None:
    asked = [question(), question(3001, question="Is it?")]
    yes = annotation(3001, answer_type="yes/no", multiple_choice_answer="yes", answers=[{"answer": "yes"}] * 10)
    first, second = read_vqa(tmp_path, asked, [yes, annotation()])
    assert first == vlm.Sample(
        "3000",
        (("How many?", "2"),),
        (tmp_path / "COCO_val2014_000000000300.jpg",),
        kind="number",
        answers=("2", "2", "2", "3"),
    )
    assert (second.turns, second.kind, second.answers) == ((("Is it?", "yes"),), "yes/no", ("yes",) * 10)


def test_pictures_may_bear_other_names(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "000000000300.jpg")
    (sample,) = read_vqa(tmp_path, [question()], [annotation()], image_name="{image_id:012d}.jpg")
    assert sample.images == (tmp_path / "000000000300.jpg",)
    with pytest.raises(DataError, match=r"'3000'.*COCO_val2014_000000000300\.png"):
        read_vqa(tmp_path, [question()], [annotation()], image_name="COCO_val2014_{image_id:012d}.png")


@pytest.mark.parametrize(
    ("asked", "answered", "words"),
    [
        ([question()], [], r"1 of 1 .*1 question in one file alone.*question 3000 is not in .*a\.json"),
        ([question()], [annotation(), annotation(1)], r"1 of 3 .*in one file alone.*question 1 is not in .*q\.json"),
        ([question()], [annotation(picture=301)], "question 3000 is about picture 300, its annotation about 301"),
        ([question(picture=301)], [annotation(picture=301)], r"'3000'.*COCO_val2014_000000000301\.jpg"),
        ([question()], [annotation(answers=["2"])], "question 3000 has no picture name or answers in VQAv2's form"),
        ([{"question_id": 1}], [annotation()], "number 0 of 'questions' in .* has no image_id, question"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, asked: list[Json], answered: list[Json], words: str) -> None:
    with pytest.raises(DataError, match=words):
        read_vqa(tmp_path, asked, answered)


def test_an_image_name_must_be_a_template_of_the_id(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"question 3000.*KeyError.*field: image_name"):
        read_vqa(tmp_path, [question()], [annotation()], image_name="{name}.jpg")
