# SPDX-License-Identifier: Apache-2.0
"""`cache.json`: model, shards and dtype of a cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from aced_sdk.config import Config, LossForm
from aced_sdk.data import Pool
from aced_sdk.errors import CacheError, ConfigError
from aced_sdk.files import ReadError, inside, printable, read_json
from aced_sdk.files.reading import MIB

Dtype = Literal["fp16", "bf16"]
DTYPES: dict[Dtype, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16}
MANIFEST = "cache.json"
MAX_SCALE = 1e6
FORMAT = 3
_MAX_MANIFEST = 32 * MIB  # of 300,000 shards
_SHORT = 19  # "stored:" and twelve digits, or enough of a model's
Shards = str | PathLike[str] | Sequence[str | PathLike[str]]


class CacheManifest(Config):
    """What the embeddings are bound to, and the model's own scale and bias.

    `shards` are pairs of a shard's file name and its digest, in the pool's order.
    """

    format: Literal[3] = 3
    model: str = Field(min_length=1)
    dim: int = Field(gt=0)
    scale: float = Field(gt=0, le=MAX_SCALE)
    bias: float = Field(ge=-MAX_SCALE, le=MAX_SCALE)
    shards: tuple[tuple[str, str], ...] = Field(fail_fast=True)
    dtype: Dtype = "fp16"
    trained_with: LossForm | None = None

    def key(self) -> bytes:
        """32 bytes that differ for every other manifest. The checksums of a cache depend on them."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).digest()


def read_manifest(directory: Path) -> CacheManifest:
    """Read `cache.json`.

    Raises:
        CacheError: if it is missing, is not a manifest, or belongs to an older format.
    """
    try:
        found: Any = read_json(inside(directory, MANIFEST), _MAX_MANIFEST)
        if isinstance(found, dict) and found.get("format") in range(1, FORMAT):
            raise CacheError(
                f"the cache {printable(directory)} has an older format with one file per shard",
                remedy="delete the folder and write the cache again",
                field="cache",
            )
        return CacheManifest(**found)
    except (ReadError, TypeError, ConfigError) as error:
        cause = error.cause if isinstance(error, ReadError | ConfigError) else error
        raise CacheError(
            f"{printable(directory)} is no embedding cache: {cause}", remedy="make it with aced.cache_embeddings"
        ) from None


def as_pool(pool: Pool | Shards) -> Pool:
    """Return a pool, or open the pool of some shards."""
    if isinstance(pool, Pool):
        return pool
    return Pool([fspath(shard) for shard in ([pool] if isinstance(pool, str | PathLike) else pool)])


def bound_shards(pool: Pool) -> tuple[tuple[str, str], ...]:
    """File name and binding of each shard."""
    return tuple(zip((shard.name for shard in pool.shards), pool.bindings, strict=True))


def check_binding(
    found: CacheManifest,
    model: str | None,
    shards: tuple[tuple[str, str], ...],
    directory: Path,
    dtype: Dtype | None = None,
    dim: int | None = None,
) -> None:
    """Check that a cache matches the given values; None is not checked.

    Raises:
        CacheError: if model, shards, dtype or dimension differ.
    """
    another = "name another cache directory, or delete this one"
    shown = printable(directory)
    if model not in (None, found.model):
        raise CacheError(
            f"the cache {shown} is of another model or preprocessing, or another reading of stored embeddings "
            f"({printable(found.model, _SHORT)}, not {printable(model, _SHORT)})",
            remedy=another,
            field="cache",
        )
    if found.shards != shards:
        different = set(found.shards) ^ set(shards)
        raise CacheError(
            f"the cache {shown} is of other shards ({len(different)} differ or are reordered)",
            remedy=another,
            field="cache",
        )
    if dim not in (None, found.dim):
        raise CacheError(f"the cache {shown} has width {found.dim}, not {dim}", remedy=another, field="cache")
    if dtype not in (None, found.dtype):
        raise CacheError(f"the cache {shown} holds {found.dtype}, not {dtype}", remedy=another, field="dtype")
