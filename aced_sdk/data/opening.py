# SPDX-License-Identifier: Apache-2.0
"""Find, check and build the indexes of a pool's shards."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from aced_sdk.data.index import (
    Identity,
    IndexFileError,
    IndexHeader,
    beside,
    in_home,
    read_header,
    write_index,
)
from aced_sdk.data.indexing import build_index
from aced_sdk.data.shards import wrong
from aced_sdk.data.tars import TarError, UnsupportedTar
from aced_sdk.files import ReadError, printable

_THREADS = 8  # hashing releases the interpreter's lock


@dataclass(frozen=True)
class Opened:
    """The index of a shard.

    Attributes:
        path: its file.
        header: the file's header.
        content: its bytes if no folder could be written to; else None.
    """

    path: Path
    header: IndexHeader
    content: bytes | None = None


def open_indexes(
    shards: Sequence[Path],
    progress: Callable[[int, int], None] | None = None,
    *,
    beside_shards: bool = False,
    workers: int = _THREADS,
) -> list[Opened]:
    """Find the index of each shard: beside it, else in the cache home. Missing and outdated indexes are built.

    Args:
        shards: tar files.
        progress: called with the number of indexes built, and of those to build.
        beside_shards: write new indexes beside their shards and not in the cache home.
        workers: threads that build.

    Raises:
        DataError: if a shard cannot be read, is no tar, is cut off or is named twice, or if an index beside a shard is
            damaged or of another shard.
    """
    identities = _identities(shards)
    found = [_find(shard, identity) for shard, identity in zip(shards, identities, strict=True)]
    missing = [number for number, opened in enumerate(found) if opened is None]
    with ThreadPoolExecutor(max(1, min(workers, os.cpu_count() or 1)), thread_name_prefix="index") as threads:
        building = {threads.submit(_build, shards[number], beside_shards): number for number in missing}
        try:
            for done, future in enumerate(as_completed(building), start=1):
                found[building[future]] = future.result()
                if progress:
                    progress(done, len(missing))
        except BaseException:
            threads.shutdown(wait=True, cancel_futures=True)
            raise
    return [opened for opened in found if opened is not None]


def _identities(shards: Sequence[Path]) -> list[Identity]:
    """Size, times of change and inode of each shard.

    Raises:
        DataError: if one cannot be read, or is named twice.
    """
    identities = list[Identity]()
    files: dict[tuple[int, int], Path] = {}
    for path in shards:
        try:
            facts = path.stat()
        except OSError as error:  # a broken link
            raise wrong(f"cannot read the shard {printable(path)}: {error.strerror}", "restore it") from None
        known = files.setdefault((facts.st_dev, facts.st_ino), path)
        if facts.st_ino and known is not path:  # some network file systems have no inodes
            cause = f"the shard {printable(path)} is named twice"
            raise wrong(cause if known == path else f"{cause}, also as {printable(known)}", "name each shard once")
        identities.append(Identity.of(facts))
    return identities


def _find(shard: Path, identity: Identity) -> Opened | None:
    """Find the index of a shard; None if it is missing, or older than the shard.

    Raises:
        DataError: if the one beside the shard is damaged or of another shard.
    """
    path = beside(shard)
    try:
        header = read_header(path, shard.name)
    except IndexFileError as error:
        remedy = "delete it, and run `aced index` again"
        raise wrong(f"the index {printable(path)} {error}", remedy) from None
    if header is not None and header.identity == identity:
        return Opened(path, header)
    path = in_home(shard)
    try:
        header = read_header(path, shard.name)
    except IndexFileError:
        return None  # it is built again
    return None if header is None or header.identity != identity else Opened(path, header)


def _build(shard: Path, beside_shard: bool) -> Opened:
    try:
        content = build_index(shard)
    except UnsupportedTar as error:
        raise wrong(f"the shard {printable(shard)} {error.args[0]}", error.args[1]) from error
    except TarError as error:
        raise wrong(f"the shard {printable(shard)} {error}", "fetch or write it again, or leave it out") from error
    except (ReadError, OSError) as error:
        cause = f"the shard {printable(shard)} cannot be read: {error}"
        raise wrong(cause, "fetch it again, or leave it out") from error
    header = IndexHeader.decode(content, shard.name)
    path = beside(shard) if beside_shard else in_home(shard)
    try:
        write_index(path, content)
    except OSError as error:
        if beside_shard:
            cause = f"the index {printable(path)} cannot be written: {error.strerror or error}"
            raise wrong(cause, "check permissions and space, or keep indexes in the cache home") from error
        return Opened(path, header, content)  # kept in memory
    return Opened(path, header)
