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
from vlm.data.chat import CAPTION_PROMPT
from vlm.data.conversation import check_words
from vlm.data.samples import Sample, Samples, read_json, readable, words
from vlm.data.skips import Skips, Unusable


def load_coco_captions(
    annotations: str | Path,
    image_root: str | Path,
    *,
    prompt: str = CAPTION_PROMPT,
    each_caption: bool = False,
    max_unusable_fraction: float = 0.02,
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
        max_unusable_fraction: largest fraction of the file's entries, and of the samples, that may be left out
            because they are malformed, empty, or have no readable picture; `Samples.skipped` and `Samples.reasons` list
            them.

    Raises:
        DataError: for another form of file, one id for two pictures, or too many bad entries; the first is named.
    """
    content, skips = read_json(annotations, "annotations"), Skips()
    images: dict[Any, Path] = {}
    captions: defaultdict[Any, list[str]] = defaultdict(list)
    for image in _records(content, "images", ("id", "file_name"), annotations, skips):
        path = Path(image_root) / str(image["file_name"])
        if images.setdefault(image["id"], path) != path:
            raise DataError(f"{annotations} gives the id {image['id']} to two pictures", remedy="give each its own id")
    for entry in _records(content, "annotations", ("image_id", "caption"), annotations, skips):
        with skips.counting():
            identity, text = entry["image_id"], str(entry["caption"]).strip()
            if identity not in images or not text:
                what = "is empty" if identity in images else "is of a picture that the file does not list"
                raise Unusable(
                    f"a caption of picture {identity} in {annotations} {what}",
                    remedy="correct or remove the entry",
                    reason="empty caption" if identity in images else "caption of an unknown picture",
                )
            check_words(f"a caption of picture {identity}", [("", text)], 1)
            captions[identity].append(text)
    skips.check(len(content["images"]) + len(content["annotations"]), max_unusable_fraction)
    samples = []
    for identity, texts in captions.items():
        groups = [[text] for text in texts] if each_caption else [texts]
        for number, group in enumerate(groups):
            key = f"{identity}-{number}" if each_caption else str(identity)
            with skips.counting():
                samples.append(Sample(key, ((prompt, group[0]),), (images[identity],), "caption", tuple(group)))
    read = readable(samples, skips, len(samples) + skips.reasons.total(), max_unusable_fraction, Path(image_root))
    bare = tuple(f"picture {identity} has no caption" for identity in images if identity not in captions)
    return Samples(read.samples, read.skipped + bare, read.reasons)


def load_vqav2(
    questions: str | Path,
    annotations: str | Path,
    image_root: str | Path,
    *,
    image_name: str | None = None,
    max_unusable_fraction: float = 0.02,
) -> Samples:
    """Read VQAv2's two files; a sample's `answers` are all annotators', its `kind` is VQAv2's `answer_type`.

    Args:
        questions: `{"data_subtype", "questions": [{"question_id", "image_id", "question"}]}`.
        annotations: `{"annotations": [{"question_id", "image_id", "answer_type", "multiple_choice_answer", "answers":
            [{"answer"}]}]}`.
        image_root: folder of the pictures.
        image_name: a picture's name there; None is COCO's of 2014, `COCO_<data_subtype>_{image_id:012d}.jpg`. Pictures
            of 2017 have `{image_id:012d}.jpg`.
        max_unusable_fraction: as in `load_coco_captions`.

    Raises:
        DataError: for another form of file, several entries for one question, or too many bad entries: malformed, a
            question without its annotation or the reverse, two different pictures for one question. The first is named.
    """
    asked, answered = read_json(questions, "questions"), read_json(annotations, "annotations")
    subtype = str(asked.get("data_subtype", "") if isinstance(asked, dict) else "")
    if not image_name and not re.fullmatch(r"[\w-]*", subtype):  # it becomes part of a format string
        raise DataError(
            f"the data_subtype of {questions} is {printable(repr(subtype))}",
            remedy="correct the file, or give image_name",
            field="questions",
        )
    name, skips = image_name or f"COCO_{subtype}_{{image_id:012d}}.jpg", Skips()
    fields = ("question_id", "image_id", "answer_type", "multiple_choice_answer", "answers")
    answering = _records(answered, "annotations", fields, annotations, skips)
    replies = {entry["question_id"]: entry for entry in answering}
    asking = _records(asked, "questions", ("question_id", "image_id", "question"), questions, skips)
    numbers = [entry["question_id"] for entry in asking]
    for file, count, ids in ((questions, len(asking), set(numbers)), (annotations, len(answering), replies.keys())):
        if len(ids) < count:
            raise DataError(
                f"{file} has {count} entries for {len(ids)} questions", remedy="leave one entry for each question_id"
            )
    samples = []
    for key in sorted(replies.keys() - set(numbers), key=str):
        with skips.counting():
            raise _unmatched(key, questions)
    for entry in asking:
        with skips.counting():
            samples.append(_answered(entry, replies, name, Path(image_root), annotations))
    skips.check(len(asked["questions"]) + len(answered["annotations"]), max_unusable_fraction)
    return readable(samples, skips, len(samples) + skips.reasons.total(), max_unusable_fraction, Path(image_root))


def _unmatched(key: object, file: str | Path) -> Unusable:
    return Unusable(
        f"question {key} is not in {file}",
        remedy="name the questions and the annotations of the same split",
        field="annotations",
        reason="question in one file alone",
    )


def _answered(
    entry: Mapping[str, Any], replies: Mapping[Any, Mapping[str, Any]], name: str, root: Path, annotations: str | Path
) -> Sample:
    """A question of VQAv2 with its answers.

    Raises:
        Unusable: if it has none, or is malformed.
    """
    key = entry["question_id"]
    if key not in replies:
        raise _unmatched(key, annotations)
    reply = replies[key]
    if reply["image_id"] != entry["image_id"]:
        raise Unusable(
            f"question {key} is about picture {entry['image_id']}, its annotation about {reply['image_id']}",
            remedy="name the questions and the annotations of the same split",
            field="annotations",
            reason="two pictures for one question",
        )
    try:
        path = root / name.format(image_id=entry["image_id"])
        people = tuple(words(one["answer"]) for one in reply["answers"])
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise Unusable(
            f"question {key} has no picture name or answers in VQAv2's form ({type(error).__name__}: {error})",
            remedy="write image_name with {image_id} alone, and answers as [{'answer'}]",
            field="image_name",
            reason="not in VQAv2's form",
        ) from error
    turn = (str(entry["question"]), str(reply["multiple_choice_answer"]))
    if not all(text.strip() for text in turn):
        raise Unusable(
            f"question {key} or its answer is empty", remedy="correct or remove the entry", reason="empty question"
        )
    check_words(f"question {key}", [turn], 1)
    return Sample(str(key), (turn,), (path,), str(reply["answer_type"]), people)


def _records(
    content: Any, part: str, fields: tuple[str, ...], path: str | Path, skips: Skips
) -> list[Mapping[str, Any]]:
    """The objects under `part` that have these fields; the others are left out.

    Raises:
        DataError: if there is no such list.
    """
    found = content.get(part) if isinstance(content, dict) else None
    if not isinstance(found, list):
        raise DataError(f"{path} has no list '{part}'", remedy="name the file as its authors publish it")
    kept = []
    for index, entry in enumerate(found):
        with skips.counting():
            _check_record(entry, fields, f"number {index} of '{part}' in {path}")
            kept.append(entry)
    return kept


def _check_record(entry: Any, fields: tuple[str, ...], name: str) -> None:
    reason = "entry of another form"
    if lacking := [field for field in fields if not isinstance(entry, dict) or field not in entry]:
        raise Unusable(f"{name} has no {', '.join(lacking)}", remedy="correct the entry", reason=reason)
    for field in fields:
        kinds = str | int if field.endswith("_id") or field == "id" else str
        odd = field.endswith("id") and not str(entry[field]).isprintable()  # it is part of messages
        if field != "answers" and (odd or not isinstance(entry[field], kinds)):
            raise Unusable(
                f"{name} has {entry[field]!r:.60} for its {field}", remedy="correct the entry", reason=reason
            )
