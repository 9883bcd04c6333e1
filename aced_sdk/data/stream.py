# SPDX-License-Identifier: Apache-2.0
"""Super-batches in an order that seed and position alone decide, read one step ahead."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from aced_sdk.data.source import Rows, Source, SuperBatch
from aced_sdk.errors import DataError


class Order:
    """An endless sequence of rows: one seeded permutation of the rows after another."""

    def __init__(self, rows: Rows, seed: int) -> None:
        if not len(rows):
            raise DataError(
                "no usable pair is left to draw from", remedy="check the shards and any filter", field="data.shards"
            )
        self.rows = rows
        self.seed = seed
        self._epoch = -1
        self._permutation = rows

    def take(self, position: int, count: int) -> Rows:
        """Rows `position` to `position + count` of the sequence."""
        parts: list[Rows] = []
        while count > 0:
            epoch, offset = divmod(position, len(self.rows))
            if epoch != self._epoch:
                self._epoch = epoch
                self._permutation = self.rows[np.random.default_rng([self.seed, epoch]).permutation(len(self.rows))]
            part = self._permutation[offset : offset + count]
            parts.append(part)
            position += len(part)
            count -= len(part)
        return np.concatenate(parts)


class SuperBatches:
    """Endless super-batches of exactly `size` usable pairs.

    Args:
        source: where pairs come from.
        size: B.
        seed: of the order.
        position: rows of the order already consumed; as `SuperBatches.__next__` returned it before a stop.
        rows: what may be drawn; the source's usable rows by default.
    """

    def __init__(self, source: Source, size: int, seed: int, position: int = 0, rows: Rows | None = None) -> None:
        self.source = source
        self.size = size
        self._order = Order(source.usable() if rows is None else rows, seed)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self._next: Future[tuple[SuperBatch, int]] = self._thread.submit(self._read, position)

    def __iter__(self) -> Iterator[tuple[SuperBatch, int]]:
        return self

    def __next__(self) -> tuple[SuperBatch, int]:
        """The next super-batch, and the position after it."""
        batch, position = self._next.result()
        self._next = self._thread.submit(self._read, position)
        return batch, position

    def close(self) -> None:
        """Stop reading ahead."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _read(self, position: int) -> tuple[SuperBatch, int]:
        parts: list[SuperBatch] = []
        missing = self.size
        in_vain = 0
        while missing:
            rows = self._order.take(position, missing)
            position += len(rows)
            batch = self.source.fetch(rows)  # may drop unusable pairs; later rows of the order take their places
            parts.append(batch)
            missing -= len(batch)
            in_vain = 0 if len(batch) else in_vain + len(rows)
            if in_vain >= len(self._order.rows):
                raise DataError("no pair of the pool is usable", remedy="check the shards", field="data.shards")
        if len(parts) == 1:
            return parts[0], position
        return (
            SuperBatch(
                torch.cat([p.images for p in parts]),
                torch.cat([p.tokens for p in parts]),
                torch.cat([p.rows for p in parts]),
            ),
            position,
        )
