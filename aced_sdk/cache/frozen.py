# SPDX-License-Identifier: Apache-2.0
"""Sources of frozen embeddings: a model, embeddings stored in the shards, or an existing cache."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol, Self, TypedDict, Unpack

import torch

from aced_sdk.cache.embeddings import EmbeddingCache, default_directory, open_cache
from aced_sdk.cache.manifest import Dtype, read_manifest
from aced_sdk.cache.stored import stored_fingerprint, stored_width, write_stored
from aced_sdk.cache.writing import write_cache
from aced_sdk.config import Cached, Data, Frozen, FrozenConfig, Stored
from aced_sdk.data import Pool
from aced_sdk.engine import Ranks
from aced_sdk.errors import CacheError, ModelError
from aced_sdk.files import printable
from aced_sdk.towers import DualEncoder, load

Watch = Callable[[int, int], None]


class WriteOptions(TypedDict, total=False):
    """Options of `FrozenSource.write`; as the arguments of `write_cache`."""

    batch_size: int
    progress: Watch | None
    dtype: Dtype | None
    ranks: Ranks | None


class FrozenSource(Protocol):
    """A source of the embeddings of a pool.

    Attributes:
        fingerprint: identifies the source; stored in its cache.
        cache: folder of the cache; None: the default.
    """

    fingerprint: str
    cache: Path | None

    def to(self, device: torch.device) -> FrozenSource:
        """Move the source to a device."""

    def width(self, pool: Pool) -> int:
        """D, the embedding dimension."""

    def write(self, pool: Pool, directory: Path, data: Data, **options: Unpack[WriteOptions]) -> EmbeddingCache:
        """Write the missing rows of the cache; as `write_cache`."""


class FrozenModel:
    """Embeddings computed by a model (`Frozen`)."""

    def __init__(self, config: Frozen) -> None:
        self.encoder = load(config.model)
        self.fingerprint = self.encoder.fingerprint()
        self.cache = config.cache

    @classmethod
    def of(cls, encoder: DualEncoder) -> FrozenModel:
        """Return the source of a loaded encoder."""
        source = cls.__new__(cls)
        source.encoder, source.fingerprint, source.cache = encoder, encoder.fingerprint(), None
        return source

    def to(self, device: torch.device) -> FrozenSource:
        """Move the encoder."""
        self.encoder.to(device)
        return self

    def width(self, pool: Pool) -> int:
        return self.encoder.embedding_dim

    def write(self, pool: Pool, directory: Path, data: Data, **options: Unpack[WriteOptions]) -> EmbeddingCache:
        return write_cache(self.encoder, pool, directory, data, **options)


class _WithoutModel:
    """A source that does not compute."""

    def to(self, device: torch.device) -> Self:
        """Do nothing."""
        return self


class StoredEmbeddings(_WithoutModel):
    """Embeddings stored in the shards (`Stored`)."""

    def __init__(self, config: Stored) -> None:
        self.config = config
        self.fingerprint = stored_fingerprint(config)
        self.cache = config.cache

    def width(self, pool: Pool) -> int:
        return stored_width(self.config, pool)

    def write(self, pool: Pool, directory: Path, data: Data, **options: Unpack[WriteOptions]) -> EmbeddingCache:
        return write_stored(self.config, pool, directory, data, **options)


class CachedEmbeddings(_WithoutModel):
    """Embeddings in an existing cache (`Cached`)."""

    def __init__(self, config: Cached) -> None:
        self._manifest = read_manifest(config.directory)
        if config.model not in (None, self._manifest.model):
            raise CacheError(
                f"the cache {printable(config.directory)} is of the model {printable(self._manifest.model, 100)}",
                remedy="name the folder of the other model's cache",
                field="model",
            )
        self.fingerprint = self._manifest.model
        self.cache: Path | None = config.directory

    def width(self, pool: Pool) -> int:
        return self._manifest.dim

    def write(self, pool: Pool, directory: Path, data: Data, **options: Unpack[WriteOptions]) -> EmbeddingCache:
        """Open the cache, which only its own writer can complete."""
        return open_cache(directory, pool, self.fingerprint)


def build_frozen(config: FrozenConfig, field: str) -> FrozenSource:
    """Build the source of a config.

    Args:
        config: config of a reference or teacher.
        field: name of the field in the run's config, for errors.

    Raises:
        ModelError: if the model cannot be loaded.
        CacheError: if an existing cache is missing or of another model.
    """
    try:
        source: FrozenSource = config.build()
    except ModelError as error:
        raise ModelError(error.cause, remedy=error.remedy, field=error.field or f"{field}.model") from error
    except CacheError as error:
        where = "model" if error.field == "model" else "directory"
        raise CacheError(error.cause, remedy=error.remedy, field=f"{field}.{where}") from error
    return source


def open_or_write(
    source: FrozenSource,
    pool: Pool,
    data: Data,
    device: torch.device,
    progress: Watch | None = None,
    ranks: Ranks | None = None,
) -> EmbeddingCache:
    """Open the cache of a pool's embeddings; missing rows are written first, on `device`.

    The source is moved back to the CPU afterwards.

    Args:
        source: of the embeddings.
        pool: the pairs.
        data: as for `write_cache`.
        device: of this rank.
        progress: as for `write_cache`.
        ranks: share the work; all ranks call this function. None: one process.

    Raises:
        CacheError: if the folder contains a cache of another model or pool.
        DataError: if too many pairs are unusable.
        EngineError: if another rank fails.
    """
    directory = source.cache or default_directory(source.fingerprint, pool)
    cache = None
    with suppress(CacheError):  # missing or incomplete; `write` refuses the cache of another model or pool
        cache = open_cache(directory, pool, source.fingerprint)
    missing = cache is None
    if cache is not None and not (missing if ranks is None else ranks.sum(missing)):
        return cache
    try:
        return source.to(device).write(pool, directory, data, progress=progress, ranks=ranks)
    finally:
        source.to(torch.device("cpu"))
