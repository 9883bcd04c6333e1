# SPDX-License-Identifier: Apache-2.0
"""What the loop joins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from aced_sdk.cache import EmbeddingCache
from aced_sdk.curation import DrawStatistics, Selector
from aced_sdk.data import Pool, Source, SuperBatches
from aced_sdk.data.source import Rows
from aced_sdk.engine import Callback, Engine
from aced_sdk.engine.events import Event
from aced_sdk.files import one_line
from aced_sdk.objectives import Objective
from aced_sdk.towers import DualEncoder


class Trainee(nn.Module):
    """The student as engines hold it: tensors in, tensors out."""

    def __init__(self, encoder: DualEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        out = self.encoder(images, tokens)
        return out.image, out.text, torch.as_tensor(out.scale), torch.as_tensor(out.bias)


@dataclass
class Parts:
    """What the loop joins.

    Attributes:
        engine: holds a `Trainee` of `student`.
        student: the encoder that learns.
        batches: opens the stream of super-batches at a position.
        selector: selects sub-batches.
        reference: embeddings to select by in each step, if the curation reads them.
        teachers: embeddings to distil from, in the numbering of the objective's terms.
        objective: embeddings of a sub-batch to its loss.
        statistics: draw counts of the pool.
        pool: the pairs; checkpoints are bound to its fingerprint.
        source: reads them.
        rows: int64 [K], rows of the pool that may be drawn.
        usable: number of pairs that can be read.
        noisy: bool [N], whether a pair's caption is known to be wrong; None if that is not known.
        generator: noise of the selection.
        callbacks: receive every event.
    """

    engine: Engine
    student: DualEncoder
    batches: Callable[[int], SuperBatches]
    selector: Selector
    reference: EmbeddingCache | None
    teachers: tuple[EmbeddingCache, ...]
    objective: Objective
    statistics: DrawStatistics
    pool: Pool
    source: Source
    rows: Rows
    usable: int
    noisy: Tensor | None
    generator: torch.Generator
    callbacks: list[Callback] = field(default_factory=list)

    @property
    def frozen(self) -> list[str]:
        """What the embeddings of frozen models come from; checkpoints are bound to it."""
        return [cache.model for cache in (self.reference, *self.teachers) if cache is not None]

    def keys(self, rows: Tensor) -> list[str]:
        """Names of the samples at some rows of the pool (int64 [K])."""
        return [one_line(self.pool.samples[int(row)].key) for row in rows]

    def emit(self, event: Event) -> None:
        """Pass an event to all callbacks."""
        for callback in self.callbacks:
            callback(event)
