# SPDX-License-Identifier: Apache-2.0
"""The streaming joint sampler beside the plain N x N form, on the same embeddings and the same noise.

    python -m benchmarks.selection [--device cuda] [--sizes 5120 10240] [--streaming-only] [--output FILE]

Each form runs in a process of its own, so that its peak memory is its own: on a CPU the growth of the resident set, on
a GPU the allocator's peak, both beyond the embeddings and the noise. Seconds are the best of `--repeats` runs.
The truth for the picks is the N x N form in float64: float32 may swap two items whose keys differ in the last bits.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aced_sdk.curation import Embeddings, gumbel_noise, select_joint

FORMS = ("streaming", "matrix", "matrix_float64")


def square_matrix(student: Embeddings, reference: Embeddings, size: int, gumbel: Tensor) -> Tensor:
    """Learnability with the sigmoid loss as the method states it: all N x N pair losses first, then the draws."""

    def losses(model: Embeddings) -> Tensor:
        logits = model.scale * model.image @ model.text.T
        logits += model.bias
        pairs = F.softplus(logits)
        pairs.diagonal().copy_(F.softplus(-logits.diagonal()))
        return pairs

    scores = losses(student)
    scores -= losses(reference)
    weights = scores.diagonal().clone()
    chunks = []
    for noise in gumbel:
        rows = (weights + noise).topk(size // len(gumbel)).indices
        weights += scores[rows].sum(dim=0) + scores[:, rows].sum(dim=1)
        weights[rows] = -torch.inf
        chunks.append(rows)
    return torch.cat(chunks)


def embeddings(items: int, dim: int, seed: int, scale: float, device: str) -> Embeddings:
    """Pairs that match more or less, as float32 [N, D]."""
    noise = torch.Generator().manual_seed(seed)
    image, text = torch.randn(2, items, dim, generator=noise)
    image, text = (F.normalize(part, dim=1).to(device) for part in (image, image + text))
    return Embeddings(image, text, scale, -10.0)


def peak_bytes(device: str) -> int:
    """Most memory held so far: the allocator's on a GPU, the process's on a CPU."""
    if device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(form: str, items: int, dim: int, chunks: int, repeats: int, device: str) -> dict[str, Any]:
    """Time, peak memory and picks of one form."""
    student, reference = embeddings(items, dim, 0, 12.0, device), embeddings(items, dim, 1, 40.0, device)
    gumbel = gumbel_noise(chunks, items, torch.Generator().manual_seed(2)).float().to(device)
    size = items // 5
    if form == "matrix_float64":
        student, reference = (replace(m, image=m.image.double(), text=m.text.double()) for m in (student, reference))

    def draw() -> Tensor:
        if form != "streaming":
            return square_matrix(student, reference, size, gumbel)
        return select_joint(student, reference, size=size, num_chunks=chunks, gumbel=gumbel)

    # The first matrix product loads the library behind it; that is neither form's memory or time.
    float((student.image[:64] @ reference.image[:64].T).sum())
    held = peak_bytes(device)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        rows = draw().tolist()
        seconds.append(time.perf_counter() - start)
    return {"seconds": min(seconds), "peak_extra_mib": (peak_bytes(device) - held) / 2**20, "rows": rows}


def compare(arguments: argparse.Namespace, items: int) -> dict[str, Any]:
    """The forms at one size of the super-batch."""
    forms = FORMS[:1] if arguments.streaming_only else FORMS
    results = {}
    for form in forms:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            repeats = 1 if form == "matrix_float64" else arguments.repeats
            job = (form, items, arguments.dim, arguments.chunks, repeats, arguments.device)
            results[form] = pool.submit(measure, *job).result()
    rows = {form: result.pop("rows") for form, result in results.items()}
    row: dict[str, Any] = {"super_batch": items, "sub_batch": items // 5, **results}
    if not arguments.streaming_only:
        streaming, matrix = results["streaming"], results["matrix"]
        row["time_ratio_matrix_to_streaming"] = matrix["seconds"] / streaming["seconds"]
        row["memory_ratio_matrix_to_streaming"] = matrix["peak_extra_mib"] / max(streaming["peak_extra_mib"], 1e-9)
        row["identical_indices"] = rows["streaming"] == rows["matrix_float64"]
        row["identical_indices_of_the_float32_matrix"] = rows["matrix"] == rows["matrix_float64"]
    return row


def processor() -> str:
    """The CPU's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description="streaming joint selection beside the N x N form")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--sizes", type=int, nargs="+", default=[5120, 10240], help="super-batch sizes N; b = N / 5")
    parser.add_argument("--dim", type=int, default=256, help="embedding dimension")
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--streaming-only", action="store_true", help="leave the N x N form out (107 GB at N = 163840)")
    parser.add_argument("--output", type=Path, help="write the JSON object to this file too")
    arguments = parser.parse_args()
    result = {
        "benchmark": "selection",
        "score": "learnability",
        "loss": "sigmoid",
        "dim": arguments.dim,
        "chunks": arguments.chunks,
        "results": [compare(arguments, items) for items in arguments.sizes],
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu",
        "cpu": processor(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    text = json.dumps(result, indent=2)
    if arguments.output is not None:
        arguments.output.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
