# SPDX-License-Identifier: Apache-2.0
"""A check of a GGUF file's header: readers believe its counts and lengths, and loop or reserve memory by them."""

from __future__ import annotations

import os
import re
import struct
from io import BufferedReader
from math import prod
from pathlib import Path
from typing import Any

from aced_sdk.files import ReadError, open_regular, printable
from aced_sdk.towers.numbers import check_number, check_real

_STRING, _ARRAY = 8, 9
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_MAX_ENTRIES = 65_536  # of metadata, and tensors
_MAX_TENSORS, _OF_BLOCK = 8192, 64  # a reader takes a millisecond for each; of a block, and beside the blocks
_MAX_ITEMS = (
    2**21
)  # of all arrays; a reader takes some hundred bytes for each, and vocabularies have up to 2**18 tokens
_MAX_NAME, _MAX_TOKEN, _MAX_TEXT = 256, 1024, 2**20  # bytes
_BLOCK = re.compile(r"blk\.(\d{1,9})\.")  # in the name of a tensor
_MAX_DIMENSIONS = 4
_LEAST_BITS = 1  # of an element in any quantisation


def check_gguf(path: Path) -> None:
    """Walk through a file's header.

    Raises:
        ReadError: if it is not GGUF in version 2 or 3 and little-endian, is cut off, has a number out of its bounds, or
            tensors that the file has no room for.
    """
    with open_regular(path) as stream:
        try:
            _walk(_Header(stream))
        except (struct.error, KeyError, ValueError) as error:
            cause = error.cause if isinstance(error, ReadError) else f"its header is broken: {printable(error)}"
            raise ReadError(f"{printable(path.name)}: {cause}", remedy="fetch the file again") from None


class _Header:
    """Reads little-endian values, never beyond the end of the file."""

    def __init__(self, stream: BufferedReader) -> None:
        self.stream = stream
        self.size = os.fstat(stream.fileno()).st_size
        self.room = _MAX_ITEMS
        self.blocks: int | None = None

    def scalar(self, form: str) -> Any:
        return struct.unpack(form, self.stream.read(struct.calcsize(form)))[0]

    def count(self, most: int, what: str) -> int:
        found = int(self.scalar("<Q"))
        if found > most:
            raise ReadError(f"its header has {found} {what}, more than {most}", remedy="")
        return found

    def text(self, most: int) -> str:
        length = self.count(most, "bytes in a text")
        content = self.stream.read(length)
        if len(content) < length:
            raise ReadError("a text in its header is cut off", remedy="")
        return content.decode("utf-8", "replace")

    def value(self, kind: int, name: str) -> None:
        """Pass a value, and check numbers."""
        if kind == _STRING:
            self.text(_MAX_TEXT)
        elif kind == _ARRAY:
            item, length = int(self.scalar("<I")), self.count(self.room, "values in its arrays")
            self.room -= length
            if item == _STRING:
                for _ in range(length):
                    self.text(_MAX_TOKEN)
            else:
                form = _SCALARS[item]
                values = struct.iter_unpack(form, self.stream.read(length * struct.calcsize(form)))
                if sum(1 for _ in values) != length:
                    raise ReadError("an array in its header is cut off", remedy="")
        else:
            value = self.scalar(_SCALARS[kind])
            sizes = name.partition(".")[0] not in ("general", "quantize", "split", "tokenizer")
            if sizes and isinstance(value, int | float) and not isinstance(value, bool):
                key = name.rpartition(".")[2]
                check_real(key, value, name)
                if isinstance(value, int):
                    check_number(key, value, name)
                if key == "block_count":
                    self.blocks = int(value)


def _walk(header: _Header) -> None:
    if header.stream.read(4) != b"GGUF" or header.scalar("<I") not in (2, 3):
        raise ReadError("it is not GGUF in version 2 or 3", remedy="")
    tensors, entries = header.count(_MAX_ENTRIES, "tensors"), header.count(_MAX_ENTRIES, "entries")
    for _ in range(entries):
        name = header.text(_MAX_NAME)
        header.value(int(header.scalar("<I")), name)
    if tensors > (most := min(_MAX_TENSORS, _OF_BLOCK * (1 + (header.blocks or 0)))):
        raise ReadError(f"it has {tensors} tensors, more than {most} for {header.blocks or 0} blocks", remedy="")
    elements = 0
    for _ in range(tensors):
        block = _BLOCK.match(header.text(_MAX_NAME))
        if block and header.blocks is not None and int(block[1]) >= header.blocks:
            raise ReadError(f"it has tensors of block {block[1]}, and {header.blocks} blocks", remedy="")
        dimensions = int(header.scalar("<I"))
        if dimensions > _MAX_DIMENSIONS:
            raise ReadError(f"a tensor in its header has {dimensions} dimensions", remedy="")
        elements += prod(int(header.scalar("<Q")) for _ in range(dimensions))
        header.scalar("<I")
        if header.scalar("<Q") > header.size or elements * _LEAST_BITS > header.size * 8:
            raise ReadError("a tensor in its header lies beyond the file's end", remedy="")
