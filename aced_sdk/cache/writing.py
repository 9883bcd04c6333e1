# SPDX-License-Identifier: Apache-2.0
"""Embed a pool and write the cache. Pairs are read while others are embedded, and ranks share the shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from aced_sdk.cache.embeddings import USABLE, EmbeddingCache, read_ahead, write_usable
from aced_sdk.cache.manifest import CacheManifest, Dtype, bound_shards, read_manifest
from aced_sdk.cache.rows import Layout, RowReader, RowWriter
from aced_sdk.cache.writer import bind, lock, scan, writable
from aced_sdk.config import Data
from aced_sdk.data import Decoding, Pool, SuperBatch, check_skipped
from aced_sdk.data.rowset import Rows
from aced_sdk.engine import Launch, Ranks
from aced_sdk.errors import ModelError
from aced_sdk.files import inside, read_bytes, whole_file
from aced_sdk.towers import DualEncoder

_AHEAD = 2  # batches read while one is embedded
Read = TypeVar("Read")


@dataclass(frozen=True, eq=False)
class Embedded:
    """Embeddings of K usable pairs.

    Attributes:
        rows: int64 [K], rows of the pool.
        image: float32 [K, D], L2-normalised.
        text: float32 [K, D], L2-normalised.
    """

    rows: Tensor
    image: Tensor
    text: Tensor


def write_cache(
    encoder: DualEncoder,
    pool: Pool,
    directory: Path,
    data: Data,
    batch_size: int = 256,
    progress: Callable[[int, int], None] | None = None,
    dtype: Dtype | None = None,
    ranks: Ranks | None = None,
) -> EmbeddingCache:
    """Embed all pairs of a pool. Intact rows are kept, so an interrupted call can be repeated.

    Args:
        encoder: the frozen model; it computes on its device.
        pool: the pairs.
        directory: output folder. If another process is writing there, wait for it.
        data: how pairs are decoded, and the limit of unusable pairs.
        batch_size: pairs per batch.
        progress: called with the number of this rank's pairs done and in total.
        dtype: dtype of the stored embeddings. None: that of the existing cache, or fp16 for a new one.
        ranks: share the work; all ranks call this function, each with the encoder on its own device. None: one process.

    Raises:
        CacheError: if the directory contains a cache of another model, pool or dtype, or cannot be written.
        DataError: if too many pairs are unusable.
        EngineError: if another rank fails.
        ModelError: if the model's embeddings are not finite.
    """
    manifest = CacheManifest(
        model=encoder.fingerprint(),
        dim=encoder.embedding_dim,
        scale=encoder.scale,
        trained_with=encoder.trained_with,
        bias=encoder.bias,
        shards=bound_shards(pool),
        dtype=dtype or "fp16",
    )
    decoder = Decoding(pool, encoder.processor, data)

    def embed(batch: SuperBatch) -> Embedded:
        if not len(batch):
            return Embedded(batch.rows, *torch.empty(2, 0, encoder.embedding_dim))
        # Embed equal captions once.
        distinct, inverse = torch.unique(batch.tokens, dim=0, return_inverse=True)
        image, text = encoder.encode_image(batch.images).cpu(), encoder.encode_text(distinct).cpu()[inverse]
        finite = (image.isfinite() & text.isfinite()).all(dim=1)
        if not finite.all():
            raise ModelError(
                f"the frozen model's embeddings of {int((~finite).sum())} pairs are not finite, "
                f"{pool.name(int(batch.rows[~finite][0]))} first",
                remedy="check the model's weights",
            )
        return Embedded(batch.rows, image, text)

    cache = write_rows(directory, manifest, pool, decoder.fetch, embed, batch_size, progress, dtype, ranks)
    check_usable(cache, decoder.skipped, data)
    return cache


def write_rows(
    directory: Path,
    manifest: CacheManifest,
    pool: Pool,
    read: Callable[[Rows], Read],
    embed: Callable[[Read], Embedded],
    batch_size: int,
    progress: Callable[[int, int], None] | None,
    dtype: Dtype | None,
    ranks: Ranks | None,
) -> EmbeddingCache:
    """Write the missing and damaged rows of a cache. Rank r writes shards r, r + W, r + 2 W, ...

    Args:
        directory: output folder.
        manifest: model, preprocessing and shards of the cache.
        pool: the pairs.
        read: reads rows for `embed`; called ahead in a thread.
        embed: returns the embeddings of the usable pairs.
        batch_size: rows per call.
        progress: called with the number of this rank's pairs done and in total.
        dtype: required dtype of an existing cache; None: any.
        ranks: all must call this function; None: one process.

    Raises:
        CacheError: if the directory contains a cache of another model or pool, or cannot be written.
        EngineError: if another rank fails.
    """
    ranks = ranks or Ranks(Launch(0, 0, 1), torch.device("cpu"))
    with ExitStack() as held, writable(directory):

        def prepare() -> None:
            held.enter_context(lock(directory))
            bound = bind(directory, manifest, dtype)
            with closing(RowWriter(directory, Layout(bound, len(pool)))) as file:
                file.reserve()

        ranks.in_first(partial(_named, directory, prepare))
        own = ranks.together(lambda: _OwnShards(directory, pool, ranks, batch_size, progress))
        held.callback(own.close)
        ranks.together(own.find_missing)
        if rounds := int(ranks.max(len(own.missing))):
            ranks.in_first(lambda: (directory / USABLE).unlink(missing_ok=True))
            batches = chain.from_iterable(own.missing.values())
            numbers = (np.arange(batch.start, batch.stop, dtype=np.int64) for batch in batches)
            with closing(read_ahead(read, numbers, threads=1, ahead=_AHEAD)) as ahead:
                # One shard at a time on all ranks, so that a failure ends all soon.
                for shard in [*own.missing, *[None] * (rounds - len(own.missing))]:
                    ranks.together(partial(_named, directory, partial(own.write, shard, ahead, embed)))
        ranks.together(partial(_named, directory, own.save))
        ranks.in_first(partial(_named, directory, own.merge))
        return ranks.together(lambda: EmbeddingCache(directory, own.manifest, len(pool)))


class _OwnShards:
    """The shards of one rank.

    Attributes:
        manifest: of the cache.
        missing: shard to its batches that are missing or damaged.
    """

    def __init__(
        self, directory: Path, pool: Pool, ranks: Ranks, batch_size: int, progress: Callable[[int, int], None] | None
    ) -> None:
        self.manifest = read_manifest(directory)
        self.missing: dict[int, list[range]] = {}
        self._directory, self._rank, self._ranks = directory, ranks.rank, ranks.world_size
        self._shards = [rows for _, rows in pool.shard_rows()]
        self._own = range(ranks.rank, len(self._shards), ranks.world_size)
        self._usable = {shard: np.zeros(len(self._shards[shard]), np.bool_) for shard in self._own}
        self._batch_size, self._progress, self._done = batch_size, progress or (lambda *_: None), 0
        self._total = sum(len(usable) for usable in self._usable.values())
        layout = Layout(self.manifest, len(pool))
        self._reader, self._file = RowReader(directory, layout), RowWriter(directory, layout)

    def close(self) -> None:
        self._file.close()

    def find_missing(self) -> None:
        """Read all rows of the shards whose first row is intact, and fill `missing`."""
        for shard in self._own:
            rows = self._shards[shard]
            intact = np.zeros(len(rows), np.bool_)
            if all(first.all() for _, _, first in self._reader.read(rows[:1])):
                scan(self._reader, rows, intact, self._usable[shard])
            batches = [rows[at : at + self._batch_size] for at in range(0, len(rows), self._batch_size)]
            missing = [rows for rows in batches if not intact[rows.start - batches[0].start :][: len(rows)].all()]
            if missing:
                self.missing[shard] = missing
            self._advance(len(rows) - sum(map(len, missing)))

    def write(self, shard: int | None, ahead: Iterator[Read], embed: Callable[[Read], Embedded]) -> None:
        """Embed and write the missing batches of a shard; None: there is none left on this rank."""
        if shard is None:
            return
        for rows in self.missing[shard]:
            embedded = embed(next(ahead))
            numbers = embedded.rows.numpy()
            self._file.write(numbers, embedded.image, embedded.text)
            self._file.blank(np.setdiff1d(np.arange(rows.start, rows.stop), numbers))
            usable = self._usable[shard][rows.start - self._shards[shard].start :][: len(rows)]
            usable[:] = False
            usable[numbers - rows.start] = True
            self._advance(len(rows))

    def save(self) -> None:
        """Wait until the rows are on the disk, and pass the usable rows to rank 0."""
        if self.missing:
            self._file.sync()
        if self._rank:
            with whole_file(_usable_path(self._directory, self._rank)) as temporary:
                temporary.write_bytes(b"".join(usable.tobytes() for usable in self._usable.values()))

    def merge(self) -> None:
        """Mark the cache as complete. Called on rank 0 only."""
        usable = np.zeros(sum(map(len, self._shards)), np.bool_)
        for rank in range(self._ranks):
            shards = self._shards[rank :: self._ranks]
            if rank:
                path = _usable_path(self._directory, rank)
                content = read_bytes(inside(self._directory, path.name), sum(map(len, shards)))
                parts = np.split(np.frombuffer(content, np.bool_), np.cumsum([len(rows) for rows in shards])[:-1])
                path.unlink()
            else:
                parts = list(self._usable.values())
            for rows, part in zip(shards, parts, strict=True):
                usable[rows.start : rows.stop] = part
        write_usable(self._directory, self.manifest, usable)

    def _advance(self, pairs: int) -> None:
        if pairs:
            self._done += pairs
            self._progress(self._done, self._total)


def check_usable(cache: EmbeddingCache, skipped: Counter[str], data: Data) -> None:
    """Check the number of unusable pairs; `skipped` has their reasons if this call has read them all.

    Raises:
        DataError: if too many pairs are unusable.
    """
    unusable = int((~cache.usable).sum())
    reasons = skipped if skipped.total() == unusable else Counter(unusable=unusable)
    check_skipped(reasons, len(cache.usable), data.max_unusable_fraction)


def _named(directory: Path, action: Callable[[], None]) -> None:
    """Run an action; an OSError is raised as a CacheError, on other ranks too."""
    with writable(directory):
        action()


def _usable_path(directory: Path, rank: int) -> Path:
    return directory / f".usable-{rank:05d}"
