# SPDX-License-Identifier: Apache-2.0
"""What the loop joins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from aced_sdk.cache import EmbeddingCache
from aced_sdk.curation import DrawStatistics
from aced_sdk.data import SuperBatches
from aced_sdk.engine import Callback, Engine
from aced_sdk.engine.events import Event
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
        reference: embeddings to select by in each step, where the curation reads them.
        teachers: embeddings to distil from, in the numbering of the objective's terms.
        objective: embeddings of a sub-batch to its loss.
        statistics: draw counts of the pool.
        pool: fingerprint of the pool, which checkpoints are bound to.
        bad: per row of the pool whether its caption is known to be wrong; None where nobody knows.
        keys: from rows of the pool (int64 [K]) to the names of their samples.
        generator: noise of the selection.
        callbacks: hear every event.
    """

    engine: Engine
    student: DualEncoder
    batches: Callable[[int], SuperBatches]
    reference: EmbeddingCache | None
    teachers: tuple[EmbeddingCache, ...]
    objective: Objective
    statistics: DrawStatistics
    pool: str
    bad: Tensor | None
    keys: Callable[[Tensor], list[str]]
    generator: torch.Generator
    callbacks: list[Callback] = field(default_factory=list)

    @property
    def frozen(self) -> list[str]:
        """What the embeddings of frozen models come from, which checkpoints are bound to."""
        return [cache.model for cache in (self.reference, *self.teachers) if cache is not None]

    def emit(self, event: Event) -> None:
        """Tell everyone who listens."""
        for callback in self.callbacks:
            callback(event)
