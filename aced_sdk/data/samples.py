# SPDX-License-Identifier: Apache-2.0
"""Files of a tar grouped into samples by their names, as WebDataset does, and what it does not decide.

WebDataset splits a name at its first dot: `a/0001.seg.png` is the member `seg.png` of the sample `a/0001`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from aced_sdk.data.tars import Member

IMAGES = frozenset({"png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff"})
_LABELS = frozenset({"txt", "json", "cls", "npy", "npz"})
_KNOWN = IMAGES | _LABELS


@dataclass(frozen=True, slots=True)
class Sample:
    """One key of a shard with its members by extension.

    Attributes:
        key: folder and name up to the extension; bytes that are not UTF-8 are replaced.
        shard: number of the shard.
        members: places by extension, in small letters.
        problem: why its members cannot be read; empty if they can.
    """

    key: str
    shard: int
    members: dict[str, Member]
    problem: str = ""


@dataclass(slots=True)
class _Run:
    """Files of one key that follow one another."""

    key: str
    members: dict[str, Member | None]


def group(files: Iterable[tuple[str, Member | None]], shard: int) -> tuple[Sample, ...]:
    """The samples of a tar.

    A key's files may lie anywhere in the tar. If names repeat, each repetition with the same extensions is a sample of
    its own: tars were joined. Otherwise nothing tells which files belong together, and the sample gets a `problem`, as
    it does for a link to a file that is not there. Hidden files (`._0001.jpg` of macOS) belong to no sample.

    Args:
        files: names and places in the tar's order; None for a link to no file.
        shard: number of the shard.
    """
    visible = [(name, place) for name, place in files if not name.rpartition("/")[2].startswith(".")]
    runs = list[_Run]()
    of_key: defaultdict[str, list[_Run]] = defaultdict(list)
    for (key, extension), (_, place) in zip(_keys([name for name, _ in visible]), visible, strict=True):
        if not runs or runs[-1].key != key or extension in runs[-1].members:
            runs.append(_Run(key, {}))
            of_key[key].append(runs[-1])
        runs[-1].members[extension] = place
    repeats = {key: all(run.members.keys() == same[0].members.keys() for run in same) for key, same in of_key.items()}
    samples = list[Sample]()
    for run in runs:
        same = of_key[run.key]
        if repeats[run.key]:
            samples.append(_sample(run.key, shard, run.members))
        elif run is same[0]:
            joined = {extension: place for other in same for extension, place in other.members.items()}
            repeated = len(joined) < sum(len(other.members) for other in same)
            samples.append(_sample(run.key, shard, joined, "a name is twice in the shard" if repeated else ""))
    return tuple(samples)


def _sample(key: str, shard: int, members: dict[str, Member | None], problem: str = "") -> Sample:
    found = {extension: place for extension, place in members.items() if place is not None}
    if not problem and any(place is None and extension in _KNOWN for extension, place in members.items()):
        problem = "a link to a file that is not in the shard"
    if not key.isascii():  # logs take no lone surrogates
        key = key.encode(errors="surrogateescape").decode(errors="replace")
    return Sample(key, shard, found, problem)


def _keys(names: list[str]) -> list[tuple[str, str]]:
    """Key and extension of each name, split at the first dot of the file, or at the last one for keys with dots.

    A key has a dot in two cases: a picture and a label differ only after their last dot, or WebDataset's split would
    leave the sample without any known extension.
    """
    first, last = [_split(name, last=False) for name in names], [_split(name, last=True) for name in names]
    dotted = {key for (short, _), (key, _) in zip(first, last, strict=True) if key != short}
    if not dotted:
        return first
    plain = {key for key, extension in first if extension in _KNOWN}
    extensions: defaultdict[str, set[str]] = defaultdict(set)
    for key, extension in last:
        if key in dotted:
            extensions[key].add(extension)
    own = {key for key, held in extensions.items() if held & IMAGES and held & _LABELS}
    return [
        long if long[0] in own or (short[0] not in plain and long[1] in _KNOWN) else short
        for short, long in zip(first, last, strict=True)
    ]


def _split(name: str, *, last: bool) -> tuple[str, str]:
    folder, _, file = name.rpartition("/")
    key, _, extension = file.rpartition(".") if last and "." in file else file.partition(".")
    return f"{folder}/{key}" if folder else key, extension.lower()
