# SPDX-License-Identifier: Apache-2.0
"""Arrays of numpy's file format from somebody else: nothing is reserved or unpacked before its size is known."""

from __future__ import annotations

import struct
import tokenize
import zipfile
import zlib
from threading import Lock
from typing import IO, Any

import numpy as np

# What numpy raises over damaged arrays and archives, and over pickles, which are never read.
BROKEN_ARRAY = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    OverflowError,
    SyntaxError,
    MemoryError,
    RuntimeError,
    struct.error,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)

# numpy parses an array's header as a Python literal, and CPython 3.11 counts the depth of all threads' parsing in one
# place: two at a time may end in a SystemError. Reading the bytes stays in threads.
_PARSING = Lock()


def read_array_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether it is in Fortran's order, and type; the array's bytes follow in the stream.

    Raises:
        ValueError, or another of `BROKEN_ARRAY`: if it is no header of format 1.0 (later ones have up to 4 GB), or a
            dimension is negative.
    """
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError("not an array of numpy's format 1.0")
    with _PARSING:
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    if any(size < 0 for size in shape):  # which numpy lets pass
        raise ValueError("a dimension is negative")
    return shape, fortran, dtype
