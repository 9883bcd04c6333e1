# SPDX-License-Identifier: Apache-2.0
"""How a pool scales: indexing, opening, looking up the rows of a step, start and memory, from 1 to 128 million pairs.

`python -m benchmarks.pool` prints one JSON object. Indexing is timed on a real tar of `--tar-pairs` pairs, in CPU time,
beside a plain walk over its headers. Pools of `--pairs` pairs are index files that are generated over sparse tars of
10,000 pairs each; they take 60 bytes per pair on the disk and are deleted afterwards. Each pool is opened in a process
of its own, where times and memory (resident bytes that are not pages of files) are read.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from aced_sdk.config import Data, Joint
from aced_sdk.curation import DrawStatistics, Embeddings
from aced_sdk.data import (
    FullOrder,
    Pool,
    RowSet,
    SuperBatch,
    SuperBatches,
    WindowOrder,
    build_order,
    indexing,
    own_lanes,
)
from aced_sdk.data.index import Columns, Identity, beside
from aced_sdk.engine import Step
from aced_sdk.reporting import JsonlWriter
from aced_sdk.training.drawn import Drawn
from aced_sdk.training.progress import Totals
from aced_sdk.training.step import Gradient
from benchmarks.machine import machine

_PER_SHARD = 10_000
_BATCH = 163_840


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tar-pairs", type=int, default=20_000)
    parser.add_argument("--pairs", type=int, nargs="+", default=[1_000_000, 16_000_000, 128_000_000])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None, help="where pools are generated")
    parser.add_argument("--points", type=int, default=10_000, help="random states that a stream is continued from")
    parser.add_argument("--open", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.open:
        sys.stdout.write(json.dumps(opened(arguments.open, arguments.repeats)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        os.environ["ACED_HOME"] = str(Path(folder) / "home")
        indexing_costs = indexed(Path(folder), arguments.tar_pairs, arguments.repeats)
        pools: list[dict[str, Any]] = []
        for pairs in arguments.pairs:
            pool = Path(folder) / f"pool-{pairs}"
            generate(pool, pairs)
            command = [sys.executable, "-m", "benchmarks.pool", "--open", str(pool)]
            command += ["--repeats", str(arguments.repeats)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            pools.append({"pairs": pairs, **json.loads(done.stdout)})
            for path in pool.iterdir():
                path.unlink()
    result = {
        "machine": machine("cpu"),
        "indexing": indexing_costs,
        "pools": pools,
        "events": logged(arguments.repeats),
        "points": continued(arguments.points),
    }
    sys.stdout.write(json.dumps(result, indent=1) + "\n")


def indexed(folder: Path, pairs: int, repeats: int) -> dict[str, Any]:
    """Microseconds of CPU per pair: the whole index, its parts, and a plain walk over the same headers."""
    path = folder / "shard.tar"
    dice = np.random.default_rng(0)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(pairs):
            members = {
                "jpg": dice.bytes(3000),
                "txt": b"a caption of a picture",
                "json": json.dumps({"url": f"https://example.org/{number}.jpg", "noisy": number % 7 == 0}).encode(),
            }
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{number:09d}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))

    class Unhashed:
        def update(self, _: bytes) -> None: ...

    def fast() -> None:
        with path.open("rb") as stream:
            if indexing._fast(stream, Unhashed()) is None:
                raise RuntimeError("the tar is not usual")

    def slow() -> None:
        with path.open("rb") as stream:
            indexing._exact(stream, path.stat().st_size)

    def hashed() -> None:
        with path.open("rb") as stream:
            hashlib.file_digest(stream, "sha256")

    parts: dict[str, Callable[[], Any]] = {
        "plain_walk": lambda: _plain_walk(path),
        "index_without_hash": fast,
        "hash": hashed,
        "whole_index": lambda: indexing.build_index(path),
        "exact_walk_of_unusual_tars": slow,
    }
    best = dict.fromkeys(parts, float("inf"))
    for _ in range(repeats):
        for name, run in parts.items():
            started = time.process_time()
            run()
            best[name] = min(best[name], time.process_time() - started)
    micro = {name: round(1e6 * seconds / pairs, 2) for name, seconds in best.items()}
    micro["ratio_to_plain_walk"] = round(best["index_without_hash"] / best["plain_walk"], 2)
    return {"pairs": pairs, "bytes_per_pair": path.stat().st_size // pairs, "microseconds_of_cpu_per_pair": micro}


def _plain_walk(path: Path) -> int:
    """Seek to each header, read it and parse its size; nothing is checked."""
    count = at = 0
    with path.open("rb") as stream:
        while True:
            stream.seek(at)
            header = stream.read(512)
            if not header[0]:
                return count
            at += 512 + (int(header[124:135], 8) + 511 & -512)
            count += 1


def generate(folder: Path, pairs: int) -> None:
    """Sparse tars, and an index beside each as if it had been built."""
    folder.mkdir()
    rows = np.arange(_PER_SHARD)
    member_ends = 3 * (rows + 1)
    offsets = (512 + 2048 * np.arange(3 * _PER_SHARD)).astype(np.uint64)
    columns = Columns(
        keys=[b"%09d" % row for row in rows.tolist()],
        member_ends=member_ends,
        offsets=offsets,
        sizes=np.full(3 * _PER_SHARD, 1500),
        kinds=np.tile(np.arange(3), _PER_SHARD),
        extensions=[b"jpg", b"txt", b"json"],
        noisy={row: row % 7 == 0 for row in rows.tolist()},
        problems={},
    )
    for number in range(pairs // _PER_SHARD):
        shard = folder / f"{number:06d}.tar"
        shard.touch()
        os.truncate(shard, int(offsets[-1]) + 2048)
        digest = hashlib.sha256(shard.name.encode()).hexdigest()
        beside(shard).write_bytes(columns.encode(shard.name, Identity.of(shard.stat()), digest))


def _private() -> int:
    """Resident bytes of this process that are not pages of files."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    return int(status["RssAnon"].split()[0]) * 1024


def opened(folder: Path, repeats: int) -> dict[str, Any]:
    """Open a pool and look up the rows of steps."""
    torch.set_num_threads(1)
    before = _private()
    open_seconds = []
    for _ in range(3):  # headers of just generated indexes may have to come from the disk at first
        started = time.perf_counter()
        pool = Pool([folder])
        open_seconds.append(round(time.perf_counter() - started, 3))
    open_bytes = _private() - before
    started = time.perf_counter()
    order = build_order(Data(shards=(str(folder),)), [r for _, r in pool.shard_rows()], pool.sources, _BATCH, 0)
    statistics, every = DrawStatistics(len(pool)), RowSet(len(pool))
    start_seconds = time.perf_counter() - started
    lanes, state = np.arange(order.lanes), order.start()
    each = _BATCH // order.lanes
    times: dict[str, list[float]] = {"rows_of_a_step": [], "shards_of_rows": [], "marks_of_1024": [], "count": []}
    for _ in range(repeats + 1):  # the first step maps the indexes
        marks = [time.perf_counter()]
        rows = order.rows(lanes, state, each).ravel()
        every(rows)
        marks.append(time.perf_counter())
        pool.locate(rows)
        marks.append(time.perf_counter())
        pool.noisy(rows[:: len(rows) // 1024])
        marks.append(time.perf_counter())
        statistics.update(rows[: _BATCH // 5])
        marks.append(time.perf_counter())
        state = order.advance(lanes, state, np.full(order.lanes, each))
        for values, (first, last) in zip(times.values(), pairwise(marks), strict=True):
            values.append(last - first)
    milliseconds = {name: [round(1e3 * value, 1) for value in values] for name, values in times.items()}
    return {
        "shards": len(pool.shards),
        "open_seconds": open_seconds,
        "open_megabytes": round(open_bytes / 1e6, 1),
        "order_and_statistics_seconds": round(start_seconds, 3),
        "megabytes_after_steps": round((_private() - before) / 1e6, 1),
        "step_milliseconds": milliseconds,
        "checkpoint_bytes_of_order_and_statistics": sum(
            tensor.numel() * tensor.element_size() for tensor in statistics.state_dict().values()
        )
        + state.nbytes,
    }


def logged(repeats: int) -> dict[str, Any]:
    """Milliseconds to count, describe and log a step with 163,840 candidates, and bytes of its log entries."""
    dice = torch.Generator().manual_seed(0)

    def embeddings() -> Embeddings:
        image, text = torch.nn.functional.normalize(torch.randn(2, _BATCH, 256, generator=dice), dim=2)
        return Embeddings(image, text, 10.0, -10.0)

    student, reference = embeddings(), embeddings()
    rows = torch.randperm(128_000_000, generator=dice)[:_BATCH]
    images, tokens = torch.zeros(_BATCH, 1, dtype=torch.uint8), torch.zeros(_BATCH, 1, dtype=torch.int64)
    super_batch, picked = SuperBatch(images, tokens, rows), torch.randperm(_BATCH, generator=dice)[:32_768]
    gradient = Gradient(1.0, {"sigmoid": 1.0}, student[picked[:4]])
    drawn = Drawn(super_batch, picked, super_batch[picked], student, reference, gradient, 0.0)
    selector = Joint(sub_batch=32_768, super_batch=_BATCH).build()
    unmarked = SimpleNamespace(knows_noisy=False)
    parts: Any = SimpleNamespace(pool=unmarked, selector=selector, statistics=DrawStatistics(128_000_000))
    times: dict[str, list[float]] = {"count": [], "describe": [], "write": []}
    with tempfile.TemporaryDirectory() as folder, JsonlWriter(Path(folder) / "events.jsonl") as writer:
        for number in range(repeats):
            marks = [time.perf_counter()]
            parts.statistics.update(rows[picked])
            marks.append(time.perf_counter())
            events = [
                drawn.selected(number, parts),
                drawn.student_step(Step(number, 1.0, 1e-3, 1.0, 1.0), Totals(step=number, trained=1, scored=1)),
            ]
            marks.append(time.perf_counter())
            for event in events:
                writer(event)
            marks.append(time.perf_counter())
            for values, (first, last) in zip(times.values(), pairwise(marks), strict=True):
                values.append(last - first)
        size = writer.path.stat().st_size // repeats
    milliseconds = {name: [round(1e3 * value, 2) for value in values] for name, values in times.items()}
    return {"candidates": _BATCH, "milliseconds": milliseconds, "log_bytes_per_step": size}


class _Numbers:
    """A source without pictures, read by several threads; one row in twenty is unusable."""

    def __init__(self, workers: int) -> None:
        self.seen, self.skipped = 0, Counter[str]()
        self._threads = ThreadPoolExecutor(workers)

    def usable(self, block: slice) -> Any:
        return np.ones(block.stop - block.start, dtype=np.bool_)

    def fetch(self, rows: Any) -> SuperBatch:
        good = list(self._threads.map(lambda row: row % 20 != 7, rows.tolist()))
        kept = torch.from_numpy(rows[np.array(good, dtype=np.bool_)])
        return SuperBatch(kept[:, None], kept[:, None], kept)

    def close(self) -> None:
        self._threads.shutdown()


def continued(points: int) -> dict[str, Any]:
    """Continue streams from random states with a random number of ranks and threads; count differing super-batches.

    The expected super-batches are read row by row, lane by lane, in plain Python.
    """
    size, steps, dice = 64, 150, np.random.default_rng(0)
    shards = [range(start, start + 61) for start in range(0, 61 * 90, 61)]
    halves = [shards[:40], shards[40:]]
    orders: dict[str, FullOrder | WindowOrder] = {
        "full": FullOrder([range(5490)], 16, 1),
        "full, weights 1 to 3": FullOrder([range(2440), range(2440, 5490)], 16, 2, (1, 3)),
        "windows": WindowOrder([shards], 16, 3, 4),
        "windows, weights 2 to 1": WindowOrder(halves, 16, 4, 2, (2, 1)),
    }
    expected = {name: _plainly(order, size, steps) for name, order in orders.items()}
    wrong = 0
    for _ in range(points):
        name = str(dice.choice(list(orders)))
        step, world, workers = int(dice.integers(steps - 1)), 2 ** int(dice.integers(5)), int(dice.integers(1, 9))
        batches, states = expected[name]
        order, source = orders[name], _Numbers(workers)
        found = np.empty((size // 16, 16), dtype=np.int64)
        for rank in range(world):
            lanes = own_lanes(16, rank, world)
            stream = SuperBatches(source, order, size, states[step], RowSet(5490), lanes)
            batch, state = next(stream)
            stream.close()
            found[:, lanes] = batch.rows.numpy().reshape(-1, len(lanes))
            wrong += not np.array_equal(state[lanes], states[step + 1][lanes])
        source.close()
        wrong += not np.array_equal(found, batches[step])
    first = orders["full"]
    each = [first.rows(np.array([lane]), first.start()[[lane]], len(range(lane, 5490, 16)))[0] for lane in range(16)]
    usable = [rows[rows % 20 != 7] for rows in each]
    given = np.concatenate(expected["full"][0])
    lost = sum(not np.array_equal(given[: len(rows), lane], rows) for lane, rows in enumerate(usable))
    once = np.array_equal(np.sort(np.concatenate(usable)), np.flatnonzero(np.arange(5490) % 20 != 7))
    return {"points": points, "wrong": wrong, "lanes_with_lost_pairs": lost, "each_pair_once_per_epoch": once}


def _plainly(order: FullOrder | WindowOrder, size: int, steps: int) -> tuple[list[Any], list[Any]]:
    """Super-batches [size / lanes, lanes] and the state before each."""
    state, one = order.start(), np.ones(1, dtype=np.int64)
    batches, states = [], [state.copy()]
    for _ in range(steps):
        batch = np.empty((size // order.lanes, order.lanes), dtype=np.int64)
        for lane in range(order.lanes):
            for place in range(len(batch)):
                usable = False
                while not usable:
                    number = np.array([lane])
                    batch[place, lane] = order.rows(number, state[number], 1)[0, 0]
                    state[number] = order.advance(number, state[number], one)
                    usable = batch[place, lane] % 20 != 7
        batches.append(batch)
        states.append(state.copy())
    return batches, states


if __name__ == "__main__":
    main()
