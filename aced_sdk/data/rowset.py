# SPDX-License-Identifier: Apache-2.0
"""Rows of a pool: their type, and sets of them with one bit per row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]
"""Numbers of pairs in a pool."""

BLOCK = 2**20
"""Rows per block in passes over a whole pool; a multiple of 8."""

_ONES = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1)


class RowSet:
    """A set of rows of a pool. It takes one bit per row of the pool, or nothing if it contains all rows.

    Args:
        pairs: N.
        bits: uint8 [ceil(N / 8)] as `numpy.packbits` gives them; None: all rows.
    """

    def __init__(self, pairs: int, bits: NDArray[np.uint8] | None = None) -> None:
        self.pairs = pairs
        self._bits = bits
        self._count = pairs if bits is None else int(_ONES[bits].sum(dtype=np.int64))

    @classmethod
    def of(cls, pairs: int, holds: Callable[[slice], NDArray[np.bool_]]) -> RowSet:
        """The rows for which `holds` is true; it is called with blocks of rows, in order."""
        bits = [np.packbits(holds(block)) for block in blocks(pairs)]
        made = cls(pairs, np.concatenate(bits))
        return made if len(made) < pairs else cls(pairs)

    def __len__(self) -> int:
        return self._count

    def __call__(self, rows: Rows) -> NDArray[np.bool_]:
        """Whether each row is in the set: bool of the shape of `rows`."""
        if self._bits is None:
            return np.ones(rows.shape, dtype=np.bool_)
        held: NDArray[np.bool_] = (self._bits[rows >> 3] >> (7 - (rows & 7)).astype(np.uint8) & 1).astype(np.bool_)
        return held

    def listed(self) -> NDArray[Any]:
        """All rows of the set, ascending: uint32 [K], or int64 for pools of 2**32 pairs and more."""
        small = np.uint32 if self.pairs <= 2**32 else np.int64
        return np.concatenate([self.rows(block).astype(small) for block in blocks(self.pairs)])

    def rows(self, block: slice) -> Rows:
        """The rows of the set in a block, ascending."""
        every = np.arange(block.start, min(block.stop, self.pairs))
        return every[self(every)]


def blocks(pairs: int) -> Iterator[slice]:
    """Slices of at most `BLOCK` rows that cover a pool."""
    for start in range(0, pairs, BLOCK):
        yield slice(start, min(start + BLOCK, pairs))
