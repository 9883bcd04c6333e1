# SPDX-License-Identifier: Apache-2.0
"""The kinds of evaluation tasks: how labels are read and which metrics are computed.

To add a kind, write a class with the interface of `Kind`, and add it to `KINDS`.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
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
        kind: name of its kind: zero_shot, multilabel or retrieval.
        images: uint8 [N, 3, H, W].
        labels: zero_shot: int64 [N], the class of each picture. multilabel: bool [N, C]. retrieval: int64 [T], the
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
        name: as `Task.kind` has it.
        has_classes: whether the folder has class names and templates.
    """

    name: str
    has_classes: bool

    def check_size(self, name: str, pictures: int, classes: int) -> None:
        """Raise `EvaluationError` if a task is too large, before its pictures are read."""

    def label(self, pool: Pool, row: int, classes: int) -> Any:
        """The label of a sample; raises `UnusablePair`."""

    def collect(self, name: str, labels: Sequence[Any], classes: list[str]) -> Collected:
        """The labels of all usable samples as `Task` holds them."""

    def metrics(self, encoder: DualEncoder, images: Tensor, task: Task) -> dict[str, float]:
        """The metrics of a task, from the embeddings of its pictures."""


class ZeroShot:
    """Classification with one class per picture: KEY.cls."""

    name = "zero_shot"
    has_classes = True
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

    name = "multilabel"
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

    name = "retrieval"
    has_classes = False

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
"""Kinds by the word in `dataset_type.txt`; without that file a task is a classification."""


def run_task(encoder: DualEncoder, task: Task) -> dict[str, float]:
    """A task's metrics for an encoder whose preprocessing the task was loaded with.

    Raises:
        EvaluationError: if the encoder's embeddings are not finite: figures of such a model mean nothing.
    """
    kind = next(kind for kind in KINDS.values() if kind.name == task.kind)
    return kind.metrics(encoder, finite(encoder.encode_image(task.images), task), task)


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
