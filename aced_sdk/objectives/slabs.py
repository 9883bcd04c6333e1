# SPDX-License-Identifier: Apache-2.0
"""Exact sums over all b x b pairs of a batch, computed a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def in_slabs(
    loss: Callable[..., Tensor], chunk: int | None, rows: Sequence[Tensor], whole: Sequence[Tensor | float]
) -> Tensor:
    """Return the sum of `loss(start, *rows of a slab, *whole)` over slabs of `chunk` rows.

    Each slab gets all of `whole`, so a softmax over a row is exact. Slabs are recomputed in the backward pass, so
    memory is O(b * chunk) instead of O(b * b). For a softmax in both directions, call it twice with the sides
    exchanged.

    Args:
        loss: 0-dim loss of a slab, a sum over its rows; `start` is the index of its first row.
        chunk: rows per slab; None: one slab, which is not recomputed.
        rows: tensors with b rows each, split into slabs.
        whole: passed to each slab unsplit.
    """
    if chunk is None or chunk >= len(rows[0]):
        return loss(0, *rows, *whole)
    slabs = enumerate(zip(*(torch.split(side, chunk) for side in rows), strict=True))
    # Losses are deterministic, so the generator state need not be kept.
    losses: list[Tensor] = [
        checkpoint(loss, number * chunk, *slab, *whole, use_reentrant=False, preserve_rng_state=False)
        for number, slab in slabs
    ]
    return sum(losses[1:], losses[0])
