# SPDX-License-Identifier: Apache-2.0
"""The example service under load, on loopback: requests a second, latencies, errors, and memory over a long run.

    python -m benchmarks.service [FOLDER] [--clients 1 8 64] [--seconds 20] [--soak 100000] [--output FILE]

Two processes of `examples.service` serve the same export, one that batches concurrent requests and one that takes them
one at a time (`--max-batch 1`). They take turns at each number of clients, `--rounds` times, so that whatever else the
machine does falls on both; a figure is the median of its rounds. Each client keeps a connection and asks again as
soon as it is answered. The clients live on the same machine and take their share of its cores. The soak sends its
requests to the batching service from eight clients and reads the service's resident memory before, after, and at every
tenth; the pages that a runtime reserves on first use are in the first of these, so growth is counted from there.

Without a FOLDER it exports the image tower of a student with random weights (`--student`): they do not change speed.
"""

from __future__ import annotations

import argparse
import http.client
import io
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import aced_sdk as aced
import export
from aced_sdk.towers import build, save
from benchmarks.machine import emit, machine
from examples.service.load import load

ROOT = Path(__file__).resolve().parents[1]
HOST = "127.0.0.1"
START_S = 120
SOAK_CLIENTS = 8
STUDENTS: dict[str, str | dict[str, Any]] = {
    "b32": "ViT-B-32",
    "tiny": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16},
        "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    },
}


def exported(shape: str, folder: Path, precision: str) -> Path:
    """The image tower of a student of this shape with random weights, as ONNX."""
    student = save(build(aced.Student(architecture=STUDENTS[shape]), seed=0), folder / "student")
    export.to_onnx(student, folder / "onnx", parts=("vision",), precisions=(precision,), measure=False)  # type: ignore[arg-type]
    return folder / "onnx"


def picture(width: int, height: int) -> bytes:
    """A JPEG of smooth noise."""
    coarse = np.random.default_rng(0).integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(stream, "jpeg", quality=90)
    return stream.getvalue()


@contextmanager
def serving(folder: Path, precision: str, max_batch: int, options: list[str]) -> Iterator[tuple[int, int]]:
    """Port and process number of a service, which has answered /health."""
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "examples.service", str(folder), "--port", str(port), "--precision", precision]
    command += ["--max-batch", str(max_batch), *options]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        try:
            end = time.monotonic() + START_S
            while not healthy(port):
                if process.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    raise RuntimeError(f"the service did not start:\n{log.read().decode()[-3000:]}")
                time.sleep(0.1)
            yield port, process.pid
        finally:
            process.terminate()
            process.wait(30)


def healthy(port: int) -> bool:
    """Whether the service answers."""
    connection = http.client.HTTPConnection(HOST, port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def resident_mib(process: int) -> float:
    """Resident memory of a process (Linux)."""
    status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    kib = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:"))
    return round(kib / 1024, 1)


def under_load(ports: dict[str, int], body: bytes, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Both services at each number of clients: medians over the rounds, errors summed."""
    rows = []
    for clients in arguments.clients:
        rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in ports}
        for _ in range(arguments.rounds):
            for name, port in ports.items():
                rounds[name].append(load(HOST, port, body, clients, seconds=arguments.seconds))
        row: dict[str, Any] = {"clients": clients}
        for name, figures in rounds.items():
            keys = ("requests_per_second", "p50_ms", "p99_ms")
            row[name] = {key: statistics.median(one[key] for one in figures) for key in keys}
            row[name] |= {key: sum(one[key] for one in figures) for key in ("requests", "errors")}
        row["batched_over_one_at_a_time"] = round(
            row["batched"]["requests_per_second"] / row["one_at_a_time"]["requests_per_second"], 2
        )
        rows.append(row)
    return rows


def soak(port: int, process: int, body: bytes, requests: int) -> dict[str, Any]:
    """Memory of the service over many requests."""
    start = time.perf_counter()
    memory, errors, done = [resident_mib(process)], 0, 0
    for tenth in range(1, 11):
        part = requests * tenth // 10 - done
        if part:
            errors += load(HOST, port, body, min(SOAK_CLIENTS, part), requests=part)["errors"]
            done += part
        memory.append(resident_mib(process))
    return {
        "requests": done,
        "clients": SOAK_CLIENTS,
        "errors": errors,
        "seconds": round(time.perf_counter() - start, 1),
        "resident_mib": memory,
        "growth_mib_after_the_first_tenth": round(memory[-1] - memory[1], 1),
    }


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description="the example service under load")
    parser.add_argument("folder", type=Path, nargs="?", help="a folder that export.to_onnx wrote, with a vision graph")
    parser.add_argument("--student", choices=tuple(STUDENTS), default="b32", help="the shape, where no folder is named")
    parser.add_argument("--precision", default="fp32", help="fp32, fp16 or int8")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--seconds", type=float, default=20, help="of each turn")
    parser.add_argument("--rounds", type=int, default=3, help="turns at each number of clients")
    parser.add_argument("--soak", type=int, default=0, help="requests of the long run; 0: none")
    parser.add_argument("--max-batch", type=int, default=32, help="of the batching service")
    parser.add_argument("--max-wait-ms", type=float, help="of the batching service; its own default if left out")
    parser.add_argument("--threads", type=int, help="of onnxruntime; its own choice if left out")
    parser.add_argument("--picture", type=int, nargs=2, default=[640, 480], help="width and height of the JPEG")
    parser.add_argument("--output", type=Path, help="write the JSON object to this file too")
    arguments = parser.parse_args()
    before = os.getloadavg()[0]
    body = picture(*arguments.picture)
    threads = [] if arguments.threads is None else ["--threads", str(arguments.threads)]
    wait = [] if arguments.max_wait_ms is None else ["--max-wait-ms", str(arguments.max_wait_ms)]
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder = arguments.folder or exported(arguments.student, scratch, arguments.precision)
        sizes = {"batched": (arguments.max_batch, [*threads, *wait]), "one_at_a_time": (1, threads)}
        services = {
            name: stack.enter_context(serving(folder, arguments.precision, size, options))
            for name, (size, options) in sizes.items()
        }
        for port, _ in services.values():
            load(HOST, port, body, 2, requests=8)  # first requests allocate
        rows = under_load({name: port for name, (port, _) in services.items()}, body, arguments)
        long_run = soak(*services["batched"], body, arguments.soak) if arguments.soak else None
    result = {
        "benchmark": "service",
        "model": str(arguments.folder.name) if arguments.folder else arguments.student,
        "precision": arguments.precision,
        "max_batch": arguments.max_batch,
        "picture": {"width": arguments.picture[0], "height": arguments.picture[1], "bytes": len(body)},
        "seconds": arguments.seconds,
        "rounds": arguments.rounds,
        "load": rows,
        "soak": long_run,
        **machine("cpu"),
        "onnxruntime": version("onnxruntime"),
        "threads": arguments.threads or "onnxruntime's choice",
        "cores": os.cpu_count(),
        "load_average_before": before,
    }
    emit(result, arguments.output)


if __name__ == "__main__":
    main()
