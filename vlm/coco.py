# SPDX-License-Identifier: Apache-2.0
"""COCO's captions and VQAv2's questions, from the files that their authors publish."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aced_sdk.errors import DataError
from aced_sdk.files import printable
from vlm.data import Sample, Samples, read_json, readable, words
from vlm.generating import CAPTION_PROMPT


def load_coco_captions(
    annotations: str | Path,
    image_root: str | Path,
    *,
    prompt: str = CAPTION_PROMPT,
    each_caption: bool = False,
    max_bad_fraction: float = 0.02,
) -> Samples:
    """Read `captions_*.json`: `{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}`.

    A picture without a caption is left out and named in `Samples.skipped`. A picture outside of `image_root`, through a
    link too, counts as unreadable.

    Args:
        annotations: the file.
        image_root: folder that `file_name` is relative to.
        prompt: the question that the captions answer.
        each_caption: False gives a sample for each picture, with all its captions as right answers: for scores. True
            gives a sample for each caption: for training.
        max_bad_fraction: share of samples with a missing or unreadable picture above which nothing is returned.

    Raises:
        DataError: for another form of file, a caption of an unknown picture, or too many bad pictures.
    """
    content = read_json(annotations, "annotations")
    images: dict[Any, Path] = {}
    captions: defaultdict[Any, list[str]] = defaultdict(list)
    for image in _records(content, "images", ("id", "file_name"), annotations):
        path = Path(image_root) / str(image["file_name"])
        if images.setdefault(image["id"], path) != path:
            raise DataError(f"{annotations} gives the id {image['id']} to two pictures", remedy="give each its own id")
    for entry in _records(content, "annotations", ("image_id", "caption"), annotations):
        identity, text = entry["image_id"], str(entry["caption"]).strip()
        if identity not in images or not text:
            what = "is empty" if identity in images else "is of a picture that the file does not list"
            raise DataError(
                f"a caption of picture {identity} in {annotations} {what}", remedy="correct or remove the entry"
            )
        captions[identity].append(text)
    samples = []
    for identity, texts in captions.items():
        groups = [[text] for text in texts] if each_caption else [texts]
        for number, group in enumerate(groups):
            key = f"{identity}-{number}" if each_caption else str(identity)
            samples.append(Sample(key, ((prompt, group[0]),), (images[identity],), "caption", tuple(group)))
    read = readable(samples, max_bad_fraction, Path(image_root))
    bare = tuple(f"picture {identity} has no caption" for identity in images if identity not in captions)
    return Samples(read.samples, read.skipped + bare)


def load_vqav2(
    questions: str | Path,
    annotations: str | Path,
    image_root: str | Path,
    *,
    image_name: str | None = None,
    max_bad_fraction: float = 0.02,
) -> Samples:
    """Read VQAv2's two files; a sample's `answers` are all annotators', its `kind` is VQAv2's `answer_type`.

    Args:
        questions: `{"data_subtype", "questions": [{"question_id", "image_id", "question"}]}`.
        annotations: `{"annotations": [{"question_id", "image_id", "answer_type", "multiple_choice_answer", "answers":
            [{"answer"}]}]}`.
        image_root: folder of the pictures.
        image_name: a picture's name there; None is COCO's of 2014, `COCO_<data_subtype>_{image_id:012d}.jpg`. Pictures
            of 2017 have `{image_id:012d}.jpg`.
        max_bad_fraction: as in `load_coco_captions`.

    Raises:
        DataError: for another form of file, a question without its annotation or the reverse, two different pictures
            for one question, or too many bad pictures.
    """
    asked, answered = read_json(questions, "questions"), read_json(annotations, "annotations")
    subtype = str(asked.get("data_subtype", "") if isinstance(asked, dict) else "")
    if not image_name and not re.fullmatch(r"[\w-]*", subtype):  # it becomes part of a format string
        raise DataError(
            f"the data_subtype of {questions} is {printable(repr(subtype))}",
            remedy="correct the file, or give image_name",
            field="questions",
        )
    name = image_name or f"COCO_{subtype}_{{image_id:012d}}.jpg"
    fields = ("question_id", "image_id", "answer_type", "multiple_choice_answer", "answers")
    answering = _records(answered, "annotations", fields, annotations)
    replies = {entry["question_id"]: entry for entry in answering}
    asking = _records(asked, "questions", ("question_id", "image_id", "question"), questions)
    numbers = [entry["question_id"] for entry in asking]
    for file, count, ids in ((questions, len(asking), set(numbers)), (annotations, len(answering), replies.keys())):
        if len(ids) < count:
            raise DataError(
                f"{file} has {count} entries for {len(ids)} questions", remedy="leave one entry for each question_id"
            )
    if odd := sorted(replies.keys() ^ set(numbers), key=str):
        here = questions if odd[0] in replies else annotations
        raise DataError(
            f"{len(odd)} questions stand in one file alone; the first: {odd[0]} is not in {here}",
            remedy="name the questions and the annotations of the same split",
            field="annotations",
        )
    samples = []
    for entry in asking:
        reply, key = replies[entry["question_id"]], entry["question_id"]
        if reply["image_id"] != entry["image_id"]:
            raise DataError(
                f"question {key} is about picture {entry['image_id']}, its annotation about {reply['image_id']}",
                remedy="name the questions and the annotations of the same split",
                field="annotations",
            )
        try:
            path = Path(image_root) / name.format(image_id=entry["image_id"])
            people = tuple(words(one["answer"]) for one in reply["answers"])
        except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
            raise DataError(
                f"question {key} has no picture name or answers in VQAv2's form ({type(error).__name__}: {error})",
                remedy="write image_name with {image_id} alone, and answers as [{'answer'}]",
                field="image_name",
            ) from error
        turn = (str(entry["question"]), str(reply["multiple_choice_answer"]))
        samples.append(Sample(str(key), (turn,), (path,), str(reply["answer_type"]), people))
    return readable(samples, max_bad_fraction, Path(image_root))


def _records(content: Any, part: str, fields: tuple[str, ...], path: str | Path) -> list[Mapping[str, Any]]:
    """The list of objects under `part`, each with these fields.

    Raises:
        DataError: if it is not there, or an object lacks one.
    """
    found = content.get(part) if isinstance(content, dict) else None
    if not isinstance(found, list):
        raise DataError(f"{path} has no list '{part}'", remedy="name the file as its authors publish it")
    for index, entry in enumerate(found):
        if lacking := [name for name in fields if not isinstance(entry, dict) or name not in entry]:
            raise DataError(
                f"number {index} of '{part}' in {path} has no {', '.join(lacking)}", remedy="correct the entry"
            )
        for name in fields:
            kinds = str | int if name.endswith("_id") or name == "id" else str
            odd = name.endswith("id") and not str(entry[name]).isprintable()  # it is part of messages
            if name != "answers" and (odd or not isinstance(entry[name], kinds)):
                raise DataError(
                    f"number {index} of '{part}' in {path} has {entry[name]!r:.60} for its {name}",
                    remedy="correct the entry",
                )
    return found
