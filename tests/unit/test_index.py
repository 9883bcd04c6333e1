# SPDX-License-Identifier: Apache-2.0
"""Indexes of shards: equal to the slow walk, reused, rebuilt for changed shards, refused if they are damaged."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import pair, write_pool, write_tar

import aced_sdk
from aced_sdk.data import Pool, indexing, open_indexes, opening
from aced_sdk.data.index import IndexHeader, ShardIndex, beside, in_home
from aced_sdk.errors import DataError


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACED_HOME", str(tmp_path / "home"))


def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the shards that are indexed from now on."""
    names: list[str] = []
    original = opening.build_index

    def build(path: Path) -> bytes:
        names.append(path.name)
        return original(path)

    monkeypatch.setattr(opening, "build_index", build)
    return names


def described(path: Path) -> list[Any]:
    content = indexing.build_index(path)
    header = IndexHeader.decode(content, path.name)
    index = ShardIndex(header, content)
    assert header.digest == sha256(path.read_bytes()).hexdigest()
    entries = [index.entry(row) for row in range(header.rows)]
    return [(entry.key, entry.members, entry.marked, entry.problem) for entry in entries]


def tar(path: Path, files: dict[str, bytes], kind: int) -> Path:
    with tarfile.open(path, "w", format=kind) as stream:
        for number, (name, content) in enumerate(files.items()):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), 1.5 + number  # not whole: a pax header each
            stream.addfile(info, io.BytesIO(content))
    return path


TARS = {
    "usual": {f"{n:05d}.{e}": c for n in range(300) for e, c in pair(n).items()},
    "folders": {f"a/b{n % 3}/{n}.{e}": c for n in range(50) for e, c in pair(n).items()},
    "dots in folders": {f"v1.2/{n}.{e}": c for n in range(5) for e, c in pair(n).items()},
    "mixed members": {"1.txt": b"x", "2.jpg": b"", "2.txt": b"y", "3": b"z", "4.webp": b"w"},
    "long extension": {"1.txt": b"x", "1.embedding16": b"y"},
    "capitals": {"1.JPG": b"x", "1.txt": b"y"},
    "apart": {"1.txt": b"x", "2.txt": b"y", "1.png": b"z"},
    "hidden": {"._1.png": b"x", "1.png": b"y", "1.txt": b"z"},
    "names that are not ASCII": {"ä/ö.txt": "ü".encode(), "ä/ö.png": b"y"},
    "a large file": {"1.npz": bytes(9 * 2**20), "1.txt": b"x", "1.json": b'{"noisy": true}'},
    "marks": {
        "1.json": b'{"noisy": true}',
        "2.json": b'{"noisy": null}',
        "3.json": b'{"a": {"noisy": true}}',
        "4.json": b'{"noisy": 1}',
        "5.json": b'{"noisy" : false, "x": 1}',
        "6.json": b'{"tag": "noisy"}',
        "7.json": b'{"a": {}, "noisy": true}',
        "8.json": b'{"noisy": true',
    },
    "a path from the root": {"/1.txt": b"x", "/1.png": b"y"},
    "escaped marks": {"1.json": b'{"no\\u0069sy": true}'},
    "nothing": {},
}


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize("name", TARS)
def test_the_fast_walk_finds_what_the_exact_one_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: int
) -> None:
    path = tar(tmp_path / "0.tar", TARS[name], kind)
    monkeypatch.setattr(indexing, "_CHUNK", 64 * 1024)  # headers and files are cut anywhere
    found = described(path)
    monkeypatch.setattr(indexing, "_fast", lambda *_: None)
    assert found == described(path)


def test_usual_tars_take_the_fast_walk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexing, "_exact", None)
    for kind in (tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        for name in ("usual", "folders", "a large file", "marks"):
            assert described(tar(tmp_path / "0.tar", TARS[name], kind))


def test_marks_are_those_of_the_json(tmp_path: Path) -> None:
    marks = [mark for _, _, mark, _ in described(tar(tmp_path / "0.tar", TARS["marks"], tarfile.USTAR_FORMAT))]
    assert marks == [True, None, None, False, False, None, True, None]


def test_an_index_is_built_once_and_again_for_a_changed_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_pool(tmp_path / "pool", pairs=40, shards=4)
    names = built(monkeypatch)
    first = Pool([folder])
    assert sorted(names) == [f"000{n}.tar" for n in range(4)]
    names.clear()
    assert Pool([folder]).fingerprint == first.fingerprint
    assert names == []
    write_tar(folder / "0002.tar", [pair(n) for n in range(10)], first=20)
    again = Pool([folder])
    assert names == ["0002.tar"]
    assert again.fingerprint != first.fingerprint
    content, facts = (folder / "0001.tar").read_bytes(), (folder / "0001.tar").stat()
    (folder / "0001.tar").unlink()
    (folder / "0001.tar").write_bytes(content[::-1][::-1])
    os.utime(folder / "0001.tar", ns=(facts.st_atime_ns, facts.st_mtime_ns))  # as tools that unpack do
    names.clear()
    Pool([folder])
    assert names == ["0001.tar"]


def test_a_pool_is_opened_without_reading_its_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_pool(tmp_path / "pool", pairs=40, shards=4)
    Pool([folder])
    monkeypatch.setattr(opening, "build_index", None)
    monkeypatch.setattr("aced_sdk.data.pool.map_index", None)
    pool = Pool([folder])  # neither shards nor indexes are read
    assert (len(pool), pool.knows_noisy, len(pool.digests)) == (40, True, 4)


def test_noisy_pairs_are_known_by_row(tmp_path: Path) -> None:
    pool = Pool([write_pool(tmp_path / "pool", pairs=40, shards=4)])
    rows = np.random.default_rng(0).permutation(40)
    np.testing.assert_array_equal(pool.noisy(rows), rows % 4 == 0)
    shards, local = pool.locate(rows)
    np.testing.assert_array_equal(shards * 10 + local, rows)


def test_indexes_beside_the_shards_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_pool(tmp_path / "pool", pairs=20, shards=2)
    open_indexes(sorted(folder.glob("*.tar")), beside_shards=True)
    names = built(monkeypatch)
    assert len(Pool([folder])) == 20
    assert names == []
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "its header describes"),
        (lambda path: path.write_bytes(path.read_bytes()[:100]), "is damaged"),
        (lambda path: path.write_bytes(b""), "is damaged"),
        (lambda path: path.write_bytes(b"\1" + path.read_bytes()[1:]), "is damaged"),
        (lambda path: shutil.copy(path.with_name("0001.tar.index"), path), "is of another shard"),
        (lambda path: (path.unlink(), os.mkfifo(path)), "cannot be read"),
    ],
)
def test_a_damaged_index_beside_a_shard_is_refused(tmp_path: Path, damage: Any, message: str) -> None:
    folder = write_pool(tmp_path / "pool", pairs=20, shards=2)
    shards = sorted(folder.glob("*.tar"))
    open_indexes(shards, beside_shards=True)
    damage(beside(shards[0]))
    with pytest.raises(DataError, match=message) as caught:
        Pool([folder])
    assert "0000.tar.index" in str(caught.value)


def test_a_damaged_index_in_the_cache_home_is_made_again(tmp_path: Path) -> None:
    folder = write_pool(tmp_path / "pool", pairs=20)
    Pool([folder])
    in_home(folder / "0000.tar").write_bytes(b"?")
    assert len(Pool([folder])) == 20


def test_a_flipped_bit_in_an_index_is_met_when_its_pair_is_read(tmp_path: Path) -> None:
    """Of all bits but the noisy flags, which only statistics read."""
    folder = write_pool(tmp_path / "pool", pairs=12)
    whole = Pool([folder])
    expected = [(whole.key(row), whole.members(row), whole.metadata(row)) for row in range(12)]
    path = in_home(folder / "0000.tar")
    content = path.read_bytes()
    dice = np.random.default_rng(0)
    for place in dice.integers(256, len(content), 300).tolist():
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(dice.integers(8))
        path.write_bytes(damaged)
        pool, met = Pool([folder]), 0
        for row in range(12):
            try:
                found = (pool.key(row), pool.members(row), pool.metadata(row))
            except DataError as error:
                assert "is damaged" in str(error)  # noqa: PT017, other rows are whole
                met += 1
            else:
                assert found == expected[row]
        assert met


def test_an_index_that_does_not_fit_the_bytes_is_met_when_they_are_read(tmp_path: Path) -> None:
    folder = write_pool(tmp_path / "pool", pairs=20)
    Pool([folder])
    path = in_home(folder / "0000.tar")
    other = tar(tmp_path / "0000.tar", TARS["usual"], tarfile.USTAR_FORMAT)
    forged = indexing.build_index(other)
    header = IndexHeader.decode(forged, "0000.tar")
    mine = IndexHeader.decode(path.read_bytes(), "0000.tar")
    path.write_bytes(replace(header, identity=mine.identity).encode("0000.tar") + forged[256:])
    pool = Pool([folder])
    with pytest.raises(DataError, match="does not fit its bytes"):
        [pool.read(row, "png") for row in range(len(pool))]


def test_an_index_is_kept_in_memory_if_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    folder = write_pool(tmp_path / "pool", pairs=20)
    monkeypatch.setattr(opening, "write_index", full)
    assert Pool([folder]).metadata(3) == json.loads(pair(3)["json"])
    with pytest.raises(DataError, match="cannot be written"):
        open_indexes([folder / "0000.tar"], beside_shards=True)


def test_a_window_without_a_regular_file_is_walked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexing, "_CHUNK", 4096)
    files = {"1.jpg": bytes(2 * 2**20), "1.txt": b"x", "2.jpg": bytes(2 * 2**20 - 1536), "2.txt": b"y"}
    path = tar(tmp_path / "0.tar", files, tarfile.PAX_FORMAT)
    assert [key for key, *_ in described(path)] == ["1", "2"]


def test_indexing_a_pool_warns_if_indexes_cannot_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_pool(tmp_path / "pool", pairs=20)
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("ACED_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="2 indexes cannot be written"):
        assert len(aced_sdk.index(folder)) == 20
