# SPDX-License-Identifier: Apache-2.0
"""Tars, names and metadata of a third round of attacks on pools."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

from aced_sdk.data import Pool
from aced_sdk.errors import DataError
from tests import tiny
from tests.security.sandbox import run


def tar(*files: tuple[str | bytes, bytes], end: bytes = bytes(1024)) -> bytes:
    """A tar; names may be bytes, and a content may be the name of a file to link to."""
    parts = []
    for name, content in files:
        raw = name if isinstance(name, bytes) else name.encode()
        info = tarfile.TarInfo(raw.decode("utf-8", "surrogateescape"))
        info.size = len(content)
        header = info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
        parts.append(header + content + bytes(-len(content) % 512))
    return b"".join(parts) + end


def link(name: str, target: str) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.LNKTYPE, target
    return info.tobuf(tarfile.GNU_FORMAT)


def long_name(name: bytes) -> bytes:
    """A GNU header that gives the next file its name."""
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, len(name) + 1
    return info.tobuf(tarfile.GNU_FORMAT) + name + bytes(512 - len(name) % 512)


def pool(folder: Path, content: bytes) -> Pool:
    (folder / "0.tar").write_bytes(content)
    return Pool([folder / "0.tar"])


def _samples(path: Path) -> int:
    return len(Pool([path]))


def _marked(path: Path) -> str:
    pool = Pool([path])
    return f"{pool.noisy(np.arange(len(pool))).sum()} of {len(pool)}" if pool.knows_noisy else "nothing"


def test_a_name_that_is_repeated_often_takes_linear_time(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(tarfile.TarInfo("0.png").tobuf() * 8000 + bytes(1024))
    assert run(_samples, tmp_path / "0.tar", seconds=5).returned() == 8000


@pytest.mark.parametrize("length", [4096, 4097, 2**19])
def test_names_have_a_bound(tmp_path: Path, length: int) -> None:
    name = b"\xff" * (length - 4) + b".png"
    (tmp_path / "0.tar").write_bytes((long_name(name) + tarfile.TarInfo("x").tobuf()) * 10 + bytes(1024))
    outcome = run(_samples, tmp_path / "0.tar", seconds=5, mib=100)
    assert outcome.returned() == 10 if length == 4096 else outcome.refused("a name has more than 4,096 bytes")


def test_names_in_other_bytes_are_not_merged_and_can_be_logged(tmp_path: Path) -> None:
    found = pool(tmp_path, tar((b"\xff.png", tiny.picture(1)), (b"\\xff.txt", b"of another"), (b"\xfe.txt", b"third")))
    assert [list(found.members(row)) for row in range(len(found))] == [["png"], ["txt"], ["txt"]]
    assert [found.key(row).encode() for row in range(len(found))] == ["\ufffd".encode(), b"\\xff", "\ufffd".encode()]


def test_samples_do_not_cross_the_end_of_a_joined_tar(tmp_path: Path) -> None:
    first = tar(("8.png", tiny.picture(8)), ("8.txt", b"eight"), ("9.png", tiny.picture(9)))
    second = tar(("9.txt", b"of another tar"), end=b"") + link("7.png", "8.png") + bytes(1024)
    found = pool(tmp_path, first + second)
    assert [(found.key(row), sorted(found.members(row))) for row in range(len(found))] == [
        ("8", ["png", "txt"]), ("9", ["png"]), ("9", ["txt"]), ("7", []),
    ]  # fmt: skip


def test_zeros_between_tars_have_a_bound_together(tmp_path: Path) -> None:
    with (tmp_path / "0.tar").open("wb") as stream:
        for _ in range(4):
            stream.write(tar(("0.txt", b"x"), end=b""))
            stream.seek(40 * 2**20, io.SEEK_CUR)
        stream.write(bytes(1024))
    assert run(_samples, tmp_path / "0.tar", seconds=5).refused("64 MiB of zeros")


@pytest.mark.parametrize("content", [b'{"noisy": true, "x": [%s[]]}' % (b"[]," * 300_000), b'{"noisy": true}'])
def test_metadata_that_many_samples_link_to_is_parsed_once(tmp_path: Path, content: bytes) -> None:
    links = b"".join(link(f"{number}.json", "j/x.json") for number in range(2000))
    (tmp_path / "0.tar").write_bytes(tar(("j/x.json", content), end=b"") + links + bytes(1024))
    assert run(_marked, tmp_path / "0.tar", seconds=5).returned() == (
        "nothing" if len(content) > 20 else "2001 of 2001"
    )


@pytest.mark.parametrize("pattern", ["0.tar{,}{,}", "{.,../%s,.}/0.tar", "{0,1}.tar"])
def test_a_shard_that_is_named_twice_is_refused(tmp_path: Path, pattern: str) -> None:
    (tmp_path / "0.tar").write_bytes(tar(("0.txt", b"x")))
    os.link(tmp_path / "0.tar", tmp_path / "1.tar")
    with pytest.raises(DataError, match="named twice"):
        Pool([str(tmp_path / pattern.replace("%s", tmp_path.name))])


def test_a_shard_that_is_replaced_while_in_use_is_refused(tmp_path: Path) -> None:
    files = [("0.png", tiny.picture(0)), ("0.txt", b"true")]
    found = pool(tmp_path, tar(*files))
    assert found.text(0) == "true"
    (tmp_path / "new").write_bytes(tar(files[0], ("0.txt", b"lies")))
    os.replace(tmp_path / "new", tmp_path / "0.tar")
    with pytest.raises(DataError, match="altered or replaced while it was in use"):
        found.text(0)
