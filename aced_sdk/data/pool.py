# SPDX-License-Identifier: Apache-2.0
"""Pairs in WebDataset tars, addressed by row: an index of offsets makes any order and an exact resume cheap."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from aced_sdk.config import CaptionLines
from aced_sdk.data.samples import IMAGES, Sample, group
from aced_sdk.data.tars import Member, TarError, UnsupportedTar, entries
from aced_sdk.errors import DataError
from aced_sdk.files import ReadError, expand, open_regular, parse_json, printable, sha256
from aced_sdk.files.reading import MIB
from aced_sdk.processing.plain import PictureError, open_picture, read_header
from aced_sdk.processing.plain.pictures import MAX_BYTES

MAX_SHARDS = 1_000_000
_MAX_PATTERN = 50_000  # letters
_MAX_LETTERS = 500_000_000  # of all names that a pattern gives
MAX_CAPTION = 64 * 1024  # bytes; `Data.max_caption_bytes` is lower
_MAX_METADATA = MIB
_MAX_NESTED_VALUES = 10_000  # lists and mappings in one KEY.json


class UnusablePair(Exception):
    """A pair that cannot be trained on; counted and skipped. Its argument is the reason in a few words."""


class Pool:
    """All samples of some shards in a fixed order; a row number always names the same sample.

    Args:
        shards: tar files, folders of tars, or patterns with braces such as `cc12m/{00000..00012}.tar`.
        patterns: False takes braces and `~` for letters of a name.
        caption_lines: as `Data.caption_lines`.

    Raises:
        DataError: if a shard is missing, is no tar, is cut off or is named twice, or if there is no sample at all.
    """

    def __init__(
        self, shards: Sequence[str | Path], *, patterns: bool = True, caption_lines: CaptionLines = "join"
    ) -> None:
        self.shards = shard_paths(shards, patterns=patterns)
        self.caption_lines = caption_lines
        self.samples: list[Sample] = []
        self._versions: list[tuple[int, ...]] = []
        files: dict[tuple[int, int], Path] = {}
        for number, path in enumerate(self.shards):
            facts = _facts(path)
            known = files.setdefault((facts.st_dev, facts.st_ino), path)
            if facts.st_ino and known is not path:  # some network file systems have no inodes
                cause = f"the shard {printable(path)} is named twice"
                raise _wrong(cause if known == path else f"{cause}, also as {printable(known)}", "name each shard once")
            # Tools that copy or unpack keep the time of change (mtime); ctime and inode still differ.
            self.samples += _index(path, number, facts.st_size, (*_version(facts), facts.st_ctime_ns))
            self._versions.append(_version(facts))
        if not self.samples:
            raise DataError(
                "the shards hold no samples", remedy="name tars with KEY.png|jpg|webp and KEY.txt", field="data.shards"
            )

    def __len__(self) -> int:
        return len(self.samples)

    @cached_property
    def digests(self) -> tuple[str, ...]:
        """Hex digest of each shard's bytes, in order; read once."""
        return tuple(sha256(shard) for shard in self.shards)

    @cached_property
    def bindings(self) -> tuple[str, ...]:
        """What decides the pairs of each shard: the digest of its bytes, and `caption_lines` where it is set."""
        return self.digests if self.caption_lines == "join" else tuple(f"{one}:first-line" for one in self.digests)

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of the `bindings` in order."""
        return hashlib.sha256("".join(self.bindings).encode()).hexdigest()

    def shard_rows(self) -> Iterator[tuple[Path, range]]:
        """Each shard with its rows."""
        start = 0
        for number, shard in enumerate(self.shards):
            end = start
            while end < len(self.samples) and self.samples[end].shard == number:
                end += 1
            yield shard, range(start, end)
            start = end

    def name(self, row: int) -> str:
        """A pair's key and shard, for messages."""
        sample = self.samples[row]
        return f"{printable(sample.key)} in {printable(self.shards[sample.shard])}"

    def read(self, row: int, extension: str, limit: int = MAX_BYTES) -> bytes | None:
        """The bytes of one member; None if the sample has none of that extension.

        Raises:
            UnusablePair: if it has more than `limit` bytes, or the sample has a `problem`.
            ReadError: if the shard cannot be read any more.
            DataError: if the shard was cut off, altered or replaced since it was opened.
        """
        sample = self.samples[row]
        if sample.problem:
            raise UnusablePair(sample.problem)
        member = sample.members.get(extension)
        if member is None:
            return None
        if member.size > limit:
            raise UnusablePair(f"KEY.{extension} has too many bytes")
        with open_regular(self.shards[sample.shard]) as stream:
            version = _version(os.fstat(stream.fileno()))
            stream.seek(member.offset)
            content = stream.read(member.size)
        if len(content) < member.size or version != self._versions[sample.shard]:
            what = "cut off" if len(content) < member.size else "altered or replaced"
            shard = printable(self.shards[sample.shard])
            raise _wrong(f"the shard {shard} was {what} while it was in use", "restore it, and start again")
        return content

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
        sample = self.samples[row]
        extension = next((e for e in sample.members if e in IMAGES), None)
        if extension is None:
            raise UnusablePair(sample.problem or "no picture")
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
            content = self.read(row, "json", _MAX_METADATA) or b"{}"
            if content.count(b"[") + content.count(b"{") > _MAX_NESTED_VALUES:
                return {}
            value = parse_json(content, "KEY.json")
        except (ReadError, UnusablePair):
            return {}
        return value if isinstance(value, dict) else {}

    def marks(self, name: str) -> list[bool | None]:
        """For each row whether `name` in its KEY.json is true; None where there is no such name."""
        known: dict[tuple[int, Member], bool | None] = {}
        values: list[bool | None] = []
        for row, sample in enumerate(self.samples):
            member = sample.members.get("json")
            if member is None or sample.problem:
                values.append(None)
                continue
            place = (sample.shard, member)
            if place not in known:  # links share one
                value = self.metadata(row).get(name)
                known[place] = None if value is None else value is True
            values.append(known[place])
        return values


def shard_paths(shards: Sequence[str | Path], *, patterns: bool = True) -> list[Path]:
    """Tar files behind names, folders and (with `patterns`) brace patterns, in order.

    Raises:
        DataError: if one does not exist, braces do not match, or there are more than `MAX_SHARDS`.
    """
    paths: list[Path] = []
    for shard in map(str, shards):
        for path in _names(shard, MAX_SHARDS - len(paths)) if patterns else [Path(shard)]:
            try:
                path = path.absolute()  # the working folder may change while the pool is read
            except OSError as error:
                raise _wrong(f"the working folder cannot be read: {error.strerror}", "change to another one") from None
            if os.path.isdir(path):
                found = sorted(path.glob("*.tar"))
                if not found:
                    raise _wrong(f"the folder {printable(path)} holds no tars", "name a folder of .tar shards")
                paths += found
            elif os.path.isfile(path):
                paths.append(path)
            else:
                raise _wrong(f"there is no shard {printable(path)}", "check the path or the brace pattern")
    return paths


def _names(shard: str, room: int) -> Iterator[Path]:
    """The names of a brace pattern, at most `room`."""
    from braceexpand import braceexpand

    try:
        if len(shard) > _MAX_PATTERN:
            raise _wrong(f"{printable(shard, 100)} has more than {_MAX_PATTERN:,} letters", "name a folder of shards")
        if _expansions(shard) > room or _expansions(shard) * len(shard) > _MAX_LETTERS:
            cause = f"{printable(shard)} names more than {MAX_SHARDS:,} shards"
            raise _wrong(cause, "correct the pattern, or join small shards")
        for name in braceexpand(shard):
            yield expand(name)
    except ReadError as error:
        raise _wrong(error.cause, error.remedy) from None
    except ValueError as error:
        cause = f"the braces of {printable(shard)} do not match: {printable(error)}"
        raise _wrong(cause, "write {00000..00012}") from None


_GROUP = re.compile(r"\{([^{}]*)\}")
# As braceexpand has them: `$` also matches before a line break at the end.
_NUMBERS = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?$")
_LETTERS = re.compile(r"[A-Za-z]\.\.[A-Za-z](?:\.\.-?\d+)?$")
_COUNTED = re.compile("\0(\\d+)\0")
_MAX_NESTED = 50


def _expansions(pattern: str) -> int:
    """How many names a brace pattern gives (of a range of letters: at most); nothing is expanded.

    The innermost braces are replaced by their count between NULs, until none is left.
    """

    def counted(text: str) -> int:
        product = 1
        for number in _COUNTED.findall(text):
            product = min(product * int(number), MAX_SHARDS + 1)  # a product of many has a million digits
        return product

    def group(found: re.Match[str]) -> str:
        if numbers := _NUMBERS.match(found[1]):
            first, last, step = (int(number or 1) for number in numbers.groups())
            count = abs(last - first) // max(step, 1) + 1
        else:
            count = 52 if _LETTERS.match(found[1]) else sum(counted(part) for part in found[1].split(","))
        return f"\0{min(count, MAX_SHARDS + 1)}\0"

    pattern = re.sub(r"\\.", "", str(expand(pattern)), flags=re.DOTALL)
    for _ in range(_MAX_NESTED):
        pattern, groups = _GROUP.subn(group, pattern)
        if not groups:
            return counted(pattern)
    raise ValueError(f"they are nested more than {_MAX_NESTED} deep")


def _wrong(cause: str, remedy: str) -> DataError:
    return DataError(cause, remedy=remedy, field="data.shards")


def _facts(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:  # a broken link
        raise _wrong(f"cannot read the shard {printable(path)}: {error.strerror}", "restore it") from None


def _version(facts: os.stat_result) -> tuple[int, ...]:
    """What differs once a shard is altered or replaced."""
    return (facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns)


@lru_cache(maxsize=4096)  # a run plans, caches and trains over the same shards, and a process may make many runs
def _index(path: Path, number: int, size: int, _version: tuple[int, ...]) -> tuple[Sample, ...]:
    """The samples of a tar; size and version are those of the file that was read."""
    files: list[tuple[int, str, Member | None]] = []
    try:
        with open_regular(path) as stream:
            files.extend(entries(stream, size))
    except UnsupportedTar as error:
        raise _wrong(f"the shard {printable(path)} {error.args[0]}", error.args[1]) from error
    except (TarError, ReadError, OSError) as error:
        cause = f"the shard {printable(path)} is broken or cut off after {len(files)} files: {error}"
        raise _wrong(cause, "fetch or write it again, or leave it out") from error
    tars = groupby(files, key=itemgetter(0))
    return tuple(sample for _, tar in tars for sample in group([(name, place) for _, name, place in tar], number))
