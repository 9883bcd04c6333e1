# SPDX-License-Identifier: Apache-2.0
"""Two processes of one launch write one cache: the bytes of one process, and a failure of one ends both."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import encoder, write_pool

import aced_sdk as aced
from aced_sdk import towers
from aced_sdk.cache import open_cache
from aced_sdk.data import Pool
from aced_sdk.errors import CacheError

SECONDS = 120  # a hang is a failure
SCRIPT = """
import os, sys
import numpy as np
import aced_sdk as aced
from aced_sdk.data import Decoding
from aced_sdk.errors import DataError
world, directory, failing = sys.argv[1:]
fetch = Decoding.fetch

def logged(self, rows):
    print("read", *rows, flush=True)
    if failing and 20 + int(failing) in rows:
        raise DataError("the disk is gone", remedy="mount it")
    return fetch(self, rows)

Decoding.fetch = logged
cache = aced.cache_embeddings(f"{world}/reference", f"{world}/pool", directory, batch_size=5)
print("usable", int(cache.usable.sum()), flush=True)
os._exit(0)
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pool of three shards with an unusable pair, a model, and the cache that one process writes."""
    folder = tmp_path_factory.mktemp("world")
    write_pool(folder / "pool", pairs=60, shards=3, broken={33: {"png": b"?", "txt": b"x"}})
    towers.save(encoder(), folder / "reference")
    aced.cache_embeddings(folder / "reference", folder / "pool", folder / "cache", batch_size=5)
    return folder


def launch(root: Path, world: Path, directory: Path, failing: str = "") -> list[tuple[int, set[int], str, str]]:
    """Run two ranks; return for each the exit code, the rows that it read, its last line, and its errors."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(world), str(directory), failing],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | common | {"PYTHONPATH": str(root), "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    results = []
    try:
        for rank in ranks:
            out, errors = rank.communicate(timeout=SECONDS)
            lines = out.splitlines()
            read = {int(row) for line in lines if line.startswith("read") for row in line.split()[1:]}
            results.append((rank.returncode, read, lines[-1] if lines else "", errors))
    finally:
        for rank in ranks:
            rank.kill()
    return results


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def test_two_processes_share_the_shards_and_write_what_one_writes(root: Path, world: Path, tmp_path: Path) -> None:
    first, second = launch(root, world, tmp_path / "c")
    assert (first[0], second[0]) == (0, 0), first[3] + second[3]
    assert first[1] == {*range(20), *range(40, 60)}
    assert second[1] == {*range(20, 40)}
    assert first[2] == second[2] == "usable 59"
    assert contents(tmp_path / "c") == contents(world / "cache")


def test_a_failing_process_fails_both_and_one_process_continues(root: Path, world: Path, tmp_path: Path) -> None:
    first, second = launch(root, world, tmp_path / "c", failing="13")  # row 33, in the third batch of rank 1
    assert first[0]
    assert second[0]
    assert "DataError: the disk is gone" in second[3]
    assert "EngineError" in first[3]
    assert "the disk is gone" in first[3]
    with pytest.raises(CacheError, match="incomplete"):
        open_cache(tmp_path / "c", Pool([world / "pool"]))
    intact = (tmp_path / "c" / "rows.bin").read_bytes()
    cache = aced.cache_embeddings(world / "reference", world / "pool", tmp_path / "c", batch_size=5)
    assert torch.nonzero(~cache.usable).flatten().tolist() == [33]
    assert contents(tmp_path / "c") == contents(world / "cache")
    stride = len(intact) // 60
    assert intact[20 * stride : 30 * stride] == contents(world / "cache")["rows.bin"][20 * stride : 30 * stride]
