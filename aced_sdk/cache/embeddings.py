# SPDX-License-Identifier: Apache-2.0
"""Read the cached embeddings of a pool."""

from __future__ import annotations

import hashlib
import mmap
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aced_sdk.cache.manifest import FORMAT, CacheManifest, Shards, as_pool, bound_shards, check_binding, read_manifest
from aced_sdk.cache.rows import AGAIN, Layout, RowReader, Words
from aced_sdk.data import Pool
from aced_sdk.errors import CacheError
from aced_sdk.files import ReadError, home, inside, open_regular, printable, whole_file
from aced_sdk.towers import Embeddings

USABLE = "usable.bin"
_DIGEST = 32  # bytes of a sha256
_PIECE = 2048  # rows that a thread reads at a time
_THREADS = 8  # more than cores: each waits for the disk where rows are not in memory
_ITEM = TypeVar("_ITEM")
_RESULT = TypeVar("_RESULT")


class EmbeddingCache:
    """The embeddings of a frozen model for all N pairs of a pool, in row order, on disk.

    A row's checksum is verified whenever the row is read. Opening a cache reads one byte per pair.

    Attributes:
        directory: folder of the cache.
        usable: bool [N], pairs with embeddings, memory-mapped.
    """

    def __init__(self, directory: Path, manifest: CacheManifest, count: int) -> None:
        self.directory = directory
        self._manifest = manifest
        self._layout = Layout(manifest, count)
        self.usable = torch.frombuffer(read_usable(directory, manifest, count), dtype=torch.bool, offset=_DIGEST)
        self._rows = RowReader(directory, self._layout)

    @property
    def model(self) -> str:
        """Fingerprint of the model, or of the config of stored embeddings."""
        return self._manifest.model

    def rows(self, rows: Tensor, device: torch.device) -> Embeddings:
        """Return the embeddings of rows (int64 [K]) as float32 on a device, normalised again after the 16-bit storage.

        The embeddings of unusable pairs are zero.

        Raises:
            CacheError: if a row is damaged.
            IndexError: if a row is not in 0..N - 1.
        """
        numbers = rows.cpu().numpy()
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < self._layout.count:
            raise IndexError(f"rows of this cache are 0 to {self._layout.count - 1}")
        pieces = [numbers[at : at + _PIECE] for at in range(0, len(numbers), _PIECE)]
        return self._embeddings(len(numbers), read_ahead(self._rows.take, pieces, _THREADS), device)

    def blocks(self, rows_at_once: int, device: torch.device | None = None) -> Iterator[tuple[range, Embeddings]]:
        """Read the whole cache once, in bounded memory.

        Args:
            rows_at_once: rows per block; the last block may be smaller.
            device: as for `rows`; None: the CPU.

        Yields:
            The rows of a block and their embeddings, as from `rows`.

        Raises:
            CacheError: if a row is damaged.
        """
        for start in range(0, self._layout.count, rows_at_once):
            block = range(start, min(start + rows_at_once, self._layout.count))
            parts = (content for _, content in self._rows.read_intact(block))
            yield block, self._embeddings(len(block), parts, device or torch.device("cpu"))

    @property
    def embeddings(self) -> Embeddings:
        """All embeddings [N, D] in the stored dtype. Loads the whole cache into memory.

        Raises:
            CacheError: if a row is damaged.
        """
        dim, everything = self._layout.dim, range(self._layout.count)
        image, text = torch.empty(2, self._layout.count, dim, dtype=self._layout.dtype)
        for part, content in self._rows.read_intact(everything):
            values = self._layout.tensor(content)
            image[part.start : part.stop], text[part.start : part.stop] = values[:, :dim], values[:, dim : 2 * dim]
        return self._of_model(image, text)

    def _embeddings(self, count: int, parts: Iterable[Words], device: torch.device) -> Embeddings:
        """Convert the rows of `parts`, K in all, to float32 and normalise them."""
        dim, start = self._layout.dim, 0
        image, text = _empty(count, dim, device), _empty(count, dim, device)
        for part in parts:
            values = self._layout.tensor(part).to(device)
            stop = start + len(values)
            for into, stored in ((image[start:stop], values[:, :dim]), (text[start:stop], values[:, dim : 2 * dim])):
                into.copy_(stored)
                into.div_(torch.linalg.vector_norm(into, dim=1, keepdim=True).clamp_min_(1e-12))
            start = stop
        return self._of_model(image, text)

    def _of_model(self, image: Tensor, text: Tensor) -> Embeddings:
        return Embeddings(image, text, self._manifest.scale, self._manifest.bias, self._manifest.trained_with)


def default_directory(fingerprint: str, pool: Pool) -> Path:
    """Default folder for the embeddings of a pool, in the cache home."""
    model = hashlib.sha256(f"{FORMAT} {fingerprint}".encode()).hexdigest()
    return home() / "embeddings" / f"{model[:12]}-{pool.fingerprint[:12]}"


def open_cache(directory: str | os.PathLike[str], pool: Pool | Shards, model: str | None = None) -> EmbeddingCache:
    """Open a complete cache.

    Args:
        directory: folder of the cache.
        pool: the pairs, or their shards.
        model: required name or fingerprint of the model, or fingerprint of the config of stored embeddings; None: any.

    Raises:
        CacheError: if the cache is of another model or other shards, incomplete or damaged.
    """
    directory, pool = Path(directory), as_pool(pool)
    manifest = read_manifest(directory)
    check_binding(manifest, model, bound_shards(pool), directory)
    return EmbeddingCache(directory, manifest, len(pool))


def read_usable(directory: Path, manifest: CacheManifest, count: int) -> mmap.mmap:
    """Verify and map `usable.bin`: a sha256 and one byte for each pair. It exists if all rows are written.

    Raises:
        CacheError: if it is missing, damaged, or of another cache.
    """
    try:
        with open_regular(inside(directory, USABLE)) as stream:
            if os.fstat(stream.fileno()).st_size == _DIGEST + count:
                digest, content = stream.read(_DIGEST), hashlib.sha256(manifest.key())
                while block := stream.read(2**20):
                    content.update(block)
                if content.digest() == digest:
                    # Private, so that torch gets a writable buffer; the pages are shared until somebody writes.
                    return mmap.mmap(stream.fileno(), _DIGEST + count, access=mmap.ACCESS_COPY)
    except (ReadError, OSError) as error:
        if not os.path.lexists(directory / USABLE):
            cause = f"the cache {printable(directory)} is incomplete: its writer was interrupted"
            raise CacheError(cause, remedy=AGAIN) from None
        raise CacheError(f"the embeddings {printable(directory)} cannot be read: {error}", remedy=AGAIN) from error
    raise CacheError(f"{printable(directory / USABLE)} is not what was written: its checksum differs", remedy=AGAIN)


def write_usable(directory: Path, manifest: CacheManifest, usable: NDArray[np.bool_]) -> None:
    """Write `usable.bin` (bool [N]), whole or not at all. This marks a cache as complete.

    Raises:
        OSError: if the disk is full or the place cannot be written to.
    """
    content = usable.data
    digest = hashlib.sha256(manifest.key())
    digest.update(content)
    with whole_file(directory / USABLE) as temporary, temporary.open("wb") as stream:
        stream.write(digest.digest())
        stream.write(content)


def read_ahead(
    read: Callable[[_ITEM], _RESULT], items: Iterable[_ITEM], threads: int, ahead: int | None = None
) -> Generator[_RESULT]:
    """Yield `read(item)` for each item, in order.

    Args:
        read: called in threads.
        items: its arguments.
        threads: at most so many calls run at a time.
        ahead: results that wait for the caller; None: as many as threads.
    """
    with ThreadPoolExecutor(threads, thread_name_prefix="read-cache") as readers:
        waiting: deque[Future[_RESULT]] = deque()
        try:
            for item in items:
                waiting.append(readers.submit(read, item))
                if len(waiting) > (threads if ahead is None else ahead):
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            readers.shutdown(wait=True, cancel_futures=True)


def _empty(count: int, dim: int, device: torch.device) -> Tensor:
    if device.type == "cpu":
        return torch.from_numpy(np.empty((count, dim), np.float32))  # numpy asks for huge pages: five times as fast
    return torch.empty(count, dim, device=device)
