# SPDX-License-Identifier: Apache-2.0
"""Hostile embedding caches and folders of prepared pictures: refused by name, nothing outside read or written."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from aced_sdk.cache import open_cache, write_cache
from aced_sdk.config import Data
from aced_sdk.data import Pool, prepare
from aced_sdk.errors import CacheError
from tests.security.sandbox import MIB, canary, run

DATA = Data(shards=("unused",))
FILES = ("cache.json", "rows.bin", "usable.bin")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pool, its cache, and its prepared pictures."""
    root = tmp_path_factory.mktemp("folders")
    pool = Pool([tiny.write_pool(root / "pool", pairs=16)])
    write_cache(tiny.encoder(), pool, root / "cache", DATA)
    prepare(pool, tiny.encoder().processor, DATA, root / "prepared")
    return root


@pytest.fixture
def copy(world: Path, tmp_path: Path) -> Path:
    """The same, to be spoilt."""
    shutil.copytree(world, tmp_path, dirs_exist_ok=True)
    return tmp_path


def _open(root: Path) -> list[bool]:
    cache = open_cache(root / "cache", Pool([root / "pool"]), tiny.encoder().fingerprint())
    return list(cache.usable.tolist())


def _write(root: Path) -> list[bool]:
    return list(write_cache(tiny.encoder(), Pool([root / "pool"]), root / "cache", DATA).usable.tolist())


# -- caches -------------------------------------------------------------------------------------------------------


def test_marks_of_usable_pairs_are_verified_at_opening(copy: Path) -> None:
    """A cache whose every pair is marked as unusable would never be read, and so never be verified."""
    path = copy / "cache" / "usable.bin"
    path.write_bytes(path.read_bytes()[:-8] + bytes(8))
    assert run(_open, copy).refused("usable.bin", "checksum")
    assert run(_write, copy).returned() == [True] * 16  # derived from the rows again


@pytest.mark.parametrize("number", [1, 2])
def test_a_cache_of_an_older_format_is_refused(copy: Path, number: int) -> None:
    path = copy / "cache" / "cache.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": number}))
    for call in (_open, _write):
        assert run(call, copy).refused("older format", "delete the folder")


@pytest.mark.parametrize("file", FILES[1:])
@pytest.mark.parametrize("change", [-1, 1])
def test_a_file_of_another_size_is_refused(copy: Path, file: str, change: int) -> None:
    path = copy / "cache" / file
    os.truncate(path, path.stat().st_size + change)
    assert run(_open, copy).refused(file)
    assert run(_write, copy).returned() == [True] * 16


def test_a_file_that_is_cut_off_while_it_is_in_use_does_not_end_the_process(copy: Path) -> None:
    cache = open_cache(copy / "cache", Pool([copy / "pool"]))
    os.truncate(copy / "cache" / "rows.bin", 0)
    with pytest.raises(CacheError, match="another size"):
        cache.rows(torch.arange(16), torch.device("cpu"))


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def link_out(path: Path) -> None:
    """Move the file out of its folder and link to it."""
    path.rename(path.parents[1] / f"elsewhere-{path.name}")
    path.symlink_to(path.parents[1] / f"elsewhere-{path.name}")


@pytest.mark.parametrize("attack", [pipe, device, link_out], ids=lambda attack: attack.__name__)
@pytest.mark.parametrize("file", FILES)
def test_a_file_of_a_cache_is_a_regular_one_inside(copy: Path, file: str, attack: Callable[[Path], None]) -> None:
    attack(copy / "cache" / file)
    before = (copy / f"elsewhere-{file}").read_bytes() if attack is link_out else b""
    assert run(_open, copy).refused(file)
    written = run(_write, copy)
    if file == "usable.bin":
        assert written.returned() == [True] * 16
        assert not (copy / "cache" / file).is_symlink()
    else:
        assert written.refused(file)
    if attack is link_out:
        assert (copy / f"elsewhere-{file}").read_bytes() == before


MANIFESTS: dict[str, dict[str, Any] | str] = {
    "a list": "[]",
    "deep": "[" * 100_000,
    "a huge width": {"dim": 10**12},
    "a width of 0": {"dim": 0},
    "a scale that is not finite": '{"scale": 1e999}',
    "a huge scale": {"scale": 1e300},
    "a huge number": {"format": 10**400},
    "another type": {"shards": {"a": 1}},
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_hostile_manifest_is_refused(copy: Path, name: str) -> None:
    path, content = copy / "cache" / "cache.json", MANIFESTS[name]
    path.write_text(content if isinstance(content, str) else json.dumps(json.loads(path.read_text()) | content))
    (copy / "cache" / "rows.bin").unlink()
    for call in (_open, _write):
        assert run(call, copy, mib=512).refused()


def test_leftovers_of_other_kinds_stop_no_writer(copy: Path) -> None:
    (copy / "cache" / ".usable-00001").mkdir()
    os.mkfifo(copy / "cache" / ".x.tmp")
    (copy / "private").write_text("mine")
    (copy / "cache" / ".y.tmp").symlink_to(copy / "private")
    (copy / "cache" / "rows.bin").unlink()
    assert run(_write, copy).returned() == [True] * 16
    assert (copy / "private").read_text() == "mine"


def test_the_lock_of_a_cache_is_never_followed(copy: Path) -> None:
    (copy / "private").write_text("mine")
    (copy / "cache" / ".lock").unlink()
    (copy / "cache" / ".lock").symlink_to(copy / "private")
    assert run(_write, copy).refused(".lock is not a regular file")
    assert (copy / "private").read_text() == "mine"


# -- prepared pictures --------------------------------------------------------------------------------------------


def _prepare(root: Path) -> tuple[int, int]:
    pool = Pool([root / "pool"])
    prepared = prepare(pool, tiny.encoder().processor, DATA, root / "prepared")
    rows = np.flatnonzero(prepared.usable(slice(0, len(pool))))
    return len(rows), len(prepared.fetch(rows))


class _Code:
    def __init__(self, code: str) -> None:
        self.code = code

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (self.code,)


def saved(path: Path, array: Any, **options: Any) -> None:
    with path.open("wb") as stream:
        np.save(stream, array, **options)


def test_prepared_pictures_open(copy: Path) -> None:
    assert run(_prepare, copy).returned() == (16, 16)


@pytest.mark.parametrize("attack", [pipe, device, link_out], ids=lambda attack: attack.__name__)
@pytest.mark.parametrize("file", ["images.npy", "tokens.npy", "usable.npy", "manifest.json"])
def test_a_file_of_prepared_pictures_is_a_regular_one_inside(
    copy: Path, file: str, attack: Callable[[Path], None]
) -> None:
    (folder,) = (copy / "prepared").iterdir()
    attack(folder / file)
    outcome = run(_prepare, copy)
    if file == "manifest.json" and attack is not link_out:  # no prepared folder: it is made anew
        assert outcome.returned() == (16, 16)
    else:
        assert outcome.refused(file, "data.prepared")


@pytest.mark.parametrize("file", ["tokens.npy", "usable.npy"])
@pytest.mark.parametrize("digest", ["kept", "removed"])
def test_altered_tokens_and_marks_are_refused(copy: Path, file: str, digest: str) -> None:
    (folder,) = (copy / "prepared").iterdir()
    array = np.load(folder / file)
    saved(folder / file, array.astype(np.float64) if digest == "removed" else array * 0)
    if digest == "removed":
        manifest = json.loads((folder / "manifest.json").read_text())
        del manifest["sha256"]
        (folder / "manifest.json").write_text(json.dumps(manifest))
    assert run(_prepare, copy).refused("data.prepared")


ARRAYS: dict[str, Callable[[Path], None]] = {
    "fewer pairs": lambda path: saved(path, np.zeros((8, 3, 16, 16), np.uint8)),
    "more pairs": lambda path: saved(path, np.zeros((17, 3, 16, 16), np.uint8)),
    "another size": lambda path: saved(path, np.zeros((16, 3, 16, 17), np.uint8)),
    "another type": lambda path: saved(path, np.zeros((16, 3, 16, 16), np.float32)),
    "objects": lambda path: saved(path, np.array([{}] * 16, dtype=object), allow_pickle=True),
    "a pickle": lambda path: path.write_bytes(pickle.dumps(_Code(canary(path.parents[2])[1]))) and None,
    "a long header": lambda path: path.write_bytes(b"\x93NUMPY\x02\0\xff\xff\xff\x7f" + b" " * MIB) and None,
    "nothing": lambda path: path.write_bytes(b"") and None,
}


@pytest.mark.parametrize("name", ARRAYS)
def test_hostile_arrays_of_prepared_pictures_are_refused(copy: Path, name: str) -> None:
    (folder,) = (copy / "prepared").iterdir()
    ARRAYS[name](folder / "images.npy")
    assert run(_prepare, copy).refused("cannot be used", "delete that folder")
    assert not canary(copy)[0].exists()


@pytest.mark.parametrize("text", ["[]", "[" * 100_000, '{"sha256": []}', '{"sha256": {"tokens.npy": 1}}', ""])
def test_a_hostile_manifest_of_prepared_pictures_is_refused(copy: Path, text: str) -> None:
    (folder,) = (copy / "prepared").iterdir()
    (folder / "manifest.json").write_text(text)
    assert run(_prepare, copy).refused("data.prepared")
