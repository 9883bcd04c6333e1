# SPDX-License-Identifier: Apache-2.0
"""A cache made of embeddings that the shards carry in `KEY.npz`, as DataCompDR's do; no model is loaded.

DataCompDR (MobileCLIP, arXiv 2311.17049) stores `image_emb` [augmentations, 1536] of augmented pictures and `text_emb`
[1 + synthetic captions, 1536], each row two models' 768 joined. A run here shows the plain picture, so the
augmentations' mean stands for it, which is an approximation.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from aced_sdk.cache.embeddings import EmbeddingCache
from aced_sdk.cache.manifest import CacheManifest, Dtype, bound_shards
from aced_sdk.cache.writing import Embedded, check_usable, write_rows
from aced_sdk.config import Data, Stored
from aced_sdk.data import Pool, UnusablePair
from aced_sdk.data.arrays import read_array_header
from aced_sdk.data.rowset import Rows
from aced_sdk.engine import Ranks
from aced_sdk.errors import DataError
from aced_sdk.files.reading import MIB

Vectors = NDArray[np.float32]
_MAX_NPZ = _MAX_ARRAY = 16 * MIB  # DataCompDR's have about 0.2 MB
_MAX_ENTRIES = 256  # of a KEY.npz, which may hold arrays for other programs
_MAX_WIDTH = 8192  # a batch of 1,024 pairs, four of which are in memory, then has 64 MB


def stored_fingerprint(stored: Stored) -> str:
    """What a cache of stored embeddings is bound to in place of a model: everything but the cache's own place."""
    return f"stored:{stored.replace(cache=None).hash()}"


def stored_width(stored: Stored, pool: Pool) -> int:
    """D, as the first pair has it that carries embeddings.

    Raises:
        DataError: if no pair carries any, or the parts do not add up to D.
    """
    reason = "the pool is empty"
    for row in range(len(pool)):
        try:
            width = int(_arrays(stored, pool, row)[0].shape[1])
        except UnusablePair as unusable:
            reason = str(unusable)
            continue
        if stored.parts and sum(stored.parts) != width:
            raise DataError(
                f"stored embeddings have {width} numbers, and their parts add up to {sum(stored.parts)}",
                remedy="give the width of each model of the ensemble, or no parts",
                field="parts",
            )
        return width
    raise DataError(
        f"no pair of the shards carries arrays {stored.image!r} and {stored.text!r} in its KEY.npz ({reason})",
        remedy="name the arrays that are there, or a model in place of stored embeddings",
        field="data.shards",
    )


def write_stored(
    stored: Stored,
    pool: Pool,
    directory: Path,
    data: Data,
    batch_size: int = 1024,
    progress: Callable[[int, int], None] | None = None,
    dtype: Dtype | None = None,
    ranks: Ranks | None = None,
) -> EmbeddingCache:
    """Make a cache of the embeddings in the shards; arguments, and what a killed run leaves, as for `write_cache`.

    Raises:
        CacheError: if the directory belongs to another reading, pool or dtype, or cannot be written.
        DataError: if too many pairs have no usable embeddings.
    """
    width = stored_width(stored, pool)
    manifest = CacheManifest(
        model=stored_fingerprint(stored),
        dim=width,
        scale=stored.scale,
        trained_with=stored.trained_with,
        bias=stored.bias,
        shards=bound_shards(pool),
        dtype=dtype or "fp16",
    )
    skipped: Counter[str] = Counter()

    def one(row: int) -> tuple[Vectors, Vectors] | str:
        try:
            return _pair(stored, pool, row, width)
        except UnusablePair as reason:
            return str(reason)

    with ThreadPoolExecutor(data.workers, thread_name_prefix="read-npz") as threads:

        def read(rows: Rows) -> Embedded:
            pairs = list(threads.map(one, rows.tolist()))
            skipped.update(pair for pair in pairs if isinstance(pair, str))
            good = [place for place, pair in enumerate(pairs) if not isinstance(pair, str)]
            found = np.array([pairs[place] for place in good], dtype=np.float32).reshape(-1, 2, width)
            return Embedded(torch.from_numpy(rows[good]), *torch.from_numpy(found).unbind(1))

        cache = write_rows(
            directory, manifest, pool, read, lambda embedded: embedded, batch_size, progress, dtype, ranks
        )
    check_usable(cache, skipped, data)
    return cache


def _pair(stored: Stored, pool: Pool, row: int, width: int) -> tuple[Vectors, Vectors]:
    """One image and one text embedding [D]: the augmentations' mean, and the first caption's."""
    image, text = _arrays(stored, pool, row)
    if {image.shape[1], text.shape[1]} != {width}:
        raise UnusablePair("stored embeddings of another width")
    parts = stored.parts or (width,)
    return _unit(_unit(image, parts).mean(axis=0, keepdims=True), parts)[0], _unit(text[:1], parts)[0]


def _unit(vectors: Vectors, parts: tuple[int, ...]) -> Vectors:
    """Rows [K, D] normalised part by part, then as a whole: each model of an ensemble weighs the same."""
    pieces = np.split(vectors, np.cumsum(parts)[:-1], axis=1)
    norms = [np.linalg.norm(piece, axis=1, keepdims=True) for piece in pieces]
    if not all(np.isfinite(norm).all() and norm.all() for norm in norms):
        raise UnusablePair("stored embeddings not finite, or zero")
    joined = np.hstack([piece / norm for piece, norm in zip(pieces, norms, strict=True)])
    return np.asarray(joined / np.sqrt(len(parts)), dtype=np.float32)


def _arrays(stored: Stored, pool: Pool, row: int) -> tuple[Vectors, Vectors]:
    """The pair's arrays as float32 [augmentations, D] and [captions, D]."""
    content = pool.read(row, "npz", _MAX_NPZ)
    if content is None:
        raise UnusablePair("no stored embeddings")
    if content.count(b"PK\1\2") > _MAX_ENTRIES:  # zipfile reads its whole directory for every pair
        raise UnusablePair("unreadable npz")
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return _rows(archive, stored.image), _rows(archive, stored.text)
    except UnusablePair:
        raise
    except Exception as error:  # broken archives and arrays make zipfile and numpy raise many kinds of errors
        raise UnusablePair("unreadable npz") from error


def _rows(archive: zipfile.ZipFile, name: str) -> Vectors:
    """An array as float32 [K, D]; nothing is unpacked before its size is known."""
    member = next((f for f in (f"{name}.npy", name) if f in archive.NameToInfo), None)
    if member is None:
        raise UnusablePair("no array of that name")
    if archive.getinfo(member).compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise UnusablePair("unreadable npz")
    with archive.open(member) as stream:
        shape, fortran, dtype = read_array_header(stream)
        if dtype.kind != "f" or len(shape) not in (1, 2) or not all(shape):
            raise UnusablePair("stored embeddings of an odd shape or type")
        if shape[-1] > _MAX_WIDTH or math.prod(shape) * dtype.itemsize > _MAX_ARRAY:
            raise UnusablePair("stored embeddings are too large")
        array = np.frombuffer(stream.read(math.prod(shape) * dtype.itemsize), dtype)
    return np.atleast_2d(array.reshape(shape, order="F" if fortran else "C").astype(np.float32))
