# SPDX-License-Identifier: Apache-2.0
"""A keyed permutation in bounded memory: a table for small sizes, else a Feistel network with cycle walking.

A Feistel network permutes the numbers of 2k bits, whatever its round function (Luby and Rackoff, 1988). Results
outside of the range are permuted again until they are inside (cycle walking; Black and Rogaway, 2002). The k bits are
the fewest that cover the range, so that takes less than four rounds on average. Small networks permute badly; a table
is exact.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from aced_sdk.data.rowset import Rows

_ROUNDS = 6
_TABLE = 2**16  # largest size of a table
_MIX = np.uint64(0xD6E8FEB86659FD93)  # odd, from Rau's mixing function
_SHIFT = np.uint64(32)


class Permutation:
    """A permutation of 0 to `size` - 1, selected by a key. It takes at most 0.5 MB.

    Args:
        size: at most 2**62.
        key: integers; other keys give other permutations.
    """

    def __init__(self, size: int, *key: int) -> None:
        self.size = size
        self._table = np.random.default_rng([size, *key]).permutation(size) if size <= _TABLE else None
        self._bits = ((size - 1).bit_length() + 1) // 2
        digest = hashlib.shake_128(repr((size, *key)).encode()).digest(8 * _ROUNDS)
        self._keys = np.frombuffer(digest, "<u8")

    def __call__(self, places: Rows) -> Rows:
        """The numbers at these places, int64 [K]; each is in 0 to `size` - 1."""
        if self._table is not None:
            return self._table[places]
        found = self._network(places.astype(np.uint64))
        outside = np.flatnonzero(found >= self.size)
        while len(outside):
            again = self._network(found[outside])
            found[outside] = again
            outside = outside[again >= self.size]
        return found.astype(np.int64)

    def _network(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        bits = np.uint64(self._bits)
        mask = np.uint64((1 << self._bits) - 1)
        left, right = values >> bits, values & mask
        for key in self._keys:
            mixed = right + key
            mixed *= _MIX
            mixed ^= mixed >> _SHIFT
            mixed *= _MIX
            mixed >>= _SHIFT
            mixed &= mask
            mixed ^= left
            left, right = right, mixed
        return (left << bits) | right
