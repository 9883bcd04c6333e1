# SPDX-License-Identifier: Apache-2.0
"""Write the embeddings of a pool. Reading, embedding and writing run in parallel."""

from __future__ import annotations

import os
import re
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from aced_sdk.cache.embeddings import EmbeddingCache
from aced_sdk.cache.parts import (
    CacheManifest,
    Dtype,
    Part,
    bound_shards,
    check_binding,
    part_path,
    read_manifest,
    read_part,
    write_part,
)
from aced_sdk.config import Data
from aced_sdk.data import Decoding, Pool, SuperBatch, check_skipped
from aced_sdk.data.source import Rows
from aced_sdk.errors import CacheError, ModelError
from aced_sdk.files import alone, one_line, printable, write_json
from aced_sdk.towers import DualEncoder

_LEFTOVER = re.compile(r"\.(?:cache\.json|part-[0-9]{6,}\.safetensors)\.[0-9a-f]{16}\.tmp")  # see `whole_file`
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
) -> EmbeddingCache:
    """Embed all pairs of a pool. Complete shards are kept, so an interrupted call can be repeated.

    Args:
        encoder: the frozen model; it computes on its device.
        pool: the pairs.
        directory: output folder. If another process is writing there, wait for it.
        data: how pairs are decoded, and the limit of unusable pairs.
        batch_size: pairs per batch.
        progress: called with the number of pairs done and in total.
        dtype: dtype of the stored embeddings. None: that of the existing cache, or fp16 for a new one.

    Raises:
        CacheError: if the directory contains a cache of another model, pool or dtype, or cannot be written.
        DataError: if too many pairs are unusable.
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
            key = one_line(pool.key(int(batch.rows[~finite][0])))
            raise ModelError(
                f"the frozen model's embeddings of {int((~finite).sum())} pairs are not finite, of {key} for one",
                remedy="check the model's weights",
            )
        return Embedded(batch.rows, image, text)

    cache = write_parts(directory, manifest, pool, decoder.fetch, embed, batch_size, progress, dtype)
    check_usable(cache, decoder.skipped, data)
    return cache


def write_parts(
    directory: Path,
    manifest: CacheManifest,
    pool: Pool,
    read: Callable[[Rows], Read],
    embed: Callable[[Read], Embedded],
    batch_size: int,
    progress: Callable[[int, int], None] | None,
    dtype: Dtype | None,
) -> EmbeddingCache:
    """Write the missing and damaged parts of a cache.

    Args:
        directory: output folder.
        manifest: model, preprocessing and shards of the cache.
        pool: the pairs.
        read: reads rows for `embed`; called ahead in a thread.
        embed: returns the embeddings of the usable pairs.
        batch_size: rows per call.
        progress: called with the number of pairs done and in total.
        dtype: required dtype of an existing cache; None: any.

    Raises:
        CacheError: if the directory contains a cache of another model or pool, or cannot be written.
    """
    tell = progress or (lambda *_: None)
    with _alone(directory):
        manifest = _bind(directory, manifest, dtype)
        _sweep(directory)
        shards = [rows for _, rows in pool.shard_rows()]
        done, missing = 0, []
        for number, rows in enumerate(shards):
            if _complete(directory, number, len(rows), manifest):
                done += len(rows)
                tell(done, len(pool))
            else:
                missing.append(number)
        batches = {number: _cut(shards[number], batch_size) for number in missing}
        ahead = _read_ahead(read, [batch for number in missing for batch in batches[number]])
        with closing(ahead), ThreadPoolExecutor(1, thread_name_prefix="write-cache") as writer:
            writing: Future[None] | None = None
            for number in missing:
                part = Part.empty(len(shards[number]), manifest)
                for rows in batches[number]:
                    embedded = embed(next(ahead))
                    places = embedded.rows - shards[number].start
                    part.image[places] = embedded.image.to(part.image.dtype)
                    part.text[places] = embedded.text.to(part.text.dtype)
                    part.usable[places] = True
                    done += len(rows)
                    tell(done, len(pool))
                if writing is not None:
                    writing.result()  # at most one finished part stays in memory
                writing = writer.submit(_save, directory, number, part, manifest.shards[number][1])
            if writing is not None:
                writing.result()
        return EmbeddingCache(directory, manifest, [len(rows) for rows in shards], verified=True)


def check_usable(cache: EmbeddingCache, skipped: Counter[str], data: Data) -> None:
    """Check the number of unusable pairs; `skipped` has their reasons if this call has read them all.

    Raises:
        DataError: if too many pairs are unusable.
    """
    unusable = int((~cache.usable).sum())
    reasons = skipped if skipped.total() == unusable else Counter(unusable=unusable)
    check_skipped(reasons, len(cache.usable), data.max_unusable_fraction)


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Lock the directory; a second writer waits and then finds the parts."""
    with ExitStack() as held:
        try:
            held.enter_context(alone(directory, "embeddings", wait=True))
        except OSError as error:
            raise _unwritable(directory, error) from error
        yield


def _sweep(directory: Path) -> None:
    """Remove temporary files of killed writers. Requires the lock; files with other names are kept."""
    with suppress(OSError):  # leftover files are harmless
        for path in directory.iterdir():
            if _LEFTOVER.fullmatch(path.name) and (path.is_symlink() or path.is_file()):
                path.unlink(missing_ok=True)


def _bind(directory: Path, manifest: CacheManifest, dtype: Dtype | None) -> CacheManifest:
    path = directory / "cache.json"
    if os.path.lexists(path):
        found = read_manifest(directory)
        check_binding(found, manifest.model, manifest.shards, directory, dtype, manifest.dim)
        return found
    try:
        write_json(path, manifest.model_dump(mode="json"))
    except OSError as error:
        raise _unwritable(directory, error) from error
    return manifest


def _complete(directory: Path, number: int, rows: int, manifest: CacheManifest) -> bool:
    try:
        read_part(directory, number, rows, manifest, verify=True)
    except CacheError:
        return False
    return True


def _cut(rows: range, size: int) -> list[range]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _read_ahead(read: Callable[[Rows], Read], batches: Sequence[range]) -> Generator[Read]:
    """Yield the result of `read` for each batch, in order."""
    with ThreadPoolExecutor(1, thread_name_prefix="read-cache") as reader:
        waiting: deque[Future[Read]] = deque()
        try:
            for batch in batches:
                waiting.append(reader.submit(read, np.arange(batch.start, batch.stop, dtype=np.int64)))
                if len(waiting) > _AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            reader.shutdown(wait=True, cancel_futures=True)


def _save(directory: Path, number: int, part: Part, shard: str) -> None:
    try:
        write_part(part_path(directory, number), part, shard)
    except OSError as error:
        raise _unwritable(directory, error) from error


def _unwritable(directory: Path, error: OSError) -> CacheError:
    return CacheError(
        f"cannot write embeddings to {printable(directory)}: {error.strerror or error}",
        remedy="free disk space and run again: complete shards are kept",
        field="cache",
    )
