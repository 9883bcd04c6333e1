# SPDX-License-Identifier: Apache-2.0
"""Where the files in a tar are: names, offsets and sizes from its headers, nothing unpacked.

Python's `tarfile` trusts the sizes in headers: some make it allocate them, some make it read the same header forever.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader

from aced_sdk.files.reading import MIB

BLOCK = 512
_MAX_EXTENSION = MIB  # of a pax header or a long name
_REGULAR = (b"0", b"\0", b"7")
_WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders, pipes


class TarError(Exception):
    """A file that is not an uncompressed tar, or not a whole one; its argument says why."""


@dataclass(frozen=True, slots=True)
class Member:
    """Where a file's bytes are inside a tar."""

    offset: int
    size: int


def entries(stream: BufferedReader, length: int) -> Iterator[tuple[str, Member]]:
    """Name and place of each regular file of a tar (ustar, GNU or pax), in order.

    Args:
        stream: the tar.
        length: its bytes.

    Raises:
        TarError: if a header is broken, the end is missing, or a file is sparse.
    """
    offset, name, size = 0, None, None  # name and size: as an extension header before a file gives them
    while True:
        stream.seek(offset)
        header = stream.read(BLOCK)
        if len(header) < BLOCK:
            raise TarError("the end mark is missing")
        if header == bytes(BLOCK):
            return
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
            elif kind in (b"x", b"X"):
                records = _pax(content)
                name, size = records.get("path", name), _pax_size(records, size)
            continue
        if kind == b"S":
            raise TarError("sparse files are not supported")
        if kind in _REGULAR:
            yield _name(header) if name is None else name, Member(data, held)
        name = size = None


def _check_sum(header: bytes) -> None:
    """Compare the header's sum of bytes; old writers took them as signed."""
    claimed, own = _number(header[148:156]), header[148:156]
    unsigned = sum(header) - sum(own) + 8 * 32
    if claimed != unsigned and claimed != unsigned - 256 * sum(byte > 127 for byte in header[:148] + header[156:]):
        raise TarError("not a tar header")


def _number(field: bytes) -> int:
    """An octal number, or a binary one after a byte of 128."""
    if field[0] == 0o200:
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip()
    if not re.fullmatch(rb"[0-7]*", digits):
        raise TarError("a header holds a broken number")
    return int(digits or b"0", 8)


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "backslashreplace")


def _name(header: bytes) -> str:
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{_text(header[:100])}" if prefix else _text(header[:100])


def _pax(content: bytes) -> dict[str, str]:
    """The records `LENGTH KEY=VALUE\\n` of a pax header."""
    records, start = {}, 0
    while start < len(content) and content[start]:
        found = re.compile(rb"([0-9]{1,7}) ").match(content, start)
        end = start + int(found[1]) if found else 0
        if not found or not found.end() < end <= len(content):
            raise TarError("a pax header is broken")
        key, _, value = content[found.end() : end - 1].partition(b"=")
        records[_text(key)] = _text(value)
        start = end
    return records


def _pax_size(records: dict[str, str], before: int | None) -> int | None:
    if any(key.startswith("GNU.sparse.") for key in records):
        raise TarError("sparse files are not supported")
    if "size" not in records:
        return before
    if not re.fullmatch(r"[0-9]{1,18}", records["size"]):
        raise TarError("a pax header is broken")
    return int(records["size"])
