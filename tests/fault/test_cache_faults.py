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

from aced_sdk.cache import open_cache, write_cache
from aced_sdk.cache.rows import RowWriter
from aced_sdk.config import Data
from aced_sdk.data import Decoding, Pool
from aced_sdk.errors import CacheError, DataError, ModelError

# Stops at the given moment, where it is killed.
SCRIPT = """
import sys
from pathlib import Path
tests, pool, directory, dtype, moment = sys.argv[1:]
sys.path.insert(0, tests)
from tiny import encoder
from aced_sdk.cache import rows, write_cache
from aced_sdk.config import Data
from aced_sdk.data import Pool

def stop():
    print("there", flush=True)
    sys.stdin.read()

def report(done, total):
    if moment == "embedding" and done == 25:
        stop()

write = rows.os.pwrite

def torn(handle, content, offset):
    if moment == "writing" and offset:
        write(handle, content[: len(content) // 2 + 3], offset)
        stop()
    return write(handle, content, offset)

rows.os.pwrite = torn
write_cache(encoder(), Pool([pool]), Path(directory), Data(shards=(pool,)), 5, report, dtype)
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
def test_a_killed_writer_is_resumed(root: Path, pool: Pool, tmp_path: Path, moment: str, dtype: Any) -> None:
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
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    tower = encoder()
    with pytest.raises(CacheError, match="incomplete: its writer was interrupted"):
        open_cache(directory, pool, tower.fingerprint())
    kept = 25 if moment == "embedding" else 5
    content = (directory / "rows.bin").read_bytes()
    heard: list[int] = []
    write_cache(tower, pool, directory, settings(pool), 5, lambda done, _: heard.append(done))
    assert heard == [*([20] if kept > 20 else []), *range(kept, 61, 5)]
    assert (directory / "rows.bin").read_bytes()[: kept * len(content) // 60] == content[: kept * len(content) // 60]
    write_cache(tower, pool, tmp_path / "whole", settings(pool), 5, dtype=dtype)
    assert contents(directory) == contents(tmp_path / "whole")


def test_a_disk_that_fails_keeps_whole_rows(pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put, tower = RowWriter._put, encoder()

    def full(self: RowWriter, numbers: Any, rows: Any) -> None:
        if len(numbers) and numbers[0] >= 20:
            raise OSError(28, "No space left on device")
        put(self, numbers, rows)

    monkeypatch.setattr(RowWriter, "_put", full)
    with pytest.raises(CacheError, match="No space left on device") as caught:
        write_cache(tower, pool, tmp_path / "c", settings(pool))
    assert "complete rows are kept" in caught.value.remedy
    assert not working()
    monkeypatch.undo()
    heard: list[int] = []
    cache = write_cache(tower, pool, tmp_path / "c", settings(pool), 20, lambda done, _: heard.append(done))
    assert heard == [20, 40, 60]
    assert bool(cache.usable.all())


def test_a_disk_without_room_is_an_error_at_the_start(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("aced_sdk.files.writing._allocate", full)
    monkeypatch.setattr(Decoding, "fetch", lambda self, rows: pytest.fail("read before the space was there"))
    with pytest.raises(CacheError, match="No space left on device"):
        write_cache(encoder(), pool, tmp_path / "c", settings(pool))
    assert (tmp_path / "c" / "rows.bin").stat().st_size == 0
    monkeypatch.undo()
    assert bool(write_cache(encoder(), pool, tmp_path / "c", settings(pool)).usable.all())


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
    with pytest.raises(ModelError, match=r"embeddings of 5 pairs are not finite, 000000 in .* first") as caught:
        write_cache(tower, pool, tmp_path / "c", settings(pool), 5)
    assert not working()
    assert caught.value.remedy == "check the model's weights"
    assert not (tmp_path / "c" / "usable.bin").exists()
    assert not any((tmp_path / "c" / "rows.bin").read_bytes())


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
    heard: list[int] = []
    cache = write_cache(encoder(), pool, tmp_path / "c", settings(pool), 5, lambda done, _: heard.append(done))
    assert heard[0] == 20
    assert bool(cache.usable.all())
