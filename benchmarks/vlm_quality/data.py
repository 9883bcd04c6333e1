# SPDX-License-Identifier: Apache-2.0
"""What is learned and what is asked: the box's questions and captions, and easy-vqa."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import vlm
from aced_sdk.errors import DataError
from examples.quickstart.box import Box
from examples.quickstart.box.fetch import fetch, home_folder, locked, unpack_wheel
from examples.quickstart.box.sources import Package
from vlm.data import Sample

EASY_VQA = Package(
    "easy-vqa",
    "1.0",
    "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
    "MIT",
    "https://github.com/vzhou842/easy-VQA",
    client="pip",
)
# the box asks about neither skin tone nor gender, so captions that name them are not learned either
_PEOPLE = re.compile(r"\b(skin tone|(wo)?m[ae]n|girls?|boys?|(fe)?male)\b", re.IGNORECASE)
QUESTIONS = ("colour", "group", "yes_no")


@dataclass(frozen=True)
class Exam:
    """Conversations to learn from and held-out ones to be scored by; no picture is in both."""

    train: tuple[Sample, ...]
    questions: tuple[Sample, ...]
    captions: tuple[Sample, ...]
    easy_vqa: tuple[Sample, ...]


def exam(box: Box, pictures: Path, easy_questions: int) -> Exam:
    """Everything that one model learns and is asked.

    Args:
        box: its questions, and its trusted pairs as captions. The held-out pictures are drawn in styles that are in
            neither; what they show is.
        pictures: folder that the trusted pairs' pictures are unpacked into.
        easy_questions: how many of easy-vqa's 9,673 test questions are asked, drawn at random.
    """
    taught = vlm.load_llava(box.vqa / "train.json", box.vqa)
    asked = vlm.load_llava(box.vqa / "test.json", box.vqa)
    named = [one for one in vlm.load_webdataset([box.trusted], pictures) if not _PEOPLE.search(one.turns[0][1])]
    easy, easy_test = easy_vqa("train"), easy_vqa("test")
    return Exam(
        train=(*taught, *named, *easy),
        questions=tuple(sample for sample in asked if sample.kind in QUESTIONS),
        captions=tuple(sample for sample in asked if sample.kind == "name"),
        easy_vqa=tuple(random.Random(0).sample(easy_test, min(easy_questions, len(easy_test)))),
    )


def easy_vqa(part: str) -> list[Sample]:
    """easy-vqa's questions: shapes and colours on pictures of 64 pixels, 13 answers.

    Args:
        part: `train` or `test`.

    Raises:
        FetchError: if the package cannot be had.
        DataError: if it holds something else than it did.
    """
    root = home_folder()
    folder = root / "models" / EASY_VQA.name
    if not folder.is_dir():
        with locked(root):
            unpack_wheel(fetch(EASY_VQA, root / "downloads"), folder, EASY_VQA.sha256)
    data = folder / "easy_vqa" / "data" / part
    try:
        entries: Sequence[tuple[str, str, int]] = json.loads((data / "questions.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{data}/questions.json cannot be read: {error}", remedy=f"remove {folder}") from error
    return [
        Sample(
            key=f"easy-vqa-{part}-{number}",
            turns=((question, answer),),
            images=(data / "images" / f"{picture}.png",),
            kind=_kind(question, answer),
        )
        for number, (question, answer, picture) in enumerate(entries)
    ]


def _kind(question: str, answer: str) -> str:
    if answer in ("yes", "no"):
        return "easy yes or no"
    return "easy colour" if question.startswith("what color") else "easy shape"
