# SPDX-License-Identifier: Apache-2.0
"""An embedding cache whose writer is killed, runs out of disk, or has company; models whose numbers are no numbers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import encoder, write_pool

from aced_sdk.cache import open_cache, parts, write_cache
from aced_sdk.config import Data
from aced_sdk.data import Pool
from aced_sdk.errors import CacheError, DataError, ModelError

# Stops for good where it is told to, so that the kill meets it there.
SCRIPT = """
import sys
from pathlib import Path
tests, pool, directory, dtype, moment = sys.argv[1:]
sys.path.insert(0, tests)
from tiny import encoder
from aced_sdk.cache import parts, write_cache
from aced_sdk.config import Data
from aced_sdk.data import Pool

def stop():
    print("there", flush=True)
    sys.stdin.read()

def told(done, total):
    if moment == "embedding" and done == 25:
        stop()

save = parts.save_tensors

def torn(target, tensors, metadata):
    if moment == "writing" and "000001" in target.name:
        target.write_bytes(b"half of it")
        stop()
    save(target, tensors, metadata)

parts.save_tensors = torn
write_cache(encoder(), Pool([pool]), Path(directory), Data(shards=(pool,)), 5, told, dtype)
"""


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    return Pool([write_pool(tmp_path_factory.mktemp("world") / "pool", pairs=60, shards=3)])


def settings(pool: Pool) -> Data:
    return Data(shards=tuple(str(shard) for shard in pool.shards))


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def working() -> list[str]:
    """Threads of a writer."""
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name.startswith(("read-cache", "write-cache"))]


def until(true: Any) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("moment", ["embedding", "writing"])
def test_a_writer_killed_in_the_middle_of_a_part_is_resumed(
    root: Path, pool: Pool, tmp_path: Path, moment: str, dtype: Any
) -> None:
    directory = tmp_path / "c"
    arguments = [str(root / "tests"), str(pool.shards[0].parent), str(directory), dtype, moment]
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "there\n"
    first = directory / "part-000000.safetensors"
    until(first.is_file)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert not (directory / "part-000001.safetensors").exists()
    assert len(list(directory.glob(".part-000001.*.tmp"))) == (moment == "writing")
    tower = encoder()
    with pytest.raises(CacheError, match="part-000001"):
        open_cache(directory, pool, tower.fingerprint())
    kept = first.stat().st_mtime_ns
    heard: list[int] = []
    write_cache(tower, pool, directory, settings(pool), 5, lambda done, _: heard.append(done))
    assert heard == [*range(20, 61, 5)]
    assert first.stat().st_mtime_ns == kept
    write_cache(tower, pool, tmp_path / "whole", settings(pool), 5, dtype=dtype)
    assert contents(directory) == contents(tmp_path / "whole")


def test_a_disk_that_fills_leaves_whole_parts(pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save, tower = parts.save_tensors, encoder()

    def full(target: Path, tensors: Any, metadata: Any = None) -> None:
        if "000001" in target.name:
            target.write_bytes(b"as far as it went")
            raise OSError(28, "No space left on device")
        save(target, tensors, metadata)

    monkeypatch.setattr(parts, "save_tensors", full)
    with pytest.raises(CacheError, match="No space left on device") as caught:
        write_cache(tower, pool, tmp_path / "c", settings(pool))
    assert "complete shards are kept" in caught.value.remedy
    assert list(contents(tmp_path / "c")) == [".lock", "cache.json", "part-000000.safetensors"]
    monkeypatch.undo()
    assert bool(write_cache(tower, pool, tmp_path / "c", settings(pool)).usable.all())


def test_a_second_writer_waits_and_finds_the_parts_there(pool: Pool, tmp_path: Path) -> None:
    go_on = threading.Event()
    heard: tuple[list[int], list[int]] = ([], [])

    def write(number: int) -> Any:
        def told(done: int, total: int) -> None:
            heard[number].append(done)
            go_on.wait(60)

        return write_cache(encoder(), pool, tmp_path / "c", settings(pool), 5, told)

    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(write, 0)
        until(lambda: heard[0])
        second = threads.submit(write, 1)
        time.sleep(0.3)
        assert heard == ([5], [])
        go_on.set()
        first.result(60)
        assert bool(second.result(60).usable.all())
    assert heard == ([*range(5, 61, 5)], [20, 40, 60])


def test_a_model_that_gives_nan_is_told_before_anything_is_kept(pool: Pool, tmp_path: Path) -> None:
    tower = encoder()
    with torch.no_grad():
        tower.model.visual.proj[0] = torch.nan  # type: ignore[union-attr, index, operator]
    with pytest.raises(ModelError, match="embeddings of 5 pairs are not finite, of 000000 for one") as caught:
        write_cache(tower, pool, tmp_path / "c", settings(pool), 5)
    assert not working()
    assert caught.value.remedy == "check the model's weights"
    assert not list((tmp_path / "c").glob("part-*"))


def test_an_error_while_reading_ahead_ends_the_call(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = pool.text

    def gone(row: int, max_bytes: int) -> str:
        if row > 30:
            raise DataError("the disk is gone", remedy="mount it")
        return read(row, max_bytes)

    monkeypatch.setattr(pool, "text", gone)
    with pytest.raises(DataError, match="the disk is gone"):
        write_cache(encoder(), pool, tmp_path / "c", settings(pool), 5)
    assert not working()
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "c").glob("part-*")] == ["part-000000.safetensors"]
    assert bool(write_cache(encoder(), pool, tmp_path / "c", settings(pool)).usable.all())
