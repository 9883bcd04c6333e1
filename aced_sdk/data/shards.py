# SPDX-License-Identifier: Apache-2.0
"""The tar files behind the names, folders and brace patterns of a config."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from aced_sdk.errors import DataError
from aced_sdk.files import ReadError, expand, printable

MAX_SHARDS = 1_000_000
_MAX_PATTERN = 50_000  # letters
_MAX_LETTERS = 500_000_000  # of all names that a pattern gives


def shard_paths(shards: Sequence[str | Path], *, patterns: bool = True) -> list[list[Path]]:
    """Tar files behind each of some names, folders and (with `patterns`) brace patterns, in order.

    Raises:
        DataError: if one does not exist, braces do not match, or there are more than `MAX_SHARDS`.
    """
    groups: list[list[Path]] = []
    for shard in map(str, shards):
        groups.append(paths := [])
        for path in _names(shard, MAX_SHARDS - sum(map(len, groups))) if patterns else [Path(shard)]:
            try:
                path = path.absolute()  # the working folder may change while the pool is read
            except OSError as error:
                raise wrong(f"the working folder cannot be read: {error.strerror}", "change to another one") from None
            if os.path.isdir(path):
                found = sorted(path.glob("*.tar"))
                if not found:
                    raise wrong(f"the folder {printable(path)} holds no tars", "name a folder of .tar shards")
                paths += found
            elif os.path.isfile(path):
                paths.append(path)
            else:
                raise wrong(f"there is no shard {printable(path)}", "check the path or the brace pattern")
    return groups


def _names(shard: str, room: int) -> Iterator[Path]:
    """The names of a brace pattern, at most `room`."""
    from braceexpand import braceexpand

    try:
        if len(shard) > _MAX_PATTERN:
            raise wrong(f"{printable(shard, 100)} has more than {_MAX_PATTERN:,} letters", "name a folder of shards")
        if _expansions(shard) > room or _expansions(shard) * len(shard) > _MAX_LETTERS:
            cause = f"{printable(shard)} names more than {MAX_SHARDS:,} shards"
            raise wrong(cause, "correct the pattern, or join small shards")
        for name in braceexpand(shard):
            yield expand(name)
    except ReadError as error:
        raise wrong(error.cause, error.remedy) from None
    except ValueError as error:
        cause = f"the braces of {printable(shard)} do not match: {printable(error)}"
        raise wrong(cause, "write {00000..00012}") from None


_GROUP = re.compile(r"\{([^{}]*)\}")
# As braceexpand has them: `$` also matches before a line break at the end.
_NUMBERS = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?$")
_LETTERS = re.compile(r"[A-Za-z]\.\.[A-Za-z](?:\.\.-?\d+)?$")
_COUNTED = re.compile("\0(\\d+)\0")
_MAX_NESTED = 50


def _expansions(pattern: str) -> int:
    """How many names a brace pattern gives (of a range of letters: at most); nothing is expanded.

    The innermost braces are replaced by their count between NULs, until none is left.
    """

    def counted(text: str) -> int:
        product = 1
        for number in _COUNTED.findall(text):
            product = min(product * int(number), MAX_SHARDS + 1)  # a product of many has a million digits
        return product

    def group(found: re.Match[str]) -> str:
        if numbers := _NUMBERS.match(found[1]):
            first, last, step = (int(number or 1) for number in numbers.groups())
            count = abs(last - first) // max(step, 1) + 1
        else:
            count = 52 if _LETTERS.match(found[1]) else sum(counted(part) for part in found[1].split(","))
        return f"\0{min(count, MAX_SHARDS + 1)}\0"

    pattern = re.sub(r"\\.", "", str(expand(pattern)), flags=re.DOTALL)
    for _ in range(_MAX_NESTED):
        pattern, groups = _GROUP.subn(group, pattern)
        if not groups:
            return counted(pattern)
    raise ValueError(f"they are nested more than {_MAX_NESTED} deep")


def wrong(cause: str, remedy: str) -> DataError:
    """The error for shards that cannot be used."""
    return DataError(cause, remedy=remedy, field="data.shards")
