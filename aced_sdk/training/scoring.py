# SPDX-License-Identifier: Apache-2.0
"""Scoring: the student's embeddings of a super-batch, without gradient."""

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
    """Embed all B candidates in evaluation mode, in the engine's precision.

    Pictures are scored at `curation.scoring_size` if it is set. Equal captions are embedded once.
    """
    step, size = config.engine.scoring_batch, config.curation.scoring_side
    distinct, inverse = torch.unique(batch.tokens, dim=0, return_inverse=True)
    # On a CPU, the encoder's smaller default batches fit in the caches.
    at_once = None if device.type == "cpu" else step
    with precision(config.engine, device):
        images = torch.cat(
            [student.encode_image(shrunk(part.to(device), size), at_once) for part in torch.split(batch.images, step)]
        )
        texts = student.encode_text(distinct, min(step, 256) if at_once is None else step)
    texts = texts[inverse.to(texts.device)]
    return Embeddings(images, texts, student.scale, student.bias, config.objective.trained_with)


def shrunk(images: Tensor, size: int | None) -> Tensor:
    """Resize uint8 [N, 3, H, W] to `size` pixels per side; None: return them unchanged."""
    return images if size is None else shrink(images, size)


def cheap_places(curation: Curation, pairs: int) -> Tensor:
    """bool [pairs]: the pairs of each sub-batch trained at the scoring size, evenly spaced in draw order."""
    places, of = torch.arange(pairs) % curation.sub_batch, curation.sub_batch
    cheap = round(curation.cheap_fraction * of)
    return (places + 1) * cheap // of > places * cheap // of
