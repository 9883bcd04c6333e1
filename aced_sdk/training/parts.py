# SPDX-License-Identifier: Apache-2.0
"""The components of the training loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from aced_sdk.cache import EmbeddingCache
from aced_sdk.curation import DrawStatistics, Selector
from aced_sdk.data import Order, Pool, RowSet, Source, SuperBatches
from aced_sdk.data.rowset import Rows
from aced_sdk.engine import Callback, TrainingEngine
from aced_sdk.engine.events import Event
from aced_sdk.files import one_line
from aced_sdk.objectives import WeightedLosses
from aced_sdk.towers import DualEncoder


class Trainee(nn.Module):
    """The student as a module for engines: takes tensors, returns tensors."""

    def __init__(self, encoder: DualEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        out = self.encoder(images, tokens)
        return out.image, out.text, torch.as_tensor(out.scale), torch.as_tensor(out.bias)


@dataclass
class Parts:
    """The components of the training loop.

    Attributes:
        engine: trains a `Trainee` of `student`.
        student: the encoder to train.
        order: the lanes of the pool.
        batches: returns the stream of super-batches from a state of the order.
        selector: selects sub-batches.
        reference: the reference's embeddings; None if steps do not read them.
        teachers: the teachers' embeddings, by index.
        objective: computes the loss of a sub-batch.
        statistics: draw counts of the pool.
        pool: the pairs; a checkpoint stores its fingerprint.
        source: reads the pairs.
        rows: rows of the pool that may be drawn.
        usable: number of usable pairs.
        generator: noise of the selection.
        callbacks: called with each event.
    """

    engine: TrainingEngine
    student: DualEncoder
    order: Order
    batches: Callable[[Rows], SuperBatches]
    selector: Selector
    reference: EmbeddingCache | None
    teachers: tuple[EmbeddingCache, ...]
    objective: WeightedLosses
    statistics: DrawStatistics
    pool: Pool
    source: Source
    rows: RowSet
    usable: int
    generator: torch.Generator
    callbacks: list[Callback] = field(default_factory=list)

    @property
    def frozen(self) -> list[str]:
        """Fingerprints of the frozen models; a checkpoint stores them."""
        return [cache.model for cache in (self.reference, *self.teachers) if cache is not None]

    def keys(self, rows: Tensor) -> list[str]:
        """Keys of the samples at rows of the pool (int64 [K])."""
        return [one_line(self.pool.key(int(row))) for row in rows]

    def emit(self, event: Event) -> None:
        """Pass an event to all callbacks."""
        for callback in self.callbacks:
            callback(event)
