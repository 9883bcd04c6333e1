# SPDX-License-Identifier: Apache-2.0
"""Where the files in a tar are: names, offsets and sizes from its headers, nothing unpacked.

Python's `tarfile` trusts the sizes in headers: some make it allocate them, some make it read the same header forever.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader

from aced_sdk.files import printable
from aced_sdk.files.reading import MIB

BLOCK = 512
_MAX_EXTENSION = MIB  # of a pax header or a long name
_MAX_NAME = 4096  # bytes, as of a path in Linux
_MAX_LETTERS = 2**26  # of all names: a hundred times those of usual shards
_MAX_GAP = 64 * MIB  # of zeros between the tars in one file, together
_REGULAR = (b"0", b"\0", b"7")
_HARD_LINK, _SOFT_LINK = b"1", b"2"
_WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders, pipes
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\3\4": "zip"}


class TarError(Exception):
    """A file that is not an uncompressed tar, or not a whole one; its argument says why."""


class UnsupportedTar(TarError):
    """A file of a kind that is not read; its arguments are the end of a sentence about it, and a remedy."""


@dataclass(frozen=True, slots=True)
class Member:
    """Where a file's bytes are inside a tar."""

    offset: int
    size: int


def entries(stream: BufferedReader, length: int) -> Iterator[tuple[int, str, Member | None]]:
    """Number of its tar, name and place of each regular file (ustar, GNU or pax), in order.

    A link has the place of the file that it names, or None if no such file is before it in the same tar.
    Several tars in one file (`cat a.tar b.tar`) are read one after another, and numbered from 0.
    Bytes of a name that are not UTF-8 are lone surrogates (`surrogateescape`).

    Args:
        stream: the tar.
        length: its bytes.

    Raises:
        UnsupportedTar: if the file is compressed, or a file in it is sparse.
        TarError: if a header is broken, a name is too long, or the end is missing.
    """
    stream.seek(0)
    start = stream.read(8)
    for magic, kind_of_file in _COMPRESSED.items():
        if start.startswith(magic):
            raise UnsupportedTar(f"is compressed with {kind_of_file}", "decompress it: pairs are read at their offsets")
    places: dict[str, Member] = {}
    number = gaps = 0
    letters = 0
    offset, name, target, size = 0, None, None, None  # the last three: as extension headers before a file give them
    while True:
        stream.seek(offset)
        header = stream.read(BLOCK)
        if len(header) < BLOCK:
            raise TarError("the end mark is missing")
        if header == bytes(BLOCK):
            found = _next_tar(stream, offset, length)
            if found >= length:
                return
            gaps += found - offset
            if gaps > _MAX_GAP:
                raise TarError("more than 64 MiB of zeros are between its tars")
            offset, number = found, number + 1
            places.clear()
            name = target = size = None
            continue
        _check_sum(header)
        kind, claimed = header[156:157], _number(header[124:136])
        extends = kind in (b"L", b"K", b"x", b"X", b"g")
        held = claimed if size is None or extends else size
        if kind == b"\0" and header[:100].rstrip(b"\0").endswith(b"/"):
            kind = b"5"  # a folder, before 1988
        data, offset = offset + BLOCK, offset + BLOCK
        if kind not in _WITHOUT_DATA:
            offset += -(-held // BLOCK) * BLOCK
            if data + held > length:
                raise TarError("unexpected end of data")
        if extends:
            if held > _MAX_EXTENSION:
                raise TarError("an extension header is too large")
            content = stream.read(held)
            if kind == b"L":
                name = _text(content)
            elif kind == b"K":
                target = _text(content)
            elif kind in (b"x", b"X"):
                records = _pax(content)
                if any(key.startswith("GNU.sparse.") for key in records):
                    raise _sparse(records.get("GNU.sparse.name", records.get("path", "")))
                name, target = records.get("path", name), records.get("linkpath", target)
                size = _pax_size(records, size)
            continue
        name = _name(header) if name is None else name
        if kind == b"S":
            raise _sparse(name)
        if kind in _REGULAR:
            letters += len(name)
            if letters > _MAX_LETTERS:
                raise UnsupportedTar(f"has names of more than {_MAX_LETTERS:,} letters together", "split it")
            place = places[name] = Member(data, held)
            yield number, name, place
        elif kind in (_HARD_LINK, _SOFT_LINK):
            target = _text(header[157:257]) if target is None else target
            if kind == _SOFT_LINK:
                target = posixpath.normpath(posixpath.join(posixpath.dirname(name), target))
            linked = places.get(target)
            if linked is not None:
                places[name] = linked
            yield number, name, linked
        name = target = size = None


def _next_tar(stream: BufferedReader, offset: int, length: int) -> int:
    """The first block from `offset` on that is not all zeros; `length` if there is none.

    Raises:
        TarError: if there are more than 64 MiB of zeros.
    """
    stream.seek(offset)
    for start in range(offset, min(offset + _MAX_GAP, length), MIB):
        chunk = stream.read(MIB)
        zeros = len(chunk) - len(chunk.lstrip(b"\0"))
        if zeros < len(chunk):
            return start + zeros // BLOCK * BLOCK
    if offset + _MAX_GAP < length:
        raise TarError("more than 64 MiB of zeros follow an end mark")
    return length


def _sparse(name: str) -> UnsupportedTar:
    return UnsupportedTar(f"holds a sparse file, '{printable(name)}'", "write it again without tar's option --sparse")


def _check_sum(header: bytes) -> None:
    if not check_header(header):
        raise TarError("not a tar header")


def check_header(header: bytes, size: int | None = None) -> bool:
    """Whether 512 bytes are a header with a right checksum (old writers took bytes as signed), of a file of `size`.

    Raises:
        TarError: if a number in it is broken.
    """
    claimed, own = _number(header[148:156]), header[148:156]
    unsigned = sum(header) - sum(own) + 8 * 32
    if claimed != unsigned and claimed != unsigned - 256 * sum(byte > 127 for byte in header[:148] + header[156:]):
        return False
    return size is None or _number(header[124:136]) == size


def _number(field: bytes) -> int:
    """An octal number, or a binary one after a byte of 128."""
    if field[0] == 0o200:
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip()
    if not re.fullmatch(rb"[0-7]*", digits):
        raise TarError("a header holds a broken number")
    return int(digits or b"0", 8)


def _text(field: bytes) -> str:
    end = field.find(b"\0", 0, _MAX_NAME + 1)
    if end < 0 and len(field) > _MAX_NAME:
        raise TarError(f"a name has more than {_MAX_NAME:,} bytes")
    return field[: end if end >= 0 else None].decode("utf-8", "surrogateescape")


def _name(header: bytes) -> str:
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{_text(header[:100])}" if prefix else _text(header[:100])


def _pax(content: bytes) -> dict[str, str]:
    """The records `LENGTH KEY=VALUE\\n` of a pax header, those that are needed."""
    records, start = {}, 0
    while start < len(content) and content[start]:
        found = re.compile(rb"([0-9]{1,7}) ").match(content, start)
        end = start + int(found[1]) if found else 0
        if not found or not found.end() < end <= len(content):
            raise TarError("a pax header is broken")
        key, _, value = content[found.end() : end - 1].partition(b"=")
        if key in (b"path", b"linkpath", b"size") or key.startswith(b"GNU.sparse."):
            records[_text(key)] = _text(value)
        start = end
    return records


def _pax_size(records: dict[str, str], before: int | None) -> int | None:
    if "size" not in records:
        return before
    if not re.fullmatch(r"[0-9]{1,18}", records["size"]):
        raise TarError("a pax header is broken")
    return int(records["size"])
