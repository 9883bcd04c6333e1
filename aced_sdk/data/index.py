# SPDX-License-Identifier: Apache-2.0
"""The index of a shard: key, offsets and sizes of each pair. One binary file per shard, memory-mapped.

Layout, little-endian: a header of 256 bytes, then the arrays of `_ARRAYS`. A shard of 10,000 pairs has an
index of about 0.6 MB. The index is bound to the shard's size, times of change and inode; its header stores the digest
of the shard's bytes, so that they are hashed once.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aced_sdk.data.rowset import Rows
from aced_sdk.data.tars import Member
from aced_sdk.files import ReadError, home, open_regular, whole_file

MAX_KINDS = 2**16 - 1
"""Different file extensions that an index can hold."""

_MAGIC = b"acedidx2"
_HEADER = struct.Struct("<8s16sQqqQQQQQQQ32s")
_HEADER_BYTES = 256  # with the digest of what precedes it in the last 32
_DAMAGED = "is damaged: the checksum of a pair differs"
_FULL = 2**32 - 1  # size of a file of 4 GB or more
_NOISY, _CLEAN = 1, 2  # flags of a pair; none of them: unknown
_PROBLEMS = ("", "a name is twice in the shard", "a link to a file that is not in the shard")  # numbered in the flags
_PROBLEM = 4  # factor of the problem's number

# Name of each array: the field of the header that has its length, and its dtype.
_ARRAYS: dict[str, tuple[str, np.dtype[Any]]] = {
    "offsets": ("members", np.dtype("<u8")),
    "sizes": ("members", np.dtype("<u4")),
    "key_ends": ("rows", np.dtype("<u4")),
    "member_ends": ("rows", np.dtype("<u4")),
    "kinds": ("members", np.dtype("<u2")),
    "checks": ("rows", np.dtype("<u4")),
    "flags": ("rows", np.dtype("u1")),
    "keys": ("key_bytes", np.dtype("u1")),
    "extensions": ("kind_bytes", np.dtype("u1")),
}
_ITEM_BYTES = tuple((count, dtype.itemsize) for count, dtype in _ARRAYS.values())

_MEMBER = np.dtype([("offset", "<u8"), ("size", "<u4"), ("kind", "<u4")])  # as the checksum of a pair reads it
_PACKED = struct.Struct("<QII")


class IndexFileError(Exception):
    """An index file that is damaged or of another shard; its argument says which."""


@dataclass(frozen=True)
class Identity:
    """Size, times of change and inode of a file. At least one differs after the file is changed or replaced.

    Tools that copy or unpack keep the time of change (mtime); ctime and inode still differ.
    """

    size: int
    mtime: int
    ctime: int
    inode: int

    @classmethod
    def of(cls, facts: os.stat_result) -> Identity:
        """The identity of a file."""
        return cls(facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino)


@dataclass(frozen=True)
class IndexHeader:
    """The header of an index file.

    Attributes:
        identity: of the shard at the time it was indexed.
        rows: number of pairs.
        members: number of files.
        key_bytes: bytes of all keys.
        kind_bytes: bytes of the table of extensions.
        marked: pairs whose KEY.json has `noisy`.
        noisy: pairs for which it is true.
        digest: sha256 of the shard's bytes, as hex.
    """

    identity: Identity
    rows: int
    members: int
    key_bytes: int
    kind_bytes: int
    marked: int
    noisy: int
    digest: str

    def encode(self, name: str) -> bytes:
        """The header's bytes for the shard of that file name."""
        at = self.identity
        numbers = (at.size, at.mtime, at.ctime, at.inode, self.rows, self.members, self.key_bytes, self.kind_bytes)
        packed = _HEADER.pack(_MAGIC, _tag(name), *numbers, self.marked, self.noisy, bytes.fromhex(self.digest))
        body = packed.ljust(_HEADER_BYTES - 32, b"\0")
        return body + hashlib.sha256(body).digest()

    @classmethod
    def decode(cls, content: bytes, name: str) -> IndexHeader:
        """Read a header.

        Raises:
            IndexFileError: if it is damaged, or of a shard with another name.
        """
        body, digest = content[: _HEADER_BYTES - 32], content[_HEADER_BYTES - 32 : _HEADER_BYTES]
        if hashlib.sha256(body).digest() != digest or body[:8] != _MAGIC:
            raise IndexFileError("is damaged, or of another version")
        _, tag, *identity, rows, members, key_bytes, kind_bytes, marked, noisy, sha256 = _HEADER.unpack_from(body)
        if tag != _tag(name):
            raise IndexFileError("is of another shard")
        return cls(Identity(*identity), rows, members, key_bytes, kind_bytes, marked, noisy, sha256.hex())

    def layout(self) -> dict[str, tuple[int, int, np.dtype[Any]]]:
        """Offset, length and dtype of each array."""
        placed, offset = {}, _HEADER_BYTES
        for array, (count, dtype) in _ARRAYS.items():
            length: int = getattr(self, count)
            placed[array] = (offset, length, dtype)
            offset += length * dtype.itemsize
        return placed

    @property
    def file_bytes(self) -> int:
        """Length of the whole index file."""
        total: int = sum(getattr(self, count) * size for count, size in _ITEM_BYTES)
        return _HEADER_BYTES + total


def _tag(name: str) -> bytes:
    return hashlib.sha256(os.fsencode(name)).digest()[:16]


@dataclass(frozen=True)
class Entry:
    """A pair in an index.

    Attributes:
        key: folder and name without the extension.
        members: its files by extension, in the shard's order.
        problem: why its files cannot be read; empty if they can.
        marked: whether the caption is marked as wrong; None if KEY.json does not say.
    """

    key: str
    members: dict[str, Member]
    problem: str
    marked: bool | None


class ShardIndex:
    """The pairs of one shard.

    Args:
        header: its header.
        content: the index file's bytes, or a memory map of them.

    """

    def __init__(self, header: IndexHeader, content: bytes | mmap.mmap) -> None:
        self._header = header
        self._content = content
        self._layout = header.layout()
        self._flags = self._array("flags")

    def _array(self, name: str) -> NDArray[Any]:
        offset, length, dtype = self._layout[name]
        return np.frombuffer(self._content, dtype, length, offset)

    @cached_property
    def _arrays(self) -> tuple[NDArray[Any], ...]:
        names = ("key_ends", "keys", "member_ends", "offsets", "sizes", "kinds", "checks")
        return tuple(self._array(name) for name in names)

    @cached_property
    def _extensions(self) -> list[tuple[str, int]]:
        """Each extension with its checksum."""
        names = self._array("extensions").tobytes().split(b"\0") if self._header.members else []
        return [(name.decode("utf-8", "surrogateescape"), zlib.crc32(name)) for name in names]

    def entry(self, row: int) -> Entry:
        """Return the entry of a pair; `row` counts in this shard.

        Raises:
            IndexFileError: if its checksum differs.
        """
        key_ends, keys, member_ends, offsets, sizes, kinds, checks = self._arrays
        start, end = (int(member_ends[row - 1]) if row else 0), int(member_ends[row])
        first, last = (int(key_ends[row - 1]) if row else 0), int(key_ends[row])
        if start > end or end > len(offsets) or first > last or last > len(keys):
            raise IndexFileError(_DAMAGED)
        flag, key, extensions = int(self._flags[row]), keys[first:last].tobytes(), self._extensions
        members: dict[str, Member] = {}
        check = zlib.crc32(key, flag)
        of = slice(start, end)
        for offset, size, kind in zip(offsets[of].tolist(), sizes[of].tolist(), kinds[of].tolist(), strict=True):
            if kind >= len(extensions):
                raise IndexFileError(_DAMAGED)
            name, digest = extensions[kind]
            check = zlib.crc32(_PACKED.pack(offset, size, digest), check)
            members[name] = Member(offset, size)
        if check != int(checks[row]) or flag // _PROBLEM >= len(_PROBLEMS):
            raise IndexFileError(_DAMAGED)
        mark = True if flag & _NOISY else False if flag & _CLEAN else None
        return Entry(key.decode(errors="replace"), members, _PROBLEMS[flag // _PROBLEM], mark)

    def noisy(self, rows: Rows) -> NDArray[np.bool_]:
        """bool [K]: whether the caption is marked as wrong (`"noisy": true` in KEY.json)."""
        return (self._flags[rows] & _NOISY).astype(np.bool_)


@dataclass(frozen=True)
class Columns:
    """The content of an index of N pairs with M files, before it is written.

    Attributes:
        keys: [N].
        member_ends: integers [N], the end of each pair's files among the M files.
        offsets: integers [M], where the content of each file begins in the shard.
        sizes: integers [M], in bytes; 4 GB and more are stored as 2**32 - 1.
        kinds: integers [M], numbers of their extensions in `extensions`.
        extensions: in small letters.
        noisy: row to whether the caption is marked as wrong, where KEY.json says so.
        problems: row to the reason why the files of a pair cannot be read.
    """

    keys: list[bytes]
    member_ends: NDArray[Any]
    offsets: NDArray[Any]
    sizes: NDArray[Any]
    kinds: NDArray[Any]
    extensions: list[bytes]
    noisy: Mapping[int, bool]
    problems: Mapping[int, str]

    def encode(self, name: str, identity: Identity, digest: str) -> bytes:
        """The bytes of the index file of a shard."""
        keys, flags = self.keys, np.zeros(len(self.keys), dtype=np.uint8)
        for row, wrong in self.noisy.items():
            flags[row] = _NOISY if wrong else _CLEAN
        for row, problem in self.problems.items():
            flags[row] += _PROBLEM * _PROBLEMS.index(problem)
        member_ends = np.asarray(self.member_ends, dtype=np.int64)
        sizes = np.minimum(self.sizes, _FULL)
        packed = np.empty(len(sizes), dtype=_MEMBER)
        packed["offset"], packed["size"] = self.offsets, sizes
        packed["kind"] = np.array([zlib.crc32(name) for name in self.extensions], dtype=np.uint32)[self.kinds]
        raw, ends = packed.tobytes(), (_MEMBER.itemsize * member_ends).tolist()
        rows = zip(keys, flags.tolist(), [0, *ends], ends, strict=False)
        extensions = b"\0".join(self.extensions)
        joined = b"".join(keys)
        noisy = sum(self.noisy.values())
        counts = (len(keys), len(self.offsets), len(joined), len(extensions), len(self.noisy), noisy)
        header = IndexHeader(identity, *counts, digest)
        arrays: dict[str, Any] = {
            "offsets": self.offsets,
            "sizes": sizes,
            "key_ends": np.cumsum([len(key) for key in keys]),
            "member_ends": member_ends,
            "kinds": self.kinds,
            "checks": [zlib.crc32(raw[start:end], zlib.crc32(key, flag)) for key, flag, start, end in rows],
            "flags": flags,
            "keys": np.frombuffer(joined, np.uint8),
            "extensions": np.frombuffer(extensions, np.uint8),
        }
        parts = [np.asarray(arrays[array], dtype).tobytes() for array, (_, _, dtype) in header.layout().items()]
        return b"".join([header.encode(name), *parts])


def beside(shard: Path) -> Path:
    """Path of the index beside its shard, for `aced index --beside`."""
    return shard.with_name(f"{shard.name}.index")


def in_home(shard: Path) -> Path:
    """Default path of the index of a shard: in the cache home, named after the shard's path."""
    tag = hashlib.sha256(os.fsencode(shard)).hexdigest()
    return home() / "index" / tag[:2] / f"{tag[2:34]}.index"


def read_header(path: Path, name: str) -> IndexHeader | None:
    """The header of an index file; None if there is no file.

    Raises:
        IndexFileError: if the file is damaged, cut off, or of a shard with another name.
    """
    if not os.path.lexists(path):
        return None
    try:
        with open_regular(path) as stream:
            header = IndexHeader.decode(stream.read(_HEADER_BYTES), name)
            length = os.fstat(stream.fileno()).st_size
    except (OSError, ReadError) as error:
        raise IndexFileError(f"cannot be read: {error}") from error
    if length != header.file_bytes:
        raise IndexFileError(f"has {length:,} bytes, and its header describes {header.file_bytes:,}")
    return header


def map_index(path: Path, header: IndexHeader) -> ShardIndex:
    """Map an index file into memory.

    Raises:
        IndexFileError: if it is no longer the file of that header.
    """
    try:
        with open_regular(path) as stream:
            if os.fstat(stream.fileno()).st_size != header.file_bytes:
                raise IndexFileError("was cut off or replaced while it was in use")
            return ShardIndex(header, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError, ReadError) as error:  # ValueError: the file is empty
        raise IndexFileError(f"cannot be read: {error}") from error


def write_index(path: Path, content: bytes) -> None:
    """Write an index file, whole or not at all.

    Raises:
        OSError: if it cannot be written.
    """
    with whole_file(path) as temporary:
        temporary.write_bytes(content)
