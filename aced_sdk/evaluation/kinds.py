# SPDX-License-Identifier: Apache-2.0
"""The kinds of evaluation tasks: how labels are read and which metrics are computed.

To add a kind, write a class with the interface of `Kind`, or a subclass of `ZeroShot` or `Retrieval`, and add an
instance to `KINDS`.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from statistics import mean
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from aced_sdk.data.arrays import BROKEN_ARRAY, read_array_header
from aced_sdk.data.pool import Pool, UnusablePair
from aced_sdk.errors import EvaluationError
from aced_sdk.evaluation.metrics import class_embeddings, merged_retrieval, multilabel, retrieval, zero_shot
from aced_sdk.files import one_line
from aced_sdk.towers import DualEncoder

_FIELD = "evaluation.tasks"
_MAX_LABEL = 64  # bytes
_MAX_CAPTION, _MAX_CAPTIONS = 4096, 100  # bytes of one, number of a picture
_MAX_MATCHES = 2**33  # pictures times captions: bytes of memory
_MAX_SCORES = 2**29  # pictures times classes of a multilabel task, 4 bytes and more for each

Collected = tuple[Tensor, list[str], Tensor]  # labels, texts and captions of a `Task`


@dataclass(frozen=True, eq=False)
class Task:
    """A held-out task, ready for one kind of preprocessing.

    Attributes:
        name: as it was asked for.
        kind: key of its kind in `KINDS`: classification, multilabel, retrieval, or one of your own.
        images: uint8 [N, 3, H, W].
        labels: classification: int64 [N], the class of each picture. multilabel: bool [N, C]. retrieval: int64 [T], the
            picture that each caption belongs to.
        texts: class names, or the distinct captions.
        captions: int64 [T], the number in `texts` of each caption; empty for classification.
        templates: prompts with `{c}` for the class; empty for retrieval.
        skipped: reason to count of unusable samples.
    """

    name: str
    kind: str
    images: Tensor
    labels: Tensor
    texts: list[str]
    captions: Tensor
    templates: list[str]
    skipped: dict[str, int]


class Kind(Protocol):
    """A kind of task.

    Attributes:
        has_classes: whether the folder has class names and templates.
        main_metric: name of the metric that enters means over tasks; the mean of several, if it is a tuple.
    """

    has_classes: bool
    main_metric: str | tuple[str, ...]

    def check_size(self, name: str, pictures: int, classes: int) -> None:
        """Raise `EvaluationError` if a task is too large, before its pictures are read."""

    def label(self, pool: Pool, row: int, classes: int) -> Any:
        """The label of a sample; raises `UnusablePair`."""

    def collect(self, name: str, labels: Sequence[Any], classes: list[str]) -> Collected:
        """The labels of all usable samples as `Task` holds them."""

    def metrics(self, encoder: DualEncoder, images: Tensor, task: Task) -> dict[str, float]:
        """The metrics of a task by name, finite numbers, from the embeddings of its pictures."""


class ZeroShot:
    """Classification with one class per picture: KEY.cls."""

    has_classes = True
    main_metric: str | tuple[str, ...] = "acc1"
    score = staticmethod(zero_shot)

    def check_size(self, name: str, pictures: int, classes: int) -> None:
        """Any size."""

    def label(self, pool: Pool, row: int, classes: int) -> int:
        text = (pool.read(row, "cls", _MAX_LABEL) or b"").strip()
        if not re.fullmatch(rb"-?[0-9]+", text):  # `int` also reads 1_0 as 10, and digits of other scripts
            raise UnusablePair("class is not a number" if text else "no class")
        label = int(text)
        if not 0 <= label < classes:
            raise UnusablePair("class out of range")
        return label

    def collect(self, name: str, labels: Sequence[Any], classes: list[str]) -> Collected:
        return torch.stack([torch.as_tensor(label) for label in labels]), classes, torch.empty(0, dtype=torch.int64)

    def metrics(self, encoder: DualEncoder, images: Tensor, task: Task) -> dict[str, float]:
        return self.score(images, finite(class_embeddings(encoder, task.texts, task.templates), task), task.labels)


class Multilabel(ZeroShot):
    """Classification with several classes per picture: KEY.npy, one number per class."""

    main_metric: str | tuple[str, ...] = "mean_average_precision"
    score = staticmethod(multilabel)

    def check_size(self, name: str, pictures: int, classes: int) -> None:
        if pictures * classes > _MAX_SCORES:
            raise _too_large(name, f"{pictures:,} pictures and {classes:,} classes")

    def label(self, pool: Pool, row: int, classes: int) -> Any:
        try:
            raw = pool.read(row, "npy", 16 * classes + 4096)
            if raw is None:
                raise ValueError
            stream = io.BytesIO(raw)
            shape, _, dtype = read_array_header(stream)
            if shape != (classes,) or dtype.kind not in "biuf":
                raise ValueError
            values = np.frombuffer(stream.read(classes * dtype.itemsize), dtype).astype(np.float64)
            if values.shape != shape or not np.isfinite(values).all():  # cut off, or a class that is not known
                raise ValueError
            return torch.from_numpy(values > 0)
        except BROKEN_ARRAY as error:
            raise UnusablePair("no classes") from error


class Retrieval:
    """Pictures and captions, found from each other: KEY.txt, one caption per line."""

    has_classes = False
    main_metric: str | tuple[str, ...] = ("image_to_text_r1", "text_to_image_r1")

    def check_size(self, name: str, pictures: int, classes: int) -> None:
        """Known only once the captions are counted."""

    def label(self, pool: Pool, row: int, classes: int) -> list[str]:
        lines = [line.strip() for line in pool.text(row).split("\n") if line.strip()]
        if len(lines) > _MAX_CAPTIONS:
            raise UnusablePair("too many captions")
        if any(len(line.encode()) > _MAX_CAPTION for line in lines):
            raise UnusablePair("caption has too many bytes")
        return lines

    def collect(self, name: str, labels: Sequence[Any], classes: list[str]) -> Collected:
        lines = [(picture, line) for picture, own in enumerate(labels) for line in own]
        if len(labels) * len(lines) > _MAX_MATCHES:
            raise _too_large(name, f"{len(labels):,} pictures and {len(lines):,} captions")
        numbers = {line: number for number, line in enumerate(dict.fromkeys(line for _, line in lines))}
        captions = torch.tensor([numbers[line] for _, line in lines])
        return torch.tensor([picture for picture, _ in lines]), list(numbers), captions

    def metrics(self, encoder: DualEncoder, images: Tensor, task: Task) -> dict[str, float]:
        texts = finite(encoder.encode_text(task.texts), task)[task.captions.to(images.device)]
        owner = task.labels
        return retrieval(images, texts, owner) | merged_retrieval(images, texts, owner, task.captions)


KINDS: dict[str, Kind] = {"classification": ZeroShot(), "multilabel": Multilabel(), "retrieval": Retrieval()}
"""Kinds by the word in `dataset_type.txt`, in which capitals do not matter; without that file a task is a
classification."""

_OURS = dict(KINDS)
_PARTS = ("has_classes", "main_metric", "check_size", "label", "collect", "metrics")  # of `Kind`


def find_kind(word: str) -> str | None:
    """Key of a kind in `KINDS`; None if it is unknown.

    Raises:
        EvaluationError: if it lacks a part of `Kind`.
    """
    key = word if word in KINDS else {key.lower(): key for key in KINDS}.get(word.lower())
    if key is not None and (missing := [part for part in _PARTS if not hasattr(KINDS[key], part)]):
        raise EvaluationError(
            f"the kind of task '{one_line(key, 80)}' has no {', '.join(missing)}",
            remedy="give it all of aced_sdk.evaluation.Kind, or make it a subclass of ZeroShot or Retrieval",
            field=_FIELD,
        )
    return key


def run_task(encoder: DualEncoder, task: Task) -> dict[str, float]:
    """A task's metrics for an encoder whose preprocessing the task was loaded with.

    Raises:
        EvaluationError: if the encoder's embeddings are not finite: figures of such a model mean nothing. Or if its
            kind does not return finite numbers, its main metric among them.
    """
    metrics = KINDS[task.kind].metrics(encoder, finite(encoder.encode_image(task.images), task), task)
    wrong = [name for name, value in metrics.items() if not (isinstance(value, Real) and math.isfinite(value))]
    wrong += [name for name in _main_names(task) if name not in metrics]
    if wrong:
        value = metrics.get(wrong[0], "missing")
        raise EvaluationError(
            f"the metric '{one_line(wrong[0], 80)}' of the task '{one_line(task.name)}' is {one_line(repr(value), 80)}",
            remedy=f"return it from `metrics` of the kind '{one_line(task.kind, 80)}' as a finite number (float)",
            field=_FIELD,
        )
    return {name: float(value) for name, value in metrics.items()}


def first_of_own_kinds(tasks: Sequence[Task]) -> list[Task]:
    """The smallest task of each kind that this package does not have."""
    own = [task for task in tasks if KINDS[task.kind] is not _OURS.get(task.kind)]
    largest_first = sorted(own, key=lambda task: len(task.images), reverse=True)
    return list({task.kind: task for task in largest_first}.values())


def main_metric(task: Task, metrics: dict[str, float]) -> float:
    """The metric of a task that enters means: that of its kind, or the mean of several.

    Top-1 accuracy, mean average precision, or for retrieval the mean of both recalls at 1.
    """
    return mean(metrics[name] for name in _main_names(task))


def _main_names(task: Task) -> tuple[str, ...]:
    names = KINDS[task.kind].main_metric
    return (names,) if isinstance(names, str) else tuple(names)


def finite(embeddings: Tensor, task: Task) -> Tensor:
    """The embeddings.

    Raises:
        EvaluationError: if they are not finite.
    """
    if not bool(embeddings.isfinite().all()):
        raise EvaluationError(
            f"the model's embeddings of the task '{one_line(task.name)}' are not finite",
            remedy="check the model's weights: its training has diverged, or the folder is damaged",
        )
    return embeddings


def _too_large(name: str, size: str) -> EvaluationError:
    cause = f"the task '{one_line(name)}' has {size}, too many to rank"
    return EvaluationError(cause, remedy="split it", field=_FIELD)
