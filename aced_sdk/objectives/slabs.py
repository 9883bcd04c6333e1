# SPDX-License-Identifier: Apache-2.0
"""Sums over all pairs of a batch with itself, a few rows at a time, and exact all the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def in_slabs(
    loss: Callable[..., Tensor], chunk: int | None, rows: Sequence[Tensor], whole: Sequence[Tensor | float]
) -> Tensor:
    """The sum of `loss(start, *rows of a slab, *whole)` over slabs of `chunk` rows.

    A row meets everything in `whole`, so what needs a whole row (a softmax) is exact. A slab is computed again in the
    backward pass: nothing of size chunk * b is kept for it, and memory is O(b * chunk) instead of O(b * b). A loss
    whose softmax runs both ways makes two passes, the second with the sides exchanged.

    Args:
        loss: of a slab, 0-dim, a sum over its rows; `start` is the number of its first row.
        chunk: rows of a slab; None: all rows in one, kept for the backward pass.
        rows: tensors of b rows each, cut into slabs.
        whole: what every slab sees whole.
    """
    if chunk is None or chunk >= len(rows[0]):
        return loss(0, *rows, *whole)
    slabs = enumerate(zip(*(torch.split(side, chunk) for side in rows), strict=True))
    # Nothing in a slab is random, so there are no generator states to keep.
    losses: list[Tensor] = [
        checkpoint(loss, number * chunk, *slab, *whole, use_reentrant=False, preserve_rng_state=False)
        for number, slab in slabs
    ]
    return sum(losses[1:], losses[0])
