# SPDX-License-Identifier: Apache-2.0
"""The files of an embedding cache: `cache.json`, and one checksummed safetensors file per shard."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from aced_sdk.config import Config
from aced_sdk.data import Pool
from aced_sdk.errors import CacheError, ConfigError
from aced_sdk.files import save_tensors, tensor_digest, whole_file

Dtype = Literal["fp16", "bf16"]
DTYPES: dict[Dtype, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16}
_SHORT = 19  # "stored:" and twelve digits, or enough of a model's
_AGAIN = "delete that file and start again, or run aced.cache_embeddings again; complete parts are kept"


class CacheManifest(Config):
    """`cache.json`: what the embeddings are bound to, and the model's own temperature.

    `shards` are pairs of a shard's file name and its sha256, in the pool's order. Format 1 had no dtype: it was fp16.
    """

    format: Literal[1, 2] = 2
    model: str
    dim: int
    scale: float
    bias: float
    shards: tuple[tuple[str, str], ...]
    dtype: Dtype = "fp16"


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


def part_path(directory: Path, number: int) -> Path:
    """Where the embeddings of a shard lie."""
    return directory / f"part-{number:06d}.safetensors"


def write_part(path: Path, part: Part) -> None:
    """Write a part with its checksum, whole or not at all.

    Raises:
        OSError: if the disk is full or the place cannot be written to.
    """
    with whole_file(path) as temporary:
        save_tensors(temporary, vars(part), {"sha256": part.digest()})


def read_part(path: Path, rows: int, manifest: CacheManifest, verify: bool) -> Part:
    """Map a part into memory; nothing but its header is read unless it is verified.

    Args:
        path: its file.
        rows: pairs that it must hold.
        manifest: of its cache.
        verify: read all of it and compare its checksum.

    Raises:
        CacheError: if it is missing, torn, of other sizes, or (where verified) not what was written.
    """
    try:
        with safe_open(path, "pt") as stream:
            part = Part(*(stream.get_tensor(name) for name in ("image", "text", "usable")))
            digest = (stream.metadata() or {}).get("sha256")
    except (OSError, SafetensorError) as error:
        raise CacheError(f"the embeddings {path} cannot be read: {error}", remedy=_AGAIN) from error
    shape = (rows, manifest.dim)
    if {part.image.shape, part.text.shape} != {shape} or part.usable.shape != shape[:1]:
        raise CacheError(f"{path} has other sizes than its shard: {list(part.image.shape)}", remedy=_AGAIN)
    if part.image.dtype != DTYPES[manifest.dtype]:
        raise CacheError(f"{path} holds {part.image.dtype}, and its cache {manifest.dtype}", remedy=_AGAIN)
    if verify and digest != part.digest():
        raise CacheError(f"{path} is not what was written: its checksum is another", remedy=_AGAIN)
    return part


def read_manifest(directory: Path) -> CacheManifest:
    """The cache's `cache.json`.

    Raises:
        CacheError: if it is missing or not a manifest.
    """
    try:
        return CacheManifest(**json.loads((directory / "cache.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, ConfigError) as error:
        raise CacheError(
            f"{directory} is no embedding cache: {error}", remedy="make it with aced.cache_embeddings"
        ) from None


def bound_shards(pool: Pool) -> tuple[tuple[str, str], ...]:
    """File name and sha256 of each shard."""
    return tuple(zip((shard.name for shard in pool.shards), pool.digests, strict=True))


def check_binding(
    found: CacheManifest, model: str, shards: tuple[tuple[str, str], ...], directory: Path, dtype: Dtype | None = None
) -> None:
    """Refuse a cache of something else.

    Raises:
        CacheError: if model or shards differ, or the number format where one is asked for.
    """
    another = "name another cache directory, or delete this one"
    if found.model != model:
        raise CacheError(
            f"the cache {directory} is of another model or preprocessing, or another reading of stored embeddings "
            f"({found.model[:_SHORT]}, not {model[:_SHORT]})",
            remedy=another,
            field="cache",
        )
    if found.shards != shards:
        different = set(found.shards) ^ set(shards)
        raise CacheError(
            f"the cache {directory} is of other shards ({len(different)} differ or are reordered)",
            remedy=another,
            field="cache",
        )
    if dtype not in (None, found.dtype):
        raise CacheError(f"the cache {directory} holds {found.dtype}, not {dtype}", remedy=another, field="dtype")
