# SPDX-License-Identifier: Apache-2.0
"""Pairs in WebDataset tars, addressed by row. Indexes of the shards give random access."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from aced_sdk.config import CaptionLines
from aced_sdk.data.index import Entry, Identity, IndexFileError, ShardIndex, map_index
from aced_sdk.data.indexing import MAX_METADATA, parse_metadata
from aced_sdk.data.opening import Opened, open_indexes
from aced_sdk.data.rowset import Rows
from aced_sdk.data.samples import IMAGES
from aced_sdk.data.shards import shard_paths, wrong
from aced_sdk.data.tars import BLOCK, Member, TarError, check_header
from aced_sdk.errors import DataError
from aced_sdk.files import open_regular, printable
from aced_sdk.processing.plain import PictureError, open_picture, read_header
from aced_sdk.processing.plain.pictures import MAX_BYTES

MAX_CAPTION = 64 * 1024  # bytes; `Data.max_caption_bytes` is lower
_MAPPED = 16_384  # indexes mapped at a time; Linux allows a process 65,530 maps


class UnusablePair(Exception):
    """A pair that cannot be trained on; counted and skipped. Its argument is the reason in a few words."""


class Pool:
    """All pairs of some shards in a fixed order; a row number always names the same pair.

    Shards without an index are indexed first (`open_indexes`). Opening a pool then takes time and memory for each
    shard, not for each pair.

    Args:
        shards: tar files, folders of tars, or patterns with braces such as `cc12m/{00000..00012}.tar`.
        patterns: False takes braces and `~` for letters of a name.
        caption_lines: as `Data.caption_lines`.
        progress: called with the number of shards indexed, and of those to index.

    Attributes:
        shards: the tar files, in order.
        sources: number of tar files behind each entry of `shards` as given.

    Raises:
        DataError: if a shard is missing, named twice, no tar or cut off, if an index beside a shard is damaged, or if
            there is no pair.
    """

    def __init__(
        self,
        shards: Sequence[str | Path],
        *,
        patterns: bool = True,
        caption_lines: CaptionLines = "join",
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        groups = shard_paths(shards, patterns=patterns)
        self.sources = [len(group) for group in groups]
        self.shards = [shard for group in groups for shard in group]
        self.caption_lines = caption_lines
        self._opened: list[Opened] = open_indexes(self.shards, progress)
        self._ends = np.cumsum([opened.header.rows for opened in self._opened], dtype=np.int64)
        self._starts = np.append(0, self._ends[:-1])
        self._index = lru_cache(_MAPPED)(self._map)
        if not len(self):
            raise DataError(
                "the shards hold no samples", remedy="name tars with KEY.png|jpg|webp and KEY.txt", field="data.shards"
            )

    def __len__(self) -> int:
        return int(self._ends[-1])

    @cached_property
    def digests(self) -> tuple[str, ...]:
        """Hex digest of each shard's bytes, in order, as their indexes store it."""
        return tuple(opened.header.digest for opened in self._opened)

    @cached_property
    def bindings(self) -> tuple[str, ...]:
        """What decides the pairs of each shard: the digest of its bytes, and `caption_lines` where it is set."""
        return self.digests if self.caption_lines == "join" else tuple(f"{one}:first-line" for one in self.digests)

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of the `bindings` in order."""
        return hashlib.sha256("".join(self.bindings).encode()).hexdigest()

    @property
    def unsaved(self) -> int:
        """Number of indexes that could not be written and are kept in memory."""
        return sum(opened.content is not None for opened in self._opened)

    @property
    def knows_noisy(self) -> bool:
        """Whether any KEY.json says if its caption is noisy."""
        return any(opened.header.marked for opened in self._opened)

    def shard_rows(self) -> Iterator[tuple[Path, range]]:
        """Each shard with its rows."""
        start = 0
        for shard, end in zip(self.shards, self._ends.tolist(), strict=True):
            yield shard, range(start, end)
            start = end

    @property
    def shard_ends(self) -> Rows:
        """int64 [shards]: the row after the last one of each shard."""
        return self._ends

    def locate(self, rows: Rows) -> tuple[Rows, Rows]:
        """The shard of each row and its number in that shard, int64 [K] each."""
        shards = np.searchsorted(self._ends, rows, side="right")
        return shards, rows - self._starts[shards]

    def noisy(self, rows: Rows) -> NDArray[np.bool_]:
        """bool [K]: whether the pair's caption is marked as wrong (`"noisy": true` in KEY.json)."""
        shards, local = self.locate(rows)
        order = shards.argsort(kind="stable")
        found = np.empty(len(rows), dtype=np.bool_)
        numbers, starts = np.unique(shards[order], return_index=True)
        for number, places in zip(numbers.tolist(), np.split(order, starts[1:]), strict=True):
            found[places] = self._index(number).noisy(local[places])
        return found

    def key(self, row: int) -> str:
        """The key of a pair: folder and name without the extension."""
        return self._entry(row)[0].key

    def members(self, row: int) -> dict[str, Member]:
        """The files of a pair by extension."""
        return self._entry(row)[0].members

    def name(self, row: int) -> str:
        """A pair's key and shard, for messages."""
        entry, shard = self._entry(row)
        return f"{printable(entry.key)} in {printable(self.shards[shard])}"

    def read(self, row: int, extension: str, limit: int = MAX_BYTES) -> bytes | None:
        """The bytes of one member; None if the pair has none of that extension.

        Raises:
            UnusablePair: if it has more than `limit` bytes, or it has a `problem`.
            ReadError: if the shard cannot be read any more.
            DataError: if the shard was cut off, altered or replaced since it was opened, or its index does not fit it.
        """
        entry, shard = self._entry(row)
        if entry.problem:
            raise UnusablePair(entry.problem)
        member = entry.members.get(extension)
        if member is None:
            return None
        if member.size > limit:
            raise UnusablePair(f"KEY.{extension} has too many bytes")
        with open_regular(self.shards[shard]) as stream:
            now = Identity.of(os.fstat(stream.fileno()))
            self._check(shard, now)
            start = member.offset - BLOCK
            stream.seek(start if 0 <= start <= now.size else now.size)
            content = stream.read(BLOCK + member.size)
        header, content = content[:BLOCK], content[BLOCK:]
        if len(content) < member.size or not _is_header(header, member.size):
            raise wrong(
                f"the index of the shard {printable(self.shards[shard])} does not fit its bytes",
                f"delete {printable(self._opened[shard].path)}; it is built again",
            )
        return content

    def _check(self, shard: int, now: Identity) -> None:
        then = self._opened[shard].header.identity
        if (now.size, now.mtime, now.inode) != (then.size, then.mtime, then.inode):
            what = "cut off" if now.size < then.size else "altered or replaced"
            path = printable(self.shards[shard])
            raise wrong(f"the shard {path} was {what} while it was in use", "restore it, and start again")

    def _entry(self, row: int) -> tuple[Entry, int]:
        """The index entry of a row, and the number of its shard."""
        shard = int(np.searchsorted(self._ends, row, side="right"))
        try:
            return self._index(shard).entry(row - int(self._starts[shard])), shard
        except IndexFileError as error:
            raise self._damaged(shard, error) from None

    def _map(self, shard: int) -> ShardIndex:
        opened = self._opened[shard]
        if opened.content is not None:
            return ShardIndex(opened.header, opened.content)
        try:
            return map_index(opened.path, opened.header)
        except IndexFileError as error:
            raise self._damaged(shard, error) from None

    def _damaged(self, shard: int, error: IndexFileError) -> DataError:
        return wrong(f"the index {printable(self._opened[shard].path)} {error}", "delete it; it is built again")

    def image(self, row: int, max_pixels: int) -> Image.Image:
        """The decoded picture.

        Raises:
            UnusablePair: if there is none, it is broken, or it has more than `max_pixels` pixels.
        """
        try:
            return open_picture(self.header(row, max_pixels), max_pixels=max_pixels)
        except PictureError as error:
            raise UnusablePair(error.reason) from error

    def header(self, row: int, max_pixels: int) -> Image.Image:
        """As `image`, and the pixels are not decoded yet."""
        try:
            return read_header(self.encoded(row), max_pixels=max_pixels)
        except PictureError as error:
            raise UnusablePair(error.reason) from error

    def encoded(self, row: int) -> bytes:
        """The picture's file.

        Raises:
            UnusablePair: if there is none, or it has too many bytes.
        """
        entry, _ = self._entry(row)
        extension = next((e for e in entry.members if e in IMAGES), None)
        if extension is None:
            raise UnusablePair(entry.problem or "no picture")
        return self.read(row, extension) or b""

    def text(self, row: int, max_bytes: int = MAX_CAPTION) -> str:
        """The caption: KEY.txt, or `caption` of KEY.json if there is no KEY.txt.

        Raises:
            UnusablePair: if it is missing, empty, not UTF-8, or has more than `max_bytes` bytes.
        """
        raw = self.read(row, "txt", max_bytes)
        try:
            text = self._json_caption(row, max_bytes) if raw is None else raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UnusablePair("caption is not UTF-8") from error
        lines = text.strip().splitlines() if self.caption_lines == "first" else [text]
        if not lines or not lines[0].strip():
            raise UnusablePair("empty caption")
        return lines[0].strip()

    def _json_caption(self, row: int, max_bytes: int) -> str:
        caption = self.metadata(row).get("caption")
        if not isinstance(caption, str):
            raise UnusablePair("no caption")
        if len(caption.encode(errors="surrogatepass")) > max_bytes:
            raise UnusablePair("the caption in KEY.json has too many bytes")
        if not caption.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in caption):
            raise UnusablePair("caption is not UTF-8")
        return caption

    def many_lines(self, rows: int = 256) -> tuple[int, int]:
        """How many captions have several lines, and how many were read: at most `rows`, spread over the pool."""
        several = read = 0
        for row in np.linspace(0, len(self) - 1, min(rows, len(self))).astype(int):
            try:
                raw = self.read(int(row), "txt", MAX_CAPTION) or b""
            except UnusablePair:
                continue
            read += 1
            several += sum(bool(line.strip()) for line in raw.splitlines()) > 1
        return several, read

    def metadata(self, row: int) -> dict[str, Any]:
        """KEY.json, or an empty mapping where there is none or it is broken: metadata never decides training."""
        try:
            return parse_metadata(self.read(row, "json", MAX_METADATA) or b"{}")
        except UnusablePair:
            return {}


def _is_header(header: bytes, size: int) -> bool:
    try:
        return check_header(header, size)
    except TarError:
        return False
