# SPDX-License-Identifier: Apache-2.0
"""From rows of the pool to tensors: decoded on the fly, or prepared once and memory-mapped."""

from __future__ import annotations

import math
import os
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from aced_sdk.config import Data
from aced_sdk.data.arrays import read_array_header
from aced_sdk.data.pool import Pool, UnusablePair
from aced_sdk.data.rowset import Rows
from aced_sdk.errors import DataError
from aced_sdk.files import (
    check_digests,
    inside,
    open_regular,
    printable,
    read_json,
    reserve,
    sha256,
    whole_folder,
    write_json,
)
from aced_sdk.files.reading import MIB
from aced_sdk.processing.plain import PictureError, open_picture, read_header, to_rgb
from aced_sdk.processing.plain.inputs import MAX_CHARACTERS
from aced_sdk.processing.plain.pictures import webp_size
from aced_sdk.processing.plain.room import Room
from aced_sdk.processing.processor import Processor

_IMAGES, _TOKENS, _USABLE, _MANIFEST = "images.npy", "tokens.npy", "usable.npy", "manifest.json"
_SUMS = "sums.npy"  # a CRC-32 of each picture; they are many, and each is checked when it is first read

_AGAIN = "delete that folder and start again: it is made anew"

# Pixels of the large pictures that threads work on at a time: each takes up to 16 bytes.
_LARGE = 2**23
_IN_WORK = Room(2**26)


@dataclass(frozen=True, eq=False)
class SuperBatch:
    """Pairs ready for a tower, and the rows they came from.

    Attributes:
        images: uint8 [B, 3, H, W].
        tokens: int64 [B, L].
        rows: int64 [B], numbers in the pool.
    """

    images: Tensor
    tokens: Tensor
    rows: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, picked: Tensor) -> SuperBatch:
        """The pairs at these places (int64 [K])."""
        return SuperBatch(self.images[picked], self.tokens[picked], self.rows[picked])


class Source(Protocol):
    """Where a stream takes its pairs from.

    Attributes:
        seen: different pairs that were read, where reading may fail.
        skipped: how many of them are unusable, by reason.
    """

    seen: int
    skipped: Counter[str]

    def usable(self, block: slice) -> NDArray[np.bool_]:
        """Whether each row of a block may be read: bool. `Decoding` finds broken pairs only when it reads them."""

    def fetch(self, rows: Rows) -> SuperBatch:
        """The usable pairs among `rows`, in order."""


class Decoding:
    """Decodes, resizes and tokenises when asked, on several threads.

    Attributes:
        seen: different pairs that were read.
        skipped: how many of them are unusable, by reason.

    Raises:
        DataError: in `fetch`, when more than `max_unusable_fraction` of at least 1,000 pairs, or of the whole pool, are
            unusable.
    """

    def __init__(self, pool: Pool, processor: Processor, config: Data) -> None:
        self.pool = pool
        self.processor = processor
        self.config = config
        self.seen = 0
        self.skipped: Counter[str] = Counter()
        self._first = ""  # names the first unusable pair
        self._met = np.zeros(len(pool) // 8 + 1, dtype=np.uint8)  # one bit for each pair
        self._threads = ThreadPoolExecutor(config.workers, thread_name_prefix="decode")

    def usable(self, block: slice) -> NDArray[np.bool_]:
        return np.ones(block.stop - block.start, dtype=np.bool_)

    def fetch(self, rows: Rows) -> SuperBatch:
        pairs = self.decode(rows)
        good = [place for place, pair in enumerate(pairs) if pair is not None]
        images = [pair[0] for pair in pairs if pair is not None]
        texts = [pair[1] for pair in pairs if pair is not None]
        if not good:
            height, width = self.processor.preprocess_config.size
            empty = torch.empty(0, self.processor.context_length, dtype=torch.int64)
            return SuperBatch(
                torch.empty(0, 3, height, width, dtype=torch.uint8), empty, torch.empty(0, dtype=torch.int64)
            )
        return SuperBatch(torch.stack(images), self.processor.tokenize(texts), torch.from_numpy(rows[good]))

    def decode(self, rows: Sequence[int] | Rows) -> list[tuple[Tensor, str] | None]:
        """Resized uint8 picture and caption per row; None for an unusable pair, which is counted."""
        pairs = list(self._threads.map(self._one, [int(row) for row in rows]))
        for row, pair in zip(rows, pairs, strict=True):
            bit = np.uint8(1 << (int(row) & 7))
            if self._met[row >> 3] & bit:
                continue
            self._met[row >> 3] |= bit
            self.seen += 1
            if isinstance(pair, str):
                self.skipped[pair] += 1
                self._first = self._first or self.pool.name(int(row))
        least = min(1000, len(self.pool))
        check_skipped(self.skipped, self.seen, self.config.max_unusable_fraction, least, self._first)
        return [None if isinstance(pair, str) else pair for pair in pairs]

    def _one(self, row: int) -> tuple[Tensor, str] | str:
        try:
            text = self.pool.text(row, self.config.max_caption_bytes)
            if len(text) > MAX_CHARACTERS:
                raise UnusablePair("caption has too many characters")
            return resized(self.pool, row, self.processor, self.config.max_pixels), text
        except UnusablePair as reason:
            return str(reason)


def resized(pool: Pool, row: int, processor: Processor, max_pixels: int) -> Tensor:
    """A pair's picture as the tower takes it, before normalisation: uint8 [3, H, W].

    Raises:
        UnusablePair: as `Pool.image`, and for a picture that has no RGB form.
    """
    try:
        content = pool.encoded(row)
        canvas = math.prod(webp_size(content) or (0,))  # reserved when the header is read
        with _turn(min(canvas, max_pixels)):
            header = read_header(content, max_pixels=max_pixels)
            with _turn(0 if canvas else header.width * header.height):
                return processor.resize(to_rgb(open_picture(header, max_pixels=max_pixels)))
    except PictureError as error:
        raise UnusablePair(error.reason) from error


def _turn(pixels: int) -> AbstractContextManager[None]:
    """Reserve the pixels of a large picture while it is decoded; small ones do not wait."""
    return _IN_WORK.of(pixels) if pixels > _LARGE else nullcontext()


def check_skipped(skipped: Counter[str], seen: int, bound: float, least: int = 1, first: str = "") -> None:
    """Raise if too many pairs are unusable.

    Args:
        skipped: unusable pairs by reason.
        seen: pairs that were read.
        bound: largest fraction that may be unusable.
        least: the bound holds from this many pairs on; before, only if no pair at all is usable.
        first: the name of an unusable pair, for the message.

    Raises:
        DataError: if more are.
    """
    count = skipped.total()
    if seen and count > bound * seen and (seen >= least or count == seen):
        reasons = ", ".join(f"{number} {reason}" for reason, number in skipped.most_common(4))
        example = f"; the first is {first}" if first else ""
        raise DataError(
            f"{count} of {seen} pairs are unusable ({reasons}{example})",
            remedy="repair the shards, or raise the bound if that is expected",
            field="data.max_unusable_fraction",
        )


class Prepared:
    """Pictures resized and captions tokenised once, memory-mapped; for pools that fit on a local disk.

    The folder is bound to the shards' contents, the preprocessing and the tokenizer; another binding, another folder.

    Args:
        folder: as `prepare` writes it.
        pairs: N, pairs of the pool.
        size: height and width of its pictures.
        length: tokens of a text.

    Raises:
        DataError: if a file is missing, of other sizes or types, or not what was written; of pictures, in `fetch`.
    """

    def __init__(self, folder: Path, pairs: int, size: tuple[int, int], length: int) -> None:
        self.folder = folder
        self.seen, self.skipped = 0, Counter[str]()
        try:
            manifest = read_json(inside(folder, _MANIFEST), MIB)
            if manifest["pairs"] != pairs:
                raise ValueError(f"its manifest is that of {manifest['pairs']} pairs, not of {pairs}")
            digests = manifest.get("sha256")  # older folders have none, or none of the pictures' sums
            if digests is not None:
                names = [name for name in (_TOKENS, _USABLE, _SUMS) if name != _SUMS or name in digests]
                check_digests(folder, {name: digests[name] for name in names}, [_MANIFEST])
            self._images = _mapped(folder, _IMAGES, np.uint8, (pairs, 3, *size))
            self._tokens = _mapped(folder, _TOKENS, np.int32, (pairs, length))
            self._usable = np.array(_mapped(folder, _USABLE, np.bool_, (pairs,)))
            summed = digests is not None and _SUMS in digests
            self._sums = np.array(_mapped(folder, _SUMS, np.uint32, (pairs,))) if summed else None
            self._unread = np.ones(pairs, dtype=np.bool_)
        except Exception as error:  # broken arrays make numpy raise many kinds of errors
            raise DataError(
                f"the prepared pictures in {printable(folder)} cannot be used: {printable(error)}",
                remedy=_AGAIN,
                field="data.prepared",
            ) from error

    def usable(self, block: slice) -> NDArray[np.bool_]:
        return self._usable[block]

    def fetch(self, rows: Rows) -> SuperBatch:
        pictures = self._images[rows]
        self._check(rows, pictures)
        images = torch.from_numpy(pictures)
        tokens = torch.from_numpy(self._tokens[rows].astype(np.int64))
        return SuperBatch(images, tokens, torch.from_numpy(np.ascontiguousarray(rows)))

    def _check(self, rows: Rows, pictures: NDArray[np.uint8]) -> None:
        """Compare pictures that are read for the first time with their checksums."""
        if self._sums is None:
            return
        for place in np.flatnonzero(self._unread[rows]).tolist():
            if zlib.crc32(pictures[place].data) != self._sums[rows[place]]:
                raise DataError(
                    f"picture {rows[place]} in {printable(self.folder / _IMAGES)} is not what was written",
                    remedy=_AGAIN,
                    field="data.prepared",
                )
        self._unread[rows] = False


def _mapped(folder: Path, name: str, dtype: DTypeLike, shape: tuple[int, ...]) -> NDArray[Any]:
    """An array of the prepared folder, memory-mapped."""
    path = inside(folder, name)
    with open_regular(path) as stream:  # numpy would wait for a pipe
        read_array_header(stream)
    array: NDArray[Any] = np.lib.format.open_memmap(path, mode="r")
    if (array.dtype, array.shape) != (np.dtype(dtype), shape):
        raise ValueError(f"{name} holds {array.dtype} {list(array.shape)}, not {np.dtype(dtype)} {list(shape)}")
    if not array.flags.c_contiguous:
        raise ValueError(f"{name} is stored by columns")
    return array


def prepare(
    pool: Pool, processor: Processor, config: Data, root: Path, progress: Callable[[int, int], None] | None = None
) -> Prepared:
    """The prepared folder for this pool and processor under `root`, made if it is not there.

    Raises:
        DataError: if more pairs are unusable than the config allows, or the disk is full.
    """
    import hashlib

    probe = processor.tokenize(["A probe, of the tokenizer's ways: 0123 naïve"])
    preprocess = processor.preprocess_config
    binding = [pool.fingerprint, preprocess.model_dump_json(), str(probe.tolist()), str(config.max_pixels)]
    if config.max_caption_bytes != Data.model_fields["max_caption_bytes"].default:  # older folders know the default
        binding.append(str(config.max_caption_bytes))
    folder = root / hashlib.sha256("|".join(binding).encode()).hexdigest()[:16]
    count, length, (height, width) = len(pool), processor.context_length, preprocess.size
    if os.path.isfile(folder / _MANIFEST):
        return Prepared(folder, count, (height, width), length)
    decoder = Decoding(pool, processor, config)
    try:
        with whole_folder(folder) as temporary:
            images = np.lib.format.open_memmap(temporary / _IMAGES, "w+", np.uint8, (count, 3, height, width))
            with (temporary / _IMAGES).open("r+b") as stream:
                reserve(stream.fileno(), (temporary / _IMAGES).stat().st_size, mapped=True)
            tokens = np.zeros((count, length), dtype=np.int32)
            usable, sums = np.zeros(count, dtype=np.bool_), np.zeros(count, dtype=np.uint32)
            for start in range(0, count, 512):
                rows = np.arange(start, min(start + 512, count), dtype=np.int64)
                batch = decoder.fetch(rows)
                images[batch.rows.numpy()] = batch.images.numpy()
                sums[batch.rows.numpy()] = [zlib.crc32(picture.data) for picture in batch.images.numpy()]
                tokens[batch.rows.numpy()] = batch.tokens.numpy()
                usable[batch.rows.numpy()] = True
                if progress:
                    progress(int(rows[-1]) + 1, count)
            check_skipped(decoder.skipped, count, config.max_unusable_fraction)
            images.flush()
            np.save(temporary / _TOKENS, tokens)
            np.save(temporary / _USABLE, usable)
            np.save(temporary / _SUMS, sums)
            facts = {"pairs": count, "unusable": dict(decoder.skipped), "pool": pool.fingerprint}
            digests = {name: sha256(temporary / name) for name in (_TOKENS, _USABLE, _SUMS)}
            write_json(temporary / _MANIFEST, facts | {"sha256": digests})
    except OSError as error:
        raise DataError(
            f"cannot prepare the pool under {printable(root)}: {error.strerror or error}",
            remedy="free disk space, or set data.prepared to another disk or to null",
            field="data.prepared",
        ) from error
    return Prepared(folder, count, (height, width), length)
