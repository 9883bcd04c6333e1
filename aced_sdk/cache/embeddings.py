# SPDX-License-Identifier: Apache-2.0
"""Read the cached embeddings of a pool, memory-mapped."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from aced_sdk.cache.parts import (
    DTYPES,
    CacheManifest,
    Part,
    bound_shards,
    check_binding,
    read_manifest,
    read_part,
)
from aced_sdk.data import Pool
from aced_sdk.files import home
from aced_sdk.towers import Embeddings

_OPEN_PARTS = 16_384  # each is a memory map, and Linux allows a process 65,530


class EmbeddingCache:
    """The embeddings of a frozen model for all N pairs of a pool, in row order, memory-mapped from disk.

    The checksum of a part is verified when its first row is read, so opening a large cache is fast.

    Attributes:
        directory: folder of the cache.
        usable: bool [N], pairs with embeddings.
    """

    def __init__(self, directory: Path, manifest: CacheManifest, sizes: Sequence[int], verified: bool = False) -> None:
        self.directory = directory
        self._manifest = manifest
        self._sizes = sizes
        self._ends = torch.tensor(sizes, dtype=torch.int64).cumsum(0)
        self._unverified = set() if verified else set(range(len(sizes)))
        self._part = lru_cache(_OPEN_PARTS)(self._open)
        self.usable = torch.cat([self._read(number, verify=False).usable for number in range(len(sizes))])

    @property
    def model(self) -> str:
        """Fingerprint of the model, or of the config of stored embeddings."""
        return self._manifest.model

    def rows(self, rows: Tensor, device: torch.device) -> Embeddings:
        """Return the embeddings of rows (int64 [K]) as float32 on a device, normalised again after the 16-bit storage.

        Raises:
            CacheError: if a part is damaged.
        """
        rows = rows.cpu()
        image = torch.empty(len(rows), self._manifest.dim, dtype=DTYPES[self._manifest.dtype])
        text = torch.empty_like(image)
        order = rows.argsort()  # group the rows of a part, and read the disk sequentially
        numbers = torch.bucketize(rows[order], self._ends, right=True)
        counts = torch.bincount(numbers, minlength=len(self._sizes))
        for number, places in enumerate(order.tensor_split(counts.cumsum(0)[:-1])):
            if not len(places):
                continue
            part = self._part(number)
            local = rows[places] - (self._ends[number] - self._sizes[number])
            image[places] = part.image[local]
            text[places] = part.text[local]

        def normal(values: Tensor) -> Tensor:
            return torch.nn.functional.normalize(values.to(device).float(), dim=-1)

        return Embeddings(
            normal(image), normal(text), self._manifest.scale, self._manifest.bias, self._manifest.trained_with
        )

    @property
    def embeddings(self) -> Embeddings:
        """All embeddings [N, D] in the stored dtype. Loads the whole cache into memory.

        Raises:
            CacheError: if a part is damaged.
        """
        parts = [self._part(number) for number in range(len(self._sizes))]
        image, text = torch.cat([part.image for part in parts]), torch.cat([part.text for part in parts])
        return Embeddings(image, text, self._manifest.scale, self._manifest.bias, self._manifest.trained_with)

    def _open(self, number: int) -> Part:
        part = self._read(number, verify=number in self._unverified)
        self._unverified.discard(number)
        return part

    def _read(self, number: int, verify: bool) -> Part:
        return read_part(self.directory, number, self._sizes[number], self._manifest, verify)


def default_directory(fingerprint: str, pool: Pool) -> Path:
    """Default folder for the embeddings of a pool, in the cache home."""
    return home() / "embeddings" / f"{fingerprint.rpartition(':')[2][:12]}-{pool.fingerprint[:12]}"


def open_cache(directory: Path, fingerprint: str, pool: Pool) -> EmbeddingCache:
    """Open a complete cache.

    Args:
        directory: folder of the cache.
        fingerprint: required fingerprint of the model, or of the config of stored embeddings.
        pool: the pairs.

    Raises:
        CacheError: if the cache is of another model or other shards, or a part is missing or truncated.
    """
    manifest = read_manifest(directory)
    check_binding(manifest, fingerprint, bound_shards(pool), directory)
    return EmbeddingCache(directory, manifest, [len(rows) for _, rows in pool.shard_rows()])
