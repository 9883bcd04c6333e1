# SPDX-License-Identifier: Apache-2.0
"""Evaluation tasks in CLIP_benchmark's WebDataset layout, loaded once per preprocessing."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from aced_sdk.data.pool import Pool, UnusablePair
from aced_sdk.data.source import resized
from aced_sdk.errors import DataError, EvaluationError
from aced_sdk.files import ReadError, inside, one_line, printable, read_text
from aced_sdk.files.reading import MIB
from aced_sdk.towers import DualEncoder

_MAX_FILE = 4 * MIB
_MAX_LINE = 500  # letters of a class name or template
_MAX_LABEL = 64  # bytes
_MAX_CAPTION, _MAX_CAPTIONS = 4096, 100  # bytes of one, number of a picture
_MAX_PROMPTS = 2_000_000  # ImageNet-21k with 80 templates has 1.7 million
_MAX_LETTERS = 2**28  # of all prompts
_MAX_MATCHES = 2**33  # pictures times captions: bytes of memory

# The 27 tasks of ACED's StableEval (method: chosen of 34 for low variance over training seeds; list reconstructed).
STABLE_EVAL: dict[str, tuple[str, ...]] = {
    "imagenet": ("imagenet1k",),
    "imagenet_shift": ("imagenetv2", "imagenet-a", "imagenet-r", "objectnet", "imagenet_sketch"),
    "object": (
        "cifar10", "cifar100", "caltech101", "voc2007", "stl10", "food101", "pets", "flowers", "cars", "fgvc_aircraft",
    ),
    "scene": ("sun397", "resisc45", "geode", "fmow", "dtd", "eurosat", "pcam", "dollar_street", "iwildcam"),
    "retrieval": ("mscoco_captions", "flickr30k"),
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Task:
    """A held-out task, ready for one kind of preprocessing.

    Attributes:
        name: its folder's name.
        kind: zero-shot classification or retrieval.
        images: uint8 [N, 3, H, W].
        labels: int64 [N]; for retrieval bool [N, T], which texts are a picture's own.
        texts: class names, or the distinct captions.
        templates: prompts with `{c}` for the class; empty for retrieval.
        skipped: reason to count of unusable samples.
    """

    name: str
    kind: Literal["zero_shot", "retrieval"]
    images: Tensor
    labels: Tensor
    texts: list[str]
    templates: list[str]
    skipped: dict[str, int]


def expand_names(names: list[str] | tuple[str, ...]) -> list[str]:
    """Task names with `stable_eval` replaced by its 27 tasks."""
    result: list[str] = []
    for name in names:
        result += [task for group in STABLE_EVAL.values() for task in group] if name == "stable_eval" else [name]
    return result


def load_task(name: str, data_root: Path, encoder: DualEncoder, max_pixels: int = 100_000_000) -> Task:
    """Read a task's test split and resize its pictures for `encoder`.

    Raises:
        EvaluationError: if the task's folder or a file in it is missing or broken.
    """
    folder = _folder(name, data_root)
    try:
        kind_file = inside(folder, "dataset_type.txt")
        retrieval = kind_file.exists() and read_text(kind_file, _MAX_FILE).strip() == "retrieval"
        pool = Pool([folder / "test"])
    except (DataError, ReadError) as error:
        raise EvaluationError(
            f"the task '{one_line(name)}' cannot be read: {error.cause}",
            remedy="restore its folder",
            field="evaluation.tasks",
        ) from error
    classes = [] if retrieval else _lines(folder, "classnames.txt")
    templates = [] if retrieval else _lines(folder, "zeroshot_classification_templates.txt")
    letters = len(classes) * sum(map(len, templates)) + "".join(templates).count("{c}") * sum(map(len, classes))
    if len(classes) * len(templates) > _MAX_PROMPTS or letters > _MAX_LETTERS:
        raise EvaluationError(
            f"the task '{one_line(name)}' has {len(classes):,} classes and {len(templates):,} templates: more than "
            f"{_MAX_PROMPTS:,} prompts or {_MAX_LETTERS:,} letters",
            remedy="use fewer templates",
        )
    images: list[Tensor] = []
    labels: list[list[int]] = []  # of each picture: its class, or its texts
    numbers: dict[str, int] = {}
    skipped = Counter[str]()
    for row in range(len(pool)):
        try:
            own = _captions(pool.text(row)) if retrieval else [_label(pool.read(row, "cls", _MAX_LABEL), len(classes))]
            images.append(resized(pool, row, encoder, max_pixels))
        except UnusablePair as reason:
            skipped[str(reason)] += 1
            continue
        labels.append([numbers.setdefault(x, len(numbers)) if isinstance(x, str) else x for x in own])
    if not images:
        raise EvaluationError(
            f"the task '{one_line(name)}' has no usable sample ({dict(skipped)})", remedy="restore its folder"
        )
    if len(images) * len(numbers) > _MAX_MATCHES:
        raise EvaluationError(
            f"the task '{one_line(name)}' has {len(images):,} pictures and {len(numbers):,} captions, too many to rank",
            remedy="split it",
        )
    if not retrieval:
        return Task(
            name, "zero_shot", torch.stack(images), torch.tensor(labels)[:, 0], classes, templates, dict(skipped)
        )
    own_texts = torch.zeros(len(images), len(numbers), dtype=torch.bool)
    for picture, texts in enumerate(labels):
        own_texts[picture, texts] = True
    return Task(name, "retrieval", torch.stack(images), own_texts, list(numbers), [], dict(skipped))


def _label(raw: bytes | None, classes: int) -> int:
    try:
        label = int((raw or b"").decode())
    except ValueError as error:
        raise UnusablePair("no class") from error
    if not 0 <= label < classes:
        raise UnusablePair("class out of range")
    return label


def _captions(text: str) -> list[str]:
    lines = text.splitlines()
    if len(lines) > _MAX_CAPTIONS:
        raise UnusablePair("too many captions")
    if any(len(line.encode()) > _MAX_CAPTION for line in lines):
        raise UnusablePair("caption has too many bytes")
    return lines


def _folder(name: str, data_root: Path) -> Path:
    """The task's folder, which may be a link."""
    wrong = not name or "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts
    if not wrong and os.path.isdir(data_root / name):
        return data_root / name
    there = sorted(p.name for p in data_root.glob("*") if os.path.isdir(p)) if os.path.isdir(data_root) else []
    raise EvaluationError(
        f"there is no task '{one_line(name)}' under {printable(data_root)}",
        remedy=f"take one of: {printable(', '.join(there))}"
        if there
        else "put task folders in CLIP_benchmark's WebDataset layout there",
        field="evaluation.tasks",
    )


def _lines(folder: Path, name: str) -> list[str]:
    remedy = "restore the task's folder"
    try:
        lines = read_text(inside(folder, name), _MAX_FILE).splitlines()
    except ReadError as error:
        raise EvaluationError(error.cause, remedy=remedy) from None
    filled = [line for line in lines if line.strip()]
    if not filled:
        raise EvaluationError(f"{printable(folder / name)} is empty", remedy=remedy)
    if any(len(line) > _MAX_LINE for line in filled):
        raise EvaluationError(f"{printable(folder / name)} has a line of more than {_MAX_LINE} letters", remedy=remedy)
    return filled
