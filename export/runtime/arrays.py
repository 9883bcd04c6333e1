# SPDX-License-Identifier: Apache-2.0
"""Arrays of an npz file: plain numbers, not compressed, so that none takes more memory than its file."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from aced_sdk.files import ReadError, open_regular, printable

_MAX_ARRAYS = 16
_MAX_DIRECTORY = 2**16  # bytes of a zip's list of members, all of which zipfile makes objects of


def read_arrays(path: str | Path, limit: int) -> dict[str, NDArray[Any]]:
    """The arrays that `numpy.savez` wrote, by name; they cannot be written to.

    Args:
        path: the file.
        limit: bytes of the file.

    Raises:
        ReadError: if it is no such file, is larger, or holds something else than numbers.
    """
    with open_regular(path) as stream:
        try:
            size = os.fstat(stream.fileno()).st_size
            if size > limit:
                raise ValueError(f"more than {limit:,} bytes")
            end = zipfile._EndRecData(stream)  # type: ignore[attr-defined]
            if end and end[zipfile._ECD_SIZE] > _MAX_DIRECTORY:  # type: ignore[attr-defined]
                raise ValueError("too many members")
            with zipfile.ZipFile(stream) as archive:
                members = archive.infolist()
                if len(members) > _MAX_ARRAYS:
                    raise ValueError("too many members")
                if len({member.filename for member in members}) < len(members):
                    raise ValueError("two members have the same name")
                if sum(member.file_size for member in members) > size:
                    raise ValueError("its members are larger than the file")
                return {member.filename.removesuffix(".npy"): _array(archive, member) for member in members}
        except Exception as error:  # zipfile and numpy raise a dozen kinds for files that are broken
            raise ReadError(
                f"{printable(path)} holds no arrays: {printable(error)}", remedy="restore the file, or make it again"
            ) from error


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> NDArray[Any]:
    if member.compress_type != zipfile.ZIP_STORED:
        raise ValueError("it is compressed")
    with archive.open(member) as stream:
        version = npy.read_magic(stream)
        shape, fortran, dtype = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[version](stream)
        if dtype.kind not in "fiu":
            raise ValueError(f"it has values of type {dtype}")
        values = np.frombuffer(stream.read(), dtype)
    return values.reshape(shape, order="F" if fortran else "C")
