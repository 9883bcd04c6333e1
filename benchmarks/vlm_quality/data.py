# SPDX-License-Identifier: Apache-2.0
"""What is learned and what is asked: the box's questions and captions, and easy-vqa."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import vlm
from aced_sdk.data.pool import Pool
from aced_sdk.errors import DataError
from aced_sdk.files import whole_file
from examples.quickstart.box import Box
from examples.quickstart.box.fetch import fetch, home_folder, locked, unpack_wheel
from examples.quickstart.box.questions import as_answer
from examples.quickstart.box.sources import Package
from vlm.data.samples import Sample

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
NAME = "What is this?"
SHAPES = ("circle", "rectangle", "triangle")


@dataclass(frozen=True)
class Exam:
    """Conversations to learn from and held-out ones to be scored by; no picture is in both."""

    train: tuple[Sample, ...]
    questions: tuple[Sample, ...]
    captions: tuple[Sample, ...]
    easy_vqa: tuple[Sample, ...]


def exam(box: Box, pictures: Path, easy_questions: int, captions: int) -> Exam:
    """Everything that one model learns and is asked.

    Args:
        box: its questions, and its trusted pairs as captions. The held-out pictures are drawn in styles that are in
            neither; what they show is.
        pictures: folder that pictures are unpacked into.
        easy_questions: how many of easy-vqa's 9,673 test questions are asked, drawn at random.
        captions: how many of the pictures of the tasks `unseen_style_*` are captioned, drawn at random.
    """
    taught = vlm.load_llava(box.vqa / "train.json", box.vqa)
    asked = vlm.load_llava(box.vqa / "test.json", box.vqa)
    pairs = vlm.load_webdataset([box.trusted], pictures, prompt=NAME)
    named = [
        replace(one, turns=((NAME, as_answer(one.turns[0][1])),))
        for one in pairs
        if not _PEOPLE.search(one.turns[0][1])
    ]
    unseen = [one for task in sorted(box.evaluation.glob("unseen_style_*")) for one in labelled(task, pictures)]
    easy, easy_test = easy_vqa("train"), easy_vqa("test")
    return Exam(
        train=(*taught, *named, *easy),
        questions=tuple(sample for sample in asked if sample.kind in QUESTIONS),
        captions=_drawn(unseen, captions),
        easy_vqa=_drawn(easy_test, easy_questions),
    )


def _drawn(samples: Sequence[Sample], count: int) -> tuple[Sample, ...]:
    return tuple(random.Random(0).sample(samples, min(count, len(samples))))


def labelled(task: Path, pictures: Path) -> list[Sample]:
    """A zero-shot task's pictures, each with its class's name as the caption.

    Args:
        task: folder in CLIP_benchmark's WebDataset layout.
        pictures: folder that pictures are unpacked into.
    """
    names = (task / "classnames.txt").read_text(encoding="utf-8").splitlines()
    pool = Pool([task / "test"])
    samples = []
    for row in range(len(pool)):
        key = pool.key(row)
        picture, number = pool.read(row, "png"), pool.read(row, "cls")
        if picture is None or number is None:
            raise DataError(f"{task} has no picture or no class for '{key}'", remedy="build the box anew")
        target = pictures / task.name / f"{Path(key).name}.png"
        if not target.exists():
            with whole_file(target) as temporary:
                temporary.write_bytes(picture)
        turn = (NAME, as_answer(names[int(number)]))
        samples.append(Sample(f"{task.name}-{key}", (turn,), (target,), task.name))
    return samples


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
            kind=_kind(answer),
        )
        for number, (question, answer, picture) in enumerate(entries)
    ]


def _kind(answer: str) -> str:
    if answer in ("yes", "no"):
        return "easy yes or no"
    return "easy shape" if answer in SHAPES else "easy colour"
