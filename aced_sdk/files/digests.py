# SPDX-License-Identifier: Apache-2.0
"""Digests of a saved folder's files. They detect damage and mix-ups. They are no signature: anyone with write access to
the folder can also change its digests."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from aced_sdk.files.reading import ReadError, inside, printable
from aced_sdk.files.writing import sha256

# What a loader of open_clip, transformers, peft or tokenizers may take up from a folder.
_DECIDING = frozenset(
    {".json", ".safetensors", ".txt", ".model", ".jinja", ".bin", ".pt", ".pth", ".py", ".yaml", ".onnx", ".gguf"}
)


def file_digests(folder: Path, leave_out: Iterable[str] = ()) -> dict[str, str]:
    """sha256 of every file below `folder` that can decide a result, by its relative name with `/`.

    Args:
        folder: the folder.
        leave_out: relative names, such as the manifest that will hold the digests.
    """
    left_out = set(leave_out)
    return {name: sha256(folder / name) for name in _deciding(folder) if name not in left_out}


def check_digests(folder: Path, expected: Mapping[str, str], leave_out: Iterable[str] = ()) -> None:
    """Compare a folder's files with the digests that were taken when it was saved.

    Raises:
        ReadError: naming the first file that is missing, altered, or added since and of a kind that loaders read.
    """
    remedy = "restore the folder, or save it again"
    for name, digest in expected.items():
        if sha256(inside(folder, name)) != digest:
            raise ReadError(f"{printable(folder / name)} is not the file that was saved", remedy=remedy)
    added = set(_deciding(folder)) - expected.keys() - set(leave_out)
    if added:
        raise ReadError(f"{printable(folder / min(added))} was added after the folder was saved", remedy=remedy)


def _deciding(folder: Path) -> list[str]:
    names = []
    for directory, _, files in os.walk(folder):
        names += [Path(directory, name).relative_to(folder) for name in files]
    return sorted(name.as_posix() for name in names if name.suffix.lower() in _DECIDING)
