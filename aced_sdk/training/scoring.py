# SPDX-License-Identifier: Apache-2.0
"""The student's embeddings of a super-batch, without gradient, as cheaply as the config allows."""

from __future__ import annotations

import torch
from torch import Tensor

from aced_sdk.config import DistillConfig
from aced_sdk.config.curation import Curation
from aced_sdk.data import SuperBatch
from aced_sdk.engine.base import precision
from aced_sdk.towers import DualEncoder, Embeddings, shrink


@torch.no_grad()
def score(batch: SuperBatch, student: DualEncoder, config: DistillConfig, device: torch.device) -> Embeddings:
    """Embeddings of all B candidates, in evaluation mode and the engine's precision.

    Pictures have `curation.scoring_size` where it is set. Captions repeat, and each distinct one is embedded once.
    """
    step, size = config.engine.scoring_batch, config.curation.scoring_side
    distinct, inverse = torch.unique(batch.tokens, dim=0, return_inverse=True)
    # On a CPU the encoder's own, smaller batches stay in the caches.
    at_once = None if device.type == "cpu" else step
    with precision(config.engine, device):
        images = torch.cat(
            [student.encode_image(shrunk(part.to(device), size), at_once) for part in torch.split(batch.images, step)]
        )
        texts = student.encode_text(distinct, min(step, 256) if at_once is None else step)
    texts = texts[inverse.to(texts.device)]
    return Embeddings(images, texts, student.scale, student.bias, config.objective.trained_with)


def shrunk(images: Tensor, size: int | None) -> Tensor:
    """uint8 [N, 3, H, W] at `size` pixels a side; None: as they are."""
    return images if size is None else shrink(images, size)


def cheap_places(curation: Curation, pairs: int) -> Tensor:
    """bool [pairs]: which pairs of each sub-batch are trained at the scoring size, spread over the draw order."""
    places, of = torch.arange(pairs) % curation.sub_batch, curation.sub_batch
    cheap = round(curation.cheap_fraction * of)
    return (places + 1) * cheap // of > places * cheap // of
