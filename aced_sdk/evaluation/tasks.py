# SPDX-License-Identifier: Apache-2.0
"""Evaluation tasks in CLIP_benchmark's WebDataset layout, loaded once per preprocessing."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from aced_sdk.data.pool import Pool, UnusablePair
from aced_sdk.errors import DataError, EvaluationError
from aced_sdk.towers import DualEncoder

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
    folder = data_root / name
    if not folder.is_dir():
        there = sorted(p.name for p in data_root.glob("*") if p.is_dir()) if data_root.is_dir() else []
        raise EvaluationError(
            f"there is no task '{name}' under {data_root}",
            remedy=f"take one of: {', '.join(there)}"
            if there
            else "put task folders in CLIP_benchmark's WebDataset layout there",
            field="evaluation.tasks",
        )
    kind_file = folder / "dataset_type.txt"
    retrieval = kind_file.is_file() and kind_file.read_text(encoding="utf-8").strip() == "retrieval"
    try:
        pool = Pool([folder / "test"])
    except DataError as error:
        raise EvaluationError(
            f"the task '{name}' cannot be read: {error.cause}", remedy="restore its folder", field="evaluation.tasks"
        ) from error
    classes = [] if retrieval else _lines(folder / "classnames.txt")
    templates = [] if retrieval else _lines(folder / "zeroshot_classification_templates.txt")
    images: list[Tensor] = []
    labels: list[list[int]] = []  # of each picture: its class, or its texts
    numbers: dict[str, int] = {}
    skipped = Counter[str]()
    for row in range(len(pool)):
        try:
            own = pool.text(row).splitlines() if retrieval else [_label(pool.read(row, "cls"), len(classes))]
            images.append(encoder.resize(pool.image(row, max_pixels)))
        except UnusablePair as reason:
            skipped[str(reason)] += 1
            continue
        labels.append([numbers.setdefault(x, len(numbers)) if isinstance(x, str) else x for x in own])
    if not images:
        raise EvaluationError(f"the task '{name}' has no usable sample ({dict(skipped)})", remedy="restore its folder")
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


def _lines(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise EvaluationError(f"cannot read {path}: {error.strerror}", remedy="restore the task's folder") from None
    filled = [line for line in lines if line.strip()]
    if not filled:
        raise EvaluationError(f"{path} is empty", remedy="restore the task's folder")
    return filled
