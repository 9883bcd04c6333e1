# SPDX-License-Identifier: Apache-2.0
"""A vision-language model's folder before transformers reads it: nothing outside of it, no numbers out of bounds."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aced_sdk.files import ReadError, check_links, inside, printable, read_json

_REMEDY = "correct the file, or do not use this folder"
_LARGEST = 2**24
_BOUNDS = (  # of the integers with such names
    (re.compile(r"layers?$|depths?$|heads$"), 1024),
    (re.compile(r"^(height|width|size|shortest_edge|longest_edge|image_size|patch_size|pad_size|crop_size)$"), 4096),
    (re.compile(r"(hidden|intermediate)_size$"), 2**20),
)
_FREE = re.compile(r"rope|theta|_ids?$|max_length|seed")  # no size follows from them


def check_vlm_folder(folder: Path) -> None:
    """Refuse a folder whose files lead outside, or describe a model of absurd size.

    Raises:
        ReadError: naming the file.
    """
    check_links(folder)
    for path in folder.glob("*.safetensors.index.json"):
        names = read_json(path).get("weight_map", {}).values()
        for name in set(map(str, names)):
            inside(folder, name)
    for name in ("config.json", "preprocessor_config.json", "processor_config.json"):
        path = folder / name
        if path.exists():
            for key, value in _numbers(read_json(path), ""):
                bound = next((most for pattern, most in _BOUNDS if pattern.search(key)), _LARGEST)
                if abs(value) > bound and not _FREE.search(key):
                    raise ReadError(f"{printable(key)} in {printable(path)} is more than {bound:,}", remedy=_REMEDY)


def _numbers(value: Any, key: str) -> Iterator[tuple[str, int]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _numbers(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(inner, key)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield key, value
