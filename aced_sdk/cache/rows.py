# SPDX-License-Identifier: Apache-2.0
"""`rows.bin`: the embeddings of all pairs in rows of one size, each with a checksum.

A row is: image [D], text [D], zeros up to a multiple of 8 bytes, checksum (8 bytes). Row r begins at byte r * stride.
The row of an unusable pair is zero and has a checksum, too. A row that was never written is zero and has none. So the
checksums also mark which rows are complete, and after a crash no other file is needed to continue.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aced_sdk.cache.manifest import DTYPES, CacheManifest
from aced_sdk.data.rowset import Rows
from aced_sdk.errors import CacheError
from aced_sdk.files import ReadError, inside, open_own, open_regular, printable, reserve

ROWS = "rows.bin"
AGAIN = "write the cache again (aced.cache_embeddings): intact rows are kept"
Words = NDArray[np.uint64]
_BLOCK = 256  # rows that are copied and checked at a time: they fit in a core's cache
_READ = 2**23  # bytes read at a time from beginning to end


class Layout:
    """Where the rows of a cache are, and their checksums.

    The checksum of words w of row r is sum(w * a) + sum((w >> 32) * b) + r * c + d modulo 2^64, with odd a, b, c and d
    derived from the manifest. So every changed bit is detected, and every row moved to another place. Any other damage
    is missed with a probability of about 2^-32 or less. The row of another cache has other a to d.

    Attributes:
        count: N, rows of the pool.
        dim: D.
        dtype: of the embeddings.
        words: 8-byte words of a row's content.
        stride: bytes from one row to the next.
        size: bytes of the file.
    """

    def __init__(self, manifest: CacheManifest, count: int) -> None:
        self.count, self.dim, self.dtype = count, manifest.dim, DTYPES[manifest.dtype]
        self.words = -(-4 * manifest.dim // 8)
        self.stride = 8 * (self.words + 1)
        self.size = count * self.stride
        self._key = manifest.key()
        self._factors: Words | None = None

    def checksums(self, rows: Words, numbers: Rows) -> Words:
        """Return the checksums of rows.

        Args:
            rows: uint64 [K, words + 1] or [K, words].
            numbers: int64 [K], their numbers in the pool.
        """
        if self._factors is None:
            stream = hashlib.shake_256(self._key).digest(8 * (2 * self.words + 2))
            self._factors = np.frombuffer(stream, "<u8").astype(np.uint64) | np.uint64(1)
        low, high, (place, start) = np.split(self._factors, [self.words, 2 * self.words])
        words = rows[:, : self.words]
        sums: Words = np.einsum("ij,j->i", words, low)
        sums += np.einsum("ij,j->i", words >> np.uint64(32), high)
        sums += numbers.astype(np.uint64) * place + start
        return sums

    def intact(self, rows: Words, numbers: Rows) -> NDArray[np.bool_]:
        """Return for each row whether its checksum matches; arguments as for `checksums`."""
        return np.concatenate(
            [
                self.checksums(rows[at : at + _BLOCK], numbers[at : at + _BLOCK]) == rows[at : at + _BLOCK, -1]
                for at in range(0, max(len(rows), 1), _BLOCK)
            ]
        )

    def tensor(self, rows: Words) -> Tensor:
        """Return rows as a tensor of the stored dtype [K, stride / 2]; image and text are the first 2 D columns."""
        return torch.from_numpy(rows.view(np.int16)).view(self.dtype)


class RowReader:
    """Read rows at random through one memory map, or from beginning to end.

    Raises:
        CacheError: if the file is missing or has another size.
    """

    def __init__(self, directory: Path, layout: Layout) -> None:
        self.layout = layout
        self._directory, self._shown = directory, printable(directory / ROWS)
        try:
            with open_regular(inside(directory, ROWS)) as stream:
                self._check_size(os.fstat(stream.fileno()).st_size)
                self._map = mmap.mmap(stream.fileno(), layout.size, prot=mmap.PROT_READ)
        except (ReadError, OSError) as error:
            raise CacheError(f"the embeddings {self._shown} cannot be read: {error}", remedy=AGAIN) from error
        if hasattr(mmap, "MADV_RANDOM"):
            self._map.madvise(mmap.MADV_RANDOM)  # otherwise each row that is not in memory reads 128 KiB
        self._rows: Words = np.frombuffer(self._map, "<u8").reshape(layout.count, layout.words + 1)

    def take(self, numbers: Rows) -> Words:
        """Return rows in the order of `numbers` (int64 [K], each in 0..N - 1) as uint64 [K, words + 1].

        Raises:
            CacheError: if a row is damaged, or the file was cut off.
        """
        self._check_size(self._map.size())  # reading a map beyond the end of its file would end the process
        rows = np.empty((len(numbers), self.layout.words + 1), np.uint64)
        for at in range(0, len(numbers), _BLOCK):
            part, wanted = rows[at : at + _BLOCK], numbers[at : at + _BLOCK]
            np.take(self._rows, wanted, axis=0, out=part, mode="clip")
            self._check(part, wanted)
        return rows

    def read(self, rows: range) -> Iterator[tuple[range, Words, NDArray[np.bool_]]]:
        """Read rows from the first to the last.

        Yields:
            A range of rows, their content as uint64 [K, words + 1] and, as bool [K], whether each is intact.

        Raises:
            CacheError: if the file cannot be read.
        """
        at_once = max(1, _READ // self.layout.stride)
        buffer = np.empty((min(at_once, len(rows)), self.layout.words + 1), np.uint64)
        try:
            with open_regular(inside(self._directory, ROWS)) as stream:
                for start in range(rows.start, rows.stop, at_once):
                    part = range(start, min(start + at_once, rows.stop))
                    into = buffer[: len(part)]
                    stream.seek(start * self.layout.stride)
                    if stream.readinto(into.data.cast("B")) != into.nbytes:
                        self._check_size(-1)
                    yield part, into, self.layout.intact(into, np.arange(part.start, part.stop))
        except ReadError as error:
            raise CacheError(f"the embeddings {self._shown} cannot be read: {error}", remedy=AGAIN) from error

    def read_intact(self, rows: range) -> Iterator[tuple[range, Words]]:
        """As `read`, for rows that must be intact.

        Raises:
            CacheError: if a row is damaged.
        """
        for part, content, intact in self.read(rows):
            if not intact.all():
                self._damaged(np.arange(part.start, part.stop)[~intact])
            yield part, content

    def _check(self, rows: Words, numbers: Rows) -> None:
        wrong = self.layout.checksums(rows, numbers) != rows[:, -1]
        if wrong.any():
            self._damaged(numbers[wrong])

    def _damaged(self, numbers: Rows) -> None:
        cause = f"row {numbers[0]} of the embeddings {self._shown} is not what was written: its checksum differs"
        raise CacheError(cause, remedy=AGAIN)

    def _check_size(self, found: int) -> None:
        if found != self.layout.size:
            cause = f"the embeddings {self._shown} have another size than {self.layout.count:,} rows of their cache"
            raise CacheError(cause, remedy=AGAIN)


class RowWriter:
    """Write rows to the file. Several processes may write different rows.

    Raises:
        OSError: from all methods, if the disk is full or fails.
    """

    def __init__(self, directory: Path, layout: Layout) -> None:
        self.layout = layout
        self._handle = open_own(directory / ROWS, only=True)
        self.closed = False

    def reserve(self) -> bool:
        """Give the file its size and reserve its space on the disk. Return whether it was new.

        Raises:
            OSError: if the disk has not enough space; a new file is then empty again.
        """
        new = os.fstat(self._handle).st_size == 0
        reserve(self._handle, self.layout.size)
        return new

    def write(self, numbers: Rows, image: Tensor, text: Tensor) -> None:
        """Write embeddings (float [K, D]) to rows (int64 [K])."""
        content = torch.zeros(len(numbers), self.layout.stride // 2, dtype=self.layout.dtype)
        content[:, : self.layout.dim] = image
        content[:, self.layout.dim : 2 * self.layout.dim] = text
        self._put(numbers, content.view(torch.int16).numpy().view(np.uint64))

    def blank(self, numbers: Rows) -> None:
        """Mark rows (int64 [K]) as those of unusable pairs."""
        at_once = max(1, _READ // self.layout.stride)
        for at in range(0, len(numbers), at_once):
            part = numbers[at : at + at_once]
            self._put(part, np.zeros((len(part), self.layout.words + 1), np.uint64))

    def sync(self) -> None:
        """Wait until all rows are on the disk."""
        os.fsync(self._handle)

    def close(self) -> None:
        """Close the file. A second call does nothing: the file number may belong to another file."""
        if not self.closed:
            self.closed = True
            os.close(self._handle)

    def _put(self, numbers: Rows, rows: Words) -> None:
        """Add the checksums to rows (uint64 [K, words + 1]) and write each run of consecutive rows at once."""
        order = np.argsort(numbers, kind="stable")
        numbers, rows = numbers[order], rows[order]
        for at in range(0, len(rows), _BLOCK):
            rows[at : at + _BLOCK, -1] = self.layout.checksums(rows[at : at + _BLOCK], numbers[at : at + _BLOCK])
        starts = [*np.flatnonzero(np.diff(numbers, prepend=-2) != 1), len(rows)]
        for start, stop in pairwise(starts):
            content, offset = rows[start:stop].data.cast("B"), int(numbers[start]) * self.layout.stride
            while content:
                written = os.pwrite(self._handle, content, offset)
                content, offset = content[written:], offset + written
