# SPDX-License-Identifier: Apache-2.0
"""Writing and reading a frozen model's embeddings of a pool."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from aced_sdk.config import Config, Data
from aced_sdk.data import Decoding, Pool, check_bad
from aced_sdk.errors import CacheError, ConfigError
from aced_sdk.files import home, save_tensors, whole_file, write_json
from aced_sdk.towers import DualEncoder, Embeddings


class CacheManifest(Config):
    """`cache.json`: what the embeddings are bound to, and the model's own temperature.

    `shards` are pairs of a shard's file name and its sha256, in the pool's order.
    """

    format: Literal[1] = 1
    model: str
    dim: int
    scale: float
    bias: float
    shards: tuple[tuple[str, str], ...]


@dataclass(frozen=True, eq=False)
class EmbeddingCache:
    """A frozen model's embeddings of a whole pool, in row order.

    Attributes:
        directory: where they lie.
        embeddings: float16 [N, D] each; rows of unusable pairs are zero.
        usable: bool [N].
    """

    directory: Path
    embeddings: Embeddings
    usable: Tensor

    def rows(self, rows: Tensor, device: torch.device) -> Embeddings:
        """Embeddings of some rows (int64 [K]) as float32 on a device, re-normalised after rounding to 16 bits."""
        picked = self.embeddings[rows.cpu()]
        normal = torch.nn.functional.normalize
        return Embeddings(
            normal(picked.image.to(device, torch.float32), dim=-1),
            normal(picked.text.to(device, torch.float32), dim=-1),
            picked.scale,
            picked.bias,
        )


def default_directory(fingerprint: str, pool: Pool) -> Path:
    """Where a model's embeddings of a pool lie unless the config says otherwise."""
    return home() / "embeddings" / f"{fingerprint[:12]}-{pool.fingerprint[:12]}"


def write_cache(
    encoder: DualEncoder,
    pool: Pool,
    directory: Path,
    data: Data,
    batch_size: int = 256,
    progress: Callable[[int, int], None] | None = None,
) -> EmbeddingCache:
    """Embed every pair of the pool; shards whose embeddings are complete are kept, so a killed run goes on.

    Raises:
        CacheError: if the directory belongs to another model or pool, or cannot be written.
        DataError: if too many pairs are unusable.
    """
    manifest = CacheManifest(
        model=encoder.fingerprint(),
        dim=encoder.embedding_dim,
        scale=encoder.scale,
        bias=encoder.bias,
        shards=_bound_shards(pool),
    )
    path = directory / "cache.json"
    if path.is_file():
        _check(read_manifest(directory), manifest, directory)
    else:
        _written(directory, lambda: write_json(path, manifest.model_dump(mode="json")))
    decoder = Decoding(pool, encoder, data)
    for number, (_, rows) in enumerate(pool.shard_rows()):
        part = _part(directory, number)
        if _complete(part, len(rows), manifest.dim):
            if progress:
                progress(rows.stop, len(pool))
            continue
        done = None if progress is None else (lambda n, start=rows.start: progress(start + n, len(pool)))
        tensors = _embed(encoder, decoder, rows, batch_size, done)

        def save(target: Path = part, values: dict[str, Tensor] = tensors) -> None:
            with whole_file(target) as temporary:
                save_tensors(temporary, values, {"sha256": _digest(values)})

        _written(directory, save)
    cache = open_cache(directory, manifest.model, pool)
    unusable = len(pool) - int(cache.usable.sum())
    bad = decoder.bad if decoder.bad.total() == unusable else Counter(unusable=unusable)
    check_bad(bad, len(pool), data.max_bad_fraction, least=1)
    return cache


def _embed(
    encoder: DualEncoder, decoder: Decoding, rows: range, batch_size: int, progress: Callable[[int], None] | None
) -> dict[str, Tensor]:
    image = torch.zeros(len(rows), encoder.embedding_dim, dtype=torch.float16)
    text = torch.zeros_like(image)
    usable = torch.zeros(len(rows), dtype=torch.bool)
    for start in range(0, len(rows), batch_size):
        chunk = rows[start : start + batch_size]
        batch = decoder.fetch(np.arange(chunk.start, chunk.stop, dtype=np.int64))
        if len(batch):
            places = batch.rows - rows.start
            # Captions repeat; each distinct one is embedded once.
            distinct, inverse = torch.unique(batch.tokens, dim=0, return_inverse=True)
            image[places] = encoder.encode_image(batch.images).cpu().half()
            text[places] = encoder.encode_text(distinct).cpu().half()[inverse]
            usable[places] = True
        if progress:
            progress(start + len(chunk))
    return {"image": image, "text": text, "usable": usable}


def open_cache(directory: Path, fingerprint: str, pool: Pool) -> EmbeddingCache:
    """Read a complete cache.

    Args:
        directory: its folder.
        fingerprint: of the model that the embeddings must come from.
        pool: the pairs they must belong to.

    Raises:
        CacheError: if it is of another model or of other shards, incomplete or torn.
    """
    manifest = read_manifest(directory)
    expected = manifest.replace(model=fingerprint, shards=_bound_shards(pool))
    _check(manifest, expected, directory)
    parts = []
    for number, (shard, rows) in enumerate(pool.shard_rows()):
        parts.append(_read(_part(directory, number), shard, len(rows), manifest.dim))
    joined = {name: torch.cat([part[name] for part in parts]) for name in ("image", "text", "usable")}
    return EmbeddingCache(
        directory, Embeddings(joined["image"], joined["text"], manifest.scale, manifest.bias), joined["usable"]
    )


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


def _bound_shards(pool: Pool) -> tuple[tuple[str, str], ...]:
    return tuple(zip((shard.name for shard in pool.shards), pool.digests, strict=True))


def _check(found: CacheManifest, expected: CacheManifest, directory: Path) -> None:
    if found.model != expected.model:
        raise CacheError(
            f"the cache {directory} is of another model or preprocessing "
            f"({found.model[:12]}, not {expected.model[:12]})",
            remedy="name another cache directory, or delete this one",
            field="cache",
        )
    if found.shards != expected.shards:
        different = set(found.shards) ^ set(expected.shards)
        raise CacheError(
            f"the cache {directory} is of other shards ({len(different)} differ or are reordered)",
            remedy="name another cache directory, or delete this one",
            field="cache",
        )


def _part(directory: Path, number: int) -> Path:
    return directory / f"part-{number:06d}.safetensors"


def _read(path: Path, shard: Path, rows: int, dim: int) -> dict[str, Tensor]:
    again = "run aced.cache_embeddings again; complete shards are kept"
    try:
        with safe_open(path, "pt") as stream:
            part = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 - no mapping
            digest = (stream.metadata() or {}).get("sha256")
    except (OSError, SafetensorError) as error:
        raise CacheError(f"the embeddings of {shard.name} cannot be read: {error}", remedy=again) from error
    if digest != _digest(part):
        raise CacheError(f"{path} is not what was written: its checksum is another", remedy=again)
    if len(part["usable"]) != rows or part["image"].shape[1] != dim:
        raise CacheError(f"{path} has other sizes than {shard.name}", remedy=again)
    return part


def _digest(part: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(part.items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def _complete(path: Path, rows: int, dim: int) -> bool:
    try:
        _read(path, path, rows, dim)
    except CacheError:
        return False
    return True


def _written(directory: Path, write: Callable[[], None]) -> None:
    try:
        write()
    except OSError as error:
        raise CacheError(
            f"cannot write embeddings to {directory}: {error.strerror or error}",
            remedy="free disk space and run again: complete shards are kept",
            field="cache",
        ) from error
