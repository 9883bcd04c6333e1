# SPDX-License-Identifier: Apache-2.0
"""Super-batches in the order of the lanes, read one step ahead."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from aced_sdk.data.order import Order
from aced_sdk.data.rowset import Rows
from aced_sdk.data.source import Source, SuperBatch
from aced_sdk.errors import DataError

_EPOCHS = 50  # of a lane without a usable pair
_AT_ONCE = 16  # rows that are looked at for each missing one, if few rows may be drawn


class RowFilter(Protocol):
    """Which rows may be drawn."""

    def __call__(self, rows: Rows) -> NDArray[np.bool_]:
        """bool of the shape of `rows`."""

    def __len__(self) -> int:
        """How many rows of the pool."""


class SuperBatches:
    """Endless super-batches of exactly `size` usable pairs. Each of W ranks reads the part of its lanes.

    The pairs of a super-batch are ordered by their place in the lane, then by lane. A row that may not be drawn or is
    unusable is replaced by the next row of its lane.

    Args:
        source: where pairs come from.
        order: the lanes.
        size: B, pairs of all lanes together.
        state: int64 [L, K], of the order: `order.start()`, or as `SuperBatches.__next__` returned it before a stop.
        filter: which rows may be drawn.
        lanes: int64 [l], the lanes that are read here; default: all.
    """

    def __init__(
        self,
        source: Source,
        order: Order,
        size: int,
        state: Rows,
        filter: RowFilter,
        lanes: Rows | None = None,
    ) -> None:
        self.source = source
        self._order, self._filter = order, filter
        self._each = size // order.lanes
        self._lanes = np.arange(order.lanes) if lanes is None else lanes
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self._next: Future[tuple[SuperBatch, Rows]] = self._thread.submit(self._read, state)

    def __iter__(self) -> Iterator[tuple[SuperBatch, Rows]]:
        return self

    def __next__(self) -> tuple[SuperBatch, Rows]:
        """The next super-batch (of these lanes), and the state after it; other lanes' states are unchanged."""
        batch, state = self._next.result()
        self._next = self._thread.submit(self._read, state)
        return batch, state

    def close(self) -> None:
        """Stop reading ahead."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _read(self, state: Rows) -> tuple[SuperBatch, Rows]:
        lanes, each, own = self._lanes, self._each, state[self._lanes]
        parts: list[SuperBatch] = []
        places: list[Rows] = []
        filled = np.zeros(len(lanes), dtype=np.int64)
        in_vain = np.zeros(len(lanes), dtype=np.int64)
        while (missing := each - filled).any():
            looked_at = int(missing.max()) * (1 if len(self._filter) * 2 > self._order.pairs else _AT_ONCE)
            rows = self._order.rows(lanes, own, looked_at)
            allowed = self._filter(rows)
            wanted = allowed & (allowed.cumsum(axis=1) <= missing[:, None])
            # A lane that has all it needs stops after its last row. The others consumed all rows looked at.
            last = looked_at - np.argmax(wanted[:, ::-1], axis=1)
            consumed = np.where(wanted.sum(axis=1) == missing, np.where(missing > 0, last, 0), looked_at)
            batch = self.source.fetch(rows[wanted])
            usable = wanted & np.isin(rows, batch.rows.numpy())
            of_lane = np.nonzero(usable)[0]
            within = usable.cumsum(axis=1)[usable] - 1
            places.append((filled[of_lane] + within) * len(lanes) + of_lane)
            parts.append(batch)
            filled += usable.sum(axis=1)
            own = self._order.advance(lanes, own, consumed)
            in_vain = np.where(usable.any(axis=1), 0, in_vain + consumed)
            if (in_vain > self._order.pairs * max(2, _EPOCHS / self._order.lanes)).any():
                cause = f"no pair of the pool is usable: {int(in_vain.max()):,} rows in a row cannot be used"
                raise DataError(cause, remedy="check the shards", field="data.shards")
        after = state.copy()
        after[lanes] = own
        order = torch.from_numpy(np.concatenate(places).argsort())
        return _joined(parts)[order], after


def _joined(parts: list[SuperBatch]) -> SuperBatch:
    if len(parts) == 1:
        return parts[0]
    return SuperBatch(*(torch.cat([getattr(part, name) for part in parts]) for name in ("images", "tokens", "rows")))
