# SPDX-License-Identifier: Apache-2.0
"""Build the index of a shard: one pass over its bytes, which hashes them and walks the tar's headers.

Usual tars (regular files with plain names, each key's files together) take the fast walk, which checks and parses
headers with numpy. Everything else (links, long names, joined tars, repeated or dotted names) is read again by
`aced_sdk.data.tars.entries` and grouped by `aced_sdk.data.samples.group`, which define the result.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass, field
from io import BufferedReader
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aced_sdk.data.index import MAX_KINDS, Columns, Identity
from aced_sdk.data.rowset import Rows
from aced_sdk.data.samples import Sample, group
from aced_sdk.data.tars import BLOCK, Member, TarError, UnsupportedTar, check_header, entries
from aced_sdk.files import ReadError, open_regular, parse_json
from aced_sdk.files.reading import MIB

MAX_METADATA = MIB
_MAX_NESTED_VALUES = 10_000  # lists and mappings in one KEY.json
_MAX_LISTS = 100  # in a KEY.json that is searched and not parsed
_CHUNK = 2 * MIB
_NAMES = re.compile(rb"path=|size=|GNU\.")  # records of a pax header that change a name, a link or a size
_NOISY = re.compile(rb'"noisy"\s*:\s*(true|false|null)\s*[,}]')
_EIGHTS = 8 ** np.arange(5, -1, -1)
_KEY = b'"noisy"'
_FILE, _PAX = ord("0"), ord("x")
_JSON = int.from_bytes(b"json", "little")


def build_index(path: Path) -> bytes:
    """The index file of a shard.

    Raises:
        TarError: if it is not a whole, uncompressed tar.
        ReadError: if it is no regular file, or cannot be read any more.
        OSError: if it cannot be read.
    """
    with open_regular(path) as stream:
        identity = Identity.of(os.fstat(stream.fileno()))
        digest = hashlib.sha256()
        columns = _fast(stream, digest)
        if columns is None:
            stream.seek(0)
            columns = _exact(stream, identity.size)
            stream.seek(0)
            digest = hashlib.file_digest(stream, "sha256")
        if Identity.of(os.fstat(stream.fileno())) != identity:
            raise ReadError(f"{path.name} was changed while it was read", remedy="index it when it is complete")
    return columns.encode(path.name, identity, digest.hexdigest())


def parse_metadata(content: bytes) -> dict[str, Any]:
    """KEY.json as a mapping; empty if it is broken, nested without measure, or no mapping."""
    if content.count(b"[") + content.count(b"{") > _MAX_NESTED_VALUES:
        return {}
    try:
        value = parse_json(content, "KEY.json")
    except ReadError:
        return {}
    return value if isinstance(value, dict) else {}


def _mark(content: bytes) -> bool | None:
    """Whether KEY.json marks the caption as wrong; None if it does not say."""
    if _KEY not in content:
        return None
    flat = content.count(b"{") == 1 and content.count(b"[") < _MAX_LISTS and content.count(_KEY) == 1
    if flat and (found := _NOISY.search(content)):
        return None if found[1] == b"null" else found[1] == b"true"  # a flat object; parsing takes ten times as long
    value = parse_metadata(content).get("noisy")
    return None if value is None else value is True


def _exact(stream: BufferedReader, size: int) -> Columns:
    """Read any tar."""
    files: list[tuple[int, str, Member | None]] = []
    try:
        files.extend(entries(stream, size))
    except UnsupportedTar:
        raise
    except TarError as error:
        raise TarError(f"is broken or cut off after {len(files)} files: {error}") from error
    tars = groupby(files, key=itemgetter(0))
    samples = [sample for _, tar in tars for sample in group([(name, place) for _, name, place in tar], 0)]
    codes: dict[str, int] = {}
    members = [(codes.setdefault(name, len(codes)), place) for s in samples for name, place in s.members.items()]
    if len(codes) > MAX_KINDS:
        raise UnsupportedTar(f"has more than {MAX_KINDS:,} different file extensions", "pack the pairs again")
    known: dict[Member, bool | None] = {}
    noisy: dict[int, bool] = {}
    for row, sample in enumerate(samples):
        if (mark := _mark_of(sample, stream, known)) is not None:
            noisy[row] = mark
    return Columns(
        keys=[sample.key.encode(errors="surrogateescape") for sample in samples],
        member_ends=np.cumsum([len(sample.members) for sample in samples]),
        offsets=np.array([place.offset for _, place in members], dtype=np.uint64),
        sizes=np.array([place.size for _, place in members], dtype=np.uint64),
        kinds=np.array([code for code, _ in members], dtype=np.uint16),
        extensions=[name.encode(errors="surrogateescape") for name in codes],
        noisy=noisy,
        problems={row: sample.problem for row, sample in enumerate(samples) if sample.problem},
    )


def _mark_of(sample: Sample, stream: BufferedReader, known: dict[Member, bool | None]) -> bool | None:
    """The mark of a sample; links to one file read it once."""
    member = sample.members.get("json")
    if member is None or sample.problem or member.size > MAX_METADATA:
        return None
    if member not in known:
        stream.seek(member.offset)
        known[member] = _mark(stream.read(member.size))
    return known[member]


@dataclass
class _Files:
    """The files of a tar so far."""

    keys: list[bytes] = field(default_factory=list)
    firsts: list[int] = field(default_factory=list)  # of each key
    offsets: list[Rows] = field(default_factory=list)
    sizes: list[Rows] = field(default_factory=list)
    kinds: list[Rows] = field(default_factory=list)
    codes: dict[int, int] = field(default_factory=dict)  # of extensions, as `_names` gives them
    noisy: dict[int, bool] = field(default_factory=dict)
    last: bytes = b""
    count: int = 0

    def columns(self) -> Columns | None:
        """The index; None if names repeat."""
        empty = np.zeros(0, dtype=np.int64)
        count, kinds = self.count, np.concatenate([empty, *self.kinds])
        member_ends = np.append(self.firsts[1:], count).astype(np.int64) if self.keys else np.zeros(0, np.int64)
        rows = np.repeat(np.arange(len(self.keys)), np.diff(member_ends, prepend=0))
        named = np.sort(rows * (MAX_KINDS + 1) + kinds)
        if len(set(self.keys)) < len(self.keys) or (named[1:] == named[:-1]).any():
            return None
        return Columns(
            keys=self.keys,
            member_ends=member_ends,
            offsets=np.concatenate([empty, *self.offsets]),
            sizes=np.concatenate([empty, *self.sizes]),
            kinds=kinds,
            extensions=[value.to_bytes(8, "little").rstrip(b"\0") for value in self.codes],
            noisy=self.noisy,
            problems={},
        )


def _fast(stream: BufferedReader, digest: Any) -> Columns | None:
    """Read a usual tar and add its bytes to `digest`; None if anything in it is unusual."""
    files, buffer, base, offset = _Files(), b"", 0, 0
    while True:
        chunk = stream.read(_CHUNK)
        digest.update(chunk)
        buffer += chunk
        heads, at, ended = _headers(buffer, offset - base, last=not chunk)
        if heads is None or not _add(files, buffer, base, np.array(heads, dtype=np.int64)):
            return None
        if ended:
            return files.columns() if _only_zeros(buffer[at:], stream, digest) else None
        if not chunk:
            return None  # the end mark is missing
        offset = base + at
        kept = min(at, len(buffer))
        buffer, base = buffer[kept:], base + kept


def _headers(buffer: bytes, at: int, last: bool) -> tuple[list[int] | None, int, bool]:
    """Find the headers in a buffer.

    Args:
        buffer: part of a tar that starts at a block.
        at: place of the first header; it may be beyond the end of the buffer.
        last: no more bytes follow.

    Returns:
        Places of the headers (None: something is unusual), where the walk ended, and whether that is an end mark.
    """
    heads: list[int] = []
    end = len(buffer)
    while at + BLOCK <= end:
        kind = buffer[at + 156]
        try:
            size = int(buffer[at + 124 : at + 135], 8)
        except ValueError:
            unusual = any(buffer[at : at + BLOCK])
            return None if unusual else heads, at, True
        after = at + BLOCK + size
        if size < 0 or (last and after > end):
            return None, at, False
        if kind == _FILE:
            if after > end and size <= MAX_METADATA:
                break  # small files are read whole
        elif kind == _PAX:
            if after > end and size <= MAX_METADATA:
                break
            if size > MAX_METADATA or _NAMES.search(buffer, at + BLOCK, after):
                return None, at, False
        else:
            return None, at, False
        heads.append(at)
        at += BLOCK + (size + BLOCK - 1 & -BLOCK)
    return heads, at, False


def _add(files: _Files, buffer: bytes, base: int, heads: NDArray[np.int64]) -> bool:
    """Add the files of some headers; False if anything is unusual."""
    if not len(heads):
        return True
    blocks = np.frombuffer(buffer, np.uint8, len(buffer) // BLOCK * BLOCK).reshape(-1, BLOCK)[heads // BLOCK]
    if not _checked(blocks):
        return False
    regular = blocks[:, 156] == _FILE
    blocks, heads = blocks[regular], heads[regular]
    if not len(heads):
        return True
    parsed = _names(blocks)
    if parsed is None:
        return False
    keys, extensions = parsed
    sizes = _octal(blocks[:, 124:135])
    kinds = np.full(len(heads), -1, dtype=np.int64)
    for value, code in files.codes.items():
        kinds[extensions == value] = code
    for value in np.unique(extensions[kinds < 0]).tolist():
        kinds[extensions == value] = files.codes[value] = len(files.codes)
    if len(files.codes) > MAX_KINDS:
        return False
    starts = np.flatnonzero(np.append(keys[:1] != files.last, keys[1:] != keys[:-1]))
    rows = len(files.keys) - 1 + np.cumsum(np.bincount(starts, minlength=len(keys)))
    files.firsts += (starts + files.count).tolist()
    files.keys += keys[starts].tolist()
    files.last = keys[-1]
    files.kinds.append(kinds)
    files.offsets.append(heads + (base + BLOCK))
    files.sizes.append(sizes)
    files.count += len(heads)
    _find_marks(files, buffer, rows, heads + BLOCK, np.where(kinds == files.codes.get(_JSON, -1), sizes, -1))
    return True


def _find_marks(files: _Files, buffer: bytes, rows: Rows, starts: Rows, sizes: Rows) -> None:
    """Store which pairs are marked as noisy. A KEY.json starts at `starts` and has `sizes` bytes; -1: another file."""
    places = np.flatnonzero((sizes >= 0) & (sizes <= MAX_METADATA))
    ends = (starts + sizes)[places].tolist()
    for row, start, end in zip(rows[places].tolist(), starts[places].tolist(), ends, strict=True):
        if buffer.find(_KEY, start, end) >= 0 and (mark := _mark(buffer[start:end])) is not None:
            files.noisy[row] = mark


def _checked(blocks: NDArray[np.uint8]) -> bool:
    """Whether headers (uint8 [K, 512]) have right checksums and sizes in plain octal digits."""
    digits = blocks[:, 124:135]
    if ((digits < 48) | (digits > 55)).any() or ((blocks[:, 135] != 0) & (blocks[:, 135] != 32)).any():
        return False
    own = blocks[:, 148:156]
    total = blocks.sum(axis=1, dtype=np.int64) - own.sum(axis=1, dtype=np.int64) + 8 * 32
    claimed = (own[:, :6].astype(np.int64) - 48) @ _EIGHTS
    usual = ((own[:, :6] >= 48) & (own[:, :6] <= 55)).all(axis=1) & (own[:, 6] == 0) & (claimed == total)
    return all(check_header(block.tobytes()) for block in blocks[~usual])


def _octal(digits: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Numbers of digits, uint8 [K, 11]."""
    value: NDArray[np.int64] = (digits.astype(np.int64) - 48) @ (8 ** np.arange(10, -1, -1))
    return value


def _names(blocks: NDArray[np.uint8]) -> tuple[NDArray[np.bytes_], NDArray[np.uint64]] | None:
    """Keys and extensions of headers.

    Args:
        blocks: uint8 [K, 512].

    Returns:
        Keys (bytes [K]), and extensions of up to 8 letters (each as a uint64 of its bytes). None if a name is not a
        key, a dot and such an extension in small letters, or has a prefix.
    """
    names, columns = blocks[:, :100], np.arange(100)
    dots = names == ord(".")
    dot = dots.argmax(axis=1)[:, None]
    ends = (names != 0).sum(axis=1)
    tails = np.zeros((len(names), 8), dtype=np.uint8)
    inside = dot + 1 + np.arange(8)
    found = np.take_along_axis(names, np.minimum(inside, 99), axis=1)
    np.copyto(tails, found, where=inside < 100)
    before = np.take_along_axis(names, np.maximum(dot - 1, 0), axis=1)
    if (
        (dots.sum(axis=1) != 1).any()
        or (dot == 0).any()
        or (before == ord("/")).any()
        or (ends - dot[:, 0] - 1 > 8).any()
        or (names[:, 1:].astype(np.bool_) > names[:, :-1].astype(np.bool_)).any()  # a NUL inside
        or ((tails == ord("/")) | ((tails >= ord("A")) & (tails <= ord("Z")))).any()
        or (names[:, 0] == ord("/")).any()
        or blocks[:, 345].any()
    ):
        return None
    keys = np.where(columns < dot, names, 0).view("S100").ravel()
    return keys, tails.view("<u8").ravel()


def _only_zeros(rest: bytes, stream: BufferedReader, digest: Any) -> bool:
    """Whether the rest of the file is zeros. Its bytes are added to `digest`."""
    while not rest.strip(b"\0"):
        rest = stream.read(_CHUNK)
        if not rest:
            return True
        digest.update(rest)
    return False
