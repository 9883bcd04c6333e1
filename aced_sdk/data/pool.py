# SPDX-License-Identifier: Apache-2.0
"""Pairs in WebDataset tars, addressed by row: an index of offsets makes any order and an exact resume cheap."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from aced_sdk.errors import DataError
from aced_sdk.files import sha256

IMAGES = frozenset({"png", "jpg", "jpeg", "webp", "bmp"})


# What Pillow's decoders raise over damaged files.
_BROKEN = (OSError, EOFError, ValueError, IndexError, struct.error, SyntaxError, Image.DecompressionBombError)
_LONGEST = 200  # times the short side


class UnusablePair(Exception):
    """A pair that cannot be trained on; counted and skipped. Its argument is the reason in a few words."""


@dataclass(frozen=True, slots=True)
class Member:
    """Where a file's bytes lie inside a tar."""

    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One key of a shard with its members by extension."""

    key: str
    shard: int
    members: dict[str, Member]


class Pool:
    """All samples of some shards in a fixed order; a row number names a sample for good.

    Args:
        shards: tar files, folders of tars, or patterns with braces such as `cc12m/{00000..00012}.tar`.

    Raises:
        DataError: if a shard is missing, is no tar or is cut off, or if there is no sample at all.
    """

    def __init__(self, shards: Sequence[str | Path]) -> None:
        self.shards = expand(shards)
        self.samples: list[Sample] = [s for number, path in enumerate(self.shards) for s in _samples(path, number)]
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
    def fingerprint(self) -> str:
        """Hex digest of the shards' contents in order."""
        return hashlib.sha256("".join(self.digests).encode()).hexdigest()

    def shard_rows(self) -> Iterator[tuple[Path, range]]:
        """Each shard with its rows."""
        start = 0
        for number, shard in enumerate(self.shards):
            end = start
            while end < len(self.samples) and self.samples[end].shard == number:
                end += 1
            yield shard, range(start, end)
            start = end

    def read(self, row: int, extension: str) -> bytes | None:
        """The bytes of one member; None if the sample has none of that extension."""
        sample = self.samples[row]
        member = sample.members.get(extension)
        if member is None:
            return None
        with self.shards[sample.shard].open("rb") as stream:
            stream.seek(member.offset)
            return stream.read(member.size)

    def image(self, row: int, max_pixels: int) -> Image.Image:
        """The decoded picture.

        Raises:
            UnusablePair: if there is none, it is broken, or it has more than `max_pixels` pixels.
        """
        extension = next((e for e in self.samples[row].members if e in IMAGES), None)
        if extension is None:
            raise UnusablePair("no picture")
        try:
            image = Image.open(io.BytesIO(self.read(row, extension) or b""))
            if image.width * image.height > max_pixels:
                raise UnusablePair("too many pixels")
            if max(image.size) > _LONGEST * min(image.size):
                raise UnusablePair("too long and thin")  # resizing its short side would blow it up
            image.load()
        except _BROKEN as error:
            raise UnusablePair("unreadable picture") from error
        return image

    def text(self, row: int) -> str:
        """The caption.

        Raises:
            UnusablePair: if it is missing, empty or not UTF-8.
        """
        try:
            text = (self.read(row, "txt") or b"").decode().strip()
        except UnicodeDecodeError as error:
            raise UnusablePair("caption is not UTF-8") from error
        if not text:
            raise UnusablePair("empty caption")
        return text

    def metadata(self, row: int) -> dict[str, Any]:
        """KEY.json, or an empty mapping where there is none or it is broken: metadata never decides training."""
        try:
            value = json.loads(self.read(row, "json") or b"{}")
        except ValueError:
            return {}
        return value if isinstance(value, dict) else {}


def expand(shards: Sequence[str | Path]) -> list[Path]:
    """Tar files behind names, folders and brace patterns, in order.

    Raises:
        DataError: if one does not exist, or braces do not match.
    """
    from braceexpand import braceexpand

    paths: list[Path] = []
    for shard in shards:
        try:
            names = list(braceexpand(str(shard)))
        except ValueError as error:
            raise DataError(
                f"the braces of {shard} do not match: {error}", remedy="write {00000..00012}", field="data.shards"
            ) from None
        for name in names:
            path = Path(name).expanduser()
            if path.is_dir():
                inside = sorted(path.glob("*.tar"))
                if not inside:
                    raise DataError(
                        f"the folder {path} holds no tars", remedy="name a folder of .tar shards", field="data.shards"
                    )
                paths += inside
            elif path.is_file():
                paths.append(path)
            else:
                raise DataError(
                    f"there is no shard {path}", remedy="check the path or the brace pattern", field="data.shards"
                )
    return paths


def _samples(path: Path, number: int) -> tuple[Sample, ...]:
    facts = path.stat()
    return _index(path, number, facts.st_size, facts.st_mtime_ns)


@lru_cache(maxsize=4096)  # a run plans, caches and trains over the same shards, and a process may make many runs
def _index(path: Path, number: int, size: int, mtime_ns: int) -> tuple[Sample, ...]:
    """The samples of a tar; size and time of change are those of the file that was read."""
    samples: dict[str, Sample] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError("unexpected end of data")
                key, _, extension = member.name.rpartition("/")[2].partition(".")
                folder = member.name.rpartition("/")[0]
                name = f"{folder}/{key}" if folder else key
                sample = samples.setdefault(name, Sample(name, number, {}))
                sample.members[extension.lower()] = Member(member.offset_data, member.size)
            # A tar cut between two files, or with a header destroyed, ends like a whole one but for its zero block.
            with path.open("rb") as stream:
                stream.seek(tar.offset)
                if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError("the end mark is missing")
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(
            f"the shard {path} is broken or cut off after {len(samples)} samples: {error}",
            remedy="fetch or write it again, or leave it out",
            field="data.shards",
        ) from error
    return tuple(samples.values())
