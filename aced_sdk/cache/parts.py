# SPDX-License-Identifier: Apache-2.0
"""The files of an embedding cache: `cache.json`, and one checksummed safetensors file per shard."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor

from aced_sdk.config import Config, LossForm
from aced_sdk.data import Pool
from aced_sdk.errors import CacheError, ConfigError
from aced_sdk.files import (
    ReadError,
    check_tensors,
    inside,
    printable,
    read_json,
    save_tensors,
    tensor_digest,
    whole_file,
)
from aced_sdk.files.reading import MIB

Dtype = Literal["fp16", "bf16"]
DTYPES: dict[Dtype, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16}
MAX_SCALE = 1e6
_MAX_MANIFEST = 32 * MIB  # of 300,000 shards
_SHORT = 19  # "stored:" and twelve digits, or enough of a model's
_AGAIN = "delete that file and start again, or run aced.cache_embeddings again; complete parts are kept"


class CacheManifest(Config):
    """`cache.json`: what the embeddings are bound to, and the model's own temperature.

    `shards` are pairs of a shard's file name and its sha256, in the pool's order. Format 1 had no dtype: it was fp16.
    """

    format: Literal[1, 2] = 2
    model: str
    dim: int = Field(gt=0)
    scale: float = Field(gt=0, le=MAX_SCALE)
    bias: float = Field(ge=-MAX_SCALE, le=MAX_SCALE)
    shards: tuple[tuple[str, str], ...] = Field(fail_fast=True)
    dtype: Dtype = "fp16"
    trained_with: LossForm | None = None


@dataclass(frozen=True, eq=False)
class Part:
    """The embeddings of one shard's n pairs; read from a file, the tensors are memory-mapped.

    Attributes:
        image: fp16 or bf16 [n, D]; rows of unusable pairs are zero.
        text: likewise.
        usable: bool [n].
    """

    image: Tensor
    text: Tensor
    usable: Tensor

    @classmethod
    def empty(cls, rows: int, manifest: CacheManifest) -> Part:
        """Zeros, no pair usable yet."""
        image = torch.zeros(rows, manifest.dim, dtype=DTYPES[manifest.dtype])
        return cls(image, torch.zeros_like(image), torch.zeros(rows, dtype=torch.bool))

    def digest(self) -> str:
        """Hex digest of all bytes."""
        return tensor_digest(vars(self))

    def usable_digest(self) -> str:
        """Hex digest of `usable`, which is read and checked when a cache is opened."""
        return tensor_digest({"usable": self.usable})


def part_path(directory: Path, number: int) -> Path:
    """Where the embeddings of a shard lie."""
    return directory / f"part-{number:06d}.safetensors"


def write_part(path: Path, part: Part, shard: str = "") -> None:
    """Write a part, its checksum and the digest of its shard, whole or not at all.

    Raises:
        OSError: if the disk is full or the place cannot be written to.
    """
    with whole_file(path) as temporary:
        save_tensors(temporary, vars(part), {"sha256": f"{part.digest()} {part.usable_digest()} {shard}"})


def read_part(directory: Path, number: int, rows: int, manifest: CacheManifest, verify: bool) -> Part:
    """Map a part into memory; its header and `usable` are read and checked, all of it where it is verified.

    Parts of older versions have no digest of `usable`, and are verified as a whole. They do not name their shard.

    Args:
        directory: its cache.
        number: which shard's.
        rows: pairs that it must hold.
        manifest: of its cache.
        verify: read all of it and compare its checksum.

    Raises:
        CacheError: if it is missing, torn, a link out of the cache, of another shard, of other sizes or types, or not
            what was written.
    """
    path = part_path(directory, number)
    shown = printable(path)
    try:
        check_tensors(inside(path.parent, path.name))
        with safe_open(path, "pt") as stream:
            part = Part(*(stream.get_tensor(name) for name in ("image", "text", "usable")))
            digests = (stream.metadata() or {}).get("sha256", "")
            whole, usable, shard = (*digests.split(" ", 2), "", "", "")[:3]
    except (OSError, RuntimeError, MemoryError, ReadError, SafetensorError) as error:  # two of them: no memory
        raise CacheError(f"the embeddings {shown} cannot be read: {printable(error)}", remedy=_AGAIN) from error
    if shard not in ("", manifest.shards[number][1]):  # parts of equal sizes can be mixed up
        raise CacheError(f"{shown} is of another shard", remedy=_AGAIN)
    shape, dtype = (rows, manifest.dim), DTYPES[manifest.dtype]
    if {part.image.shape, part.text.shape} != {shape} or part.usable.shape != shape[:1]:
        raise CacheError(f"{shown} has other sizes than its shard: {list(part.image.shape)}", remedy=_AGAIN)
    if {part.image.dtype, part.text.dtype} != {dtype} or part.usable.dtype != torch.bool:
        raise CacheError(f"{shown} holds {part.image.dtype}, and its cache {manifest.dtype}", remedy=_AGAIN)
    if usable not in ("", part.usable_digest()) or ((verify or not usable) and whole != part.digest()):
        raise CacheError(f"{shown} is not what was written: its checksum is another", remedy=_AGAIN)
    return part


def read_manifest(directory: Path) -> CacheManifest:
    """The cache's `cache.json`.

    Raises:
        CacheError: if it is missing or not a manifest.
    """
    try:
        return CacheManifest(**read_json(inside(directory, "cache.json"), _MAX_MANIFEST))
    except (ReadError, TypeError, ConfigError) as error:
        cause = error.cause if isinstance(error, ReadError | ConfigError) else error
        raise CacheError(
            f"{printable(directory)} is no embedding cache: {cause}", remedy="make it with aced.cache_embeddings"
        ) from None


def bound_shards(pool: Pool) -> tuple[tuple[str, str], ...]:
    """File name and binding of each shard."""
    return tuple(zip((shard.name for shard in pool.shards), pool.bindings, strict=True))


def check_binding(
    found: CacheManifest,
    model: str,
    shards: tuple[tuple[str, str], ...],
    directory: Path,
    dtype: Dtype | None = None,
    dim: int | None = None,
) -> None:
    """Refuse a cache of something else.

    Raises:
        CacheError: if model or shards differ, or number format or width where they are asked for.
    """
    another = "name another cache directory, or delete this one"
    shown = printable(directory)
    if found.model != model:
        raise CacheError(
            f"the cache {shown} is of another model or preprocessing, or another reading of stored embeddings "
            f"({found.model[:_SHORT]}, not {model[:_SHORT]})",
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
