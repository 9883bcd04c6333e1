# SPDX-License-Identifier: Apache-2.0
"""Evaluation tasks in CLIP_benchmark's WebDataset layout, loaded once per preprocessing."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aced_sdk.config.base import IMPORT_HINT
from aced_sdk.data.pool import Pool, UnusablePair
from aced_sdk.data.source import resized
from aced_sdk.errors import DataError, EvaluationError
from aced_sdk.evaluation.kinds import KINDS, Task, find_kind
from aced_sdk.evaluation.stable_eval import folder_names
from aced_sdk.files import ReadError, inside, memory_limit, one_line, printable, read_text
from aced_sdk.files.reading import MIB
from aced_sdk.towers import DualEncoder

_LINE_ENDS = re.compile("[\v\f\r\x1c-\x1e\x85\u2028\u2029]")  # by which `str.splitlines` breaks, beside \n
_FIELD = "evaluation.tasks"
_RESTORE = "restore the task's folder"
_MAX_FILE = 4 * MIB
_MAX_LINE = 500  # letters of a class name or template
_MAX_PROMPT = 2 * _MAX_LINE
_MAX_PROMPTS = 2_000_000  # ImageNet-21k with 80 templates has 1.7 million
_MAX_LETTERS = 2**28  # of all prompts
_MAX_SHARE = 0.75  # of the memory, for the pictures of a task


@dataclass(frozen=True, eq=False)
class TaskFolder:
    """A task's files before its pictures are read.

    Attributes:
        name: as it was asked for.
        kind: key in `KINDS` of what reads labels and computes metrics.
        classes: class names; empty for retrieval.
        templates: prompts with `{c}`; empty for retrieval.
        pool: the samples of its test split.
    """

    name: str
    kind: str
    classes: list[str]
    templates: list[str]
    pool: Pool


def open_task(name: str, data_root: Path) -> TaskFolder:
    """Find a task's folder and check everything but its samples.

    Args:
        name: a folder under `data_root`, or a task of StableEval whose folder has one of its published names.
        data_root: folder with one folder per task.

    Raises:
        EvaluationError: if the folder or a file in it is missing or cannot be used.
    """
    folder = _folder(name, data_root)
    kind = _kind(folder)
    try:
        pool = Pool([folder / "test"], patterns=False)
    except DataError as error:
        cause = f"the task '{one_line(name)}' cannot be read: {error.cause}"
        raise EvaluationError(cause, remedy=_RESTORE, field=_FIELD) from error
    if not KINDS[kind].has_classes:
        return TaskFolder(name, kind, [], [], pool)
    classes, templates = _classes(folder), _templates(folder)
    longest = max(map(len, classes))
    if any(len(template) + template.count("{c}") * longest > _MAX_PROMPT for template in templates):
        cause = f"the task '{one_line(name)}' has prompts of more than {_MAX_PROMPT:,} letters"
        raise EvaluationError(cause, remedy="shorten its class names or templates", field=_FIELD)
    letters = len(classes) * sum(map(len, templates)) + "".join(templates).count("{c}") * sum(map(len, classes))
    if len(classes) * len(templates) > _MAX_PROMPTS or letters > _MAX_LETTERS:
        raise EvaluationError(
            f"the task '{one_line(name)}' has {len(classes):,} classes and {len(templates):,} templates: more than "
            f"{_MAX_PROMPTS:,} prompts or {_MAX_LETTERS:,} letters",
            remedy="use fewer templates",
            field=_FIELD,
        )
    return TaskFolder(name, kind, classes, templates, pool)


def load_task(
    name: str,
    data_root: Path,
    encoder: DualEncoder,
    max_pixels: int = 100_000_000,
    max_unusable_fraction: float = 0.02,
) -> Task:
    """Read a task's test split and resize its pictures for `encoder`.

    Args:
        name: as in `open_task`.
        data_root: as in `open_task`.
        encoder: whose preprocessing is used.
        max_pixels: larger pictures are skipped.
        max_unusable_fraction: largest fraction of unusable samples; above it there is no figure.

    Raises:
        EvaluationError: as `open_task`, or if too many samples are unusable.
    """
    opened = open_task(name, data_root)
    pool, kind = opened.pool, KINDS[opened.kind]
    kind.check_size(name, len(pool), len(opened.classes))
    images = _room(name, len(pool), encoder.preprocess_config.size)
    own: list[Any] = []  # the label of each picture
    skipped = Counter[str]()
    for row in range(len(pool)):
        try:
            label = kind.label(pool, row, len(opened.classes))
            images[len(own)] = resized(pool, row, encoder.processor, max_pixels)
        except UnusablePair as reason:
            skipped[str(reason)] += 1
            continue
        own.append(label)
    if not own or skipped.total() > max_unusable_fraction * len(pool):
        reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.most_common(4))
        raise EvaluationError(
            f"{skipped.total()} of {len(pool)} samples of the task '{one_line(name)}' are unusable ({reasons})",
            remedy=f"{_RESTORE}, or raise max_unusable_fraction if that is expected",
            field="evaluation.max_unusable_fraction",
        )
    labels, texts, captions = kind.collect(name, own, opened.classes)
    return Task(name, opened.kind, images[: len(own)], labels, texts, captions, opened.templates, dict(skipped))


def _room(name: str, count: int, size: tuple[int, int]) -> Tensor:
    """Memory for the pictures of a task, which is taken up as it is written."""
    needed = 3 * math.prod(size) * count
    try:
        if needed > _MAX_SHARE * memory_limit():
            raise MemoryError
        return torch.empty(count, 3, *size, dtype=torch.uint8)
    except (RuntimeError, MemoryError):
        raise EvaluationError(
            f"the task '{one_line(name)}' has {count:,} pictures: at {size[0]} x {size[1]} they take "
            f"{needed / 1e9:.1f} GB of memory",
            remedy="use a smaller task, a tower with smaller pictures, or a machine with more memory",
            field=_FIELD,
        ) from None


def _folder(name: str, data_root: Path) -> Path:
    """The task's folder, which may be a link."""
    wrong = not name or "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts
    for folder in () if wrong else folder_names(name):
        if os.path.isdir(data_root / folder):
            return data_root / folder
    there = sorted(p.name for p in data_root.glob("*") if os.path.isdir(p)) if os.path.isdir(data_root) else []
    raise EvaluationError(
        f"there is no task '{one_line(name)}' under {printable(data_root)}",
        remedy=f"use one of: {printable(', '.join(there))}"
        if there
        else "put task folders in CLIP_benchmark's WebDataset layout there",
        field=_FIELD,
    )


def _kind(folder: Path) -> str:
    if not os.path.lexists(folder / "dataset_type.txt"):
        return "classification"
    text = _read(folder, "dataset_type.txt").strip()
    if (key := find_kind(text)) is None:
        raise EvaluationError(
            f"{printable(folder)} is an unknown kind of task: '{one_line(text[:40])}'",
            remedy=f"write one of: {', '.join(KINDS)}; {IMPORT_HINT}",
            field=_FIELD,
        )
    return key


def _classes(folder: Path) -> list[str]:
    names = _lines(folder, "classnames.txt")
    if "" in names:  # dropping it would shift the label of every class behind it
        raise EvaluationError(
            f"line {names.index('') + 1} of {printable(folder / 'classnames.txt')} is blank",
            remedy="write the class's name there",
            field=_FIELD,
        )
    return names


def _templates(folder: Path) -> list[str]:
    """Prompts with `{c}`; `{}` is accepted too."""
    lines = _lines(folder, "zeroshot_classification_templates.txt")
    templates = [line.replace("{}", "{c}") for line in lines if line]
    for template in templates:
        if "{c}" not in template:
            raise EvaluationError(
                f"a template of {printable(folder)} has no place for the class: '{one_line(template[:80])}'",
                remedy="write {c} or {} where the class's name belongs",
                field=_FIELD,
            )
    return templates


def _lines(folder: Path, name: str) -> list[str]:
    """The file's lines without blank ones at its end."""
    text = _read(folder, name).rstrip().replace("\r\n", "\n")
    lines = [line.strip() for line in text.split("\n")] if text else []
    if not lines:
        raise EvaluationError(f"{printable(folder / name)} is empty", remedy=_RESTORE, field=_FIELD)
    if found := _LINE_ENDS.search(text):
        # Some readers end a line there, and others do not: the numbers of the classes would differ.
        number = text.count("\n", 0, found.start()) + 1
        cause = f"line {number} of {printable(folder / name)} holds a character that may end a line"
        raise EvaluationError(cause, remedy="end lines with a line feed, and remove the character", field=_FIELD)
    if any(len(line) > _MAX_LINE for line in lines):
        cause = f"{printable(folder / name)} has a line of more than {_MAX_LINE} letters"
        raise EvaluationError(cause, remedy=_RESTORE, field=_FIELD)
    return lines


def _read(folder: Path, name: str) -> str:
    try:
        return read_text(inside(folder, name), _MAX_FILE)
    except ReadError as error:
        raise EvaluationError(error.cause, remedy=_RESTORE, field=_FIELD) from None
