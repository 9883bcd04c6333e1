# SPDX-License-Identifier: Apache-2.0
"""The streaming joint sampler beside two N x N forms, on the same embeddings and the same noise.

    python -m benchmarks.selection [--device cuda] [--sizes 5120 20480] [--streaming-only] [--paper] [--output FILE]

`algorithm_1` is JEST's Algorithm 1 as its public ports write it; `matrix` builds the same N x N scores and then reads
only the rows and columns that a chunk needs. Each form runs in a process of its own, so that its peak memory is its
own: on a CPU the growth of the resident set (Linux), on a GPU the allocator's peak, both beyond embeddings and noise.
Seconds are the best of `--repeats` runs, by the wall clock and as processor time of all threads (the one to trust when
the machine is busy). The truth for the picks is the N x N form in float64: float32 may swap two items whose keys differ
in the last bits.

`paper_scale` extrapolates to B = 163,840, b = 32,768, d = 768 by the FLOP rate at the largest size; `--paper` runs that
size instead of only extrapolating to it (2.5 GB of memory, minutes on a CPU).
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aced_sdk.curation import Embeddings, gumbel_noise, select_joint
from benchmarks.machine import emit, machine

FORMS = ("streaming", "matrix", "algorithm_1", "matrix_float64")
# ACED, section 4: super-batch, sub-batch; image and text embeddings of B/32, and its MACs for one pair at 256 px.
PAPER_SUPER_BATCH, PAPER_SUB_BATCH, PAPER_DIM, PAPER_MACS = 163_840, 32_768, 768, 7.14e9


@dataclass(frozen=True)
class Job:
    """What one process measures."""

    form: str
    items: int
    size: int
    dim: int
    chunks: int
    repeats: int
    device: str
    threads: int


def pair_losses(model: Embeddings, rows_K: Tensor) -> Tensor:
    """The sigmoid loss of some images with all texts, [K, N]."""
    logits = model.scale * model.image[rows_K] @ model.text.T
    logits += model.bias
    logits[torch.arange(len(rows_K), device=rows_K.device), rows_K] *= -1
    return F.softplus(logits)


def score_matrix(student: Embeddings, reference: Embeddings) -> Tensor:
    """Learnability of all pairs, [N, N]; built some rows at a time, which spares memory."""
    scores = student.image.new_empty(len(student), len(student))
    for rows in torch.split(torch.arange(len(student), device=scores.device), 1024):
        scores[rows] = pair_losses(student, rows) - pair_losses(reference, rows)
    return scores


def algorithm_1(student: Embeddings, reference: Embeddings, size: int, gumbel: Tensor) -> Tensor:
    """Learnability by JEST's Algorithm 1 (arXiv 2406.17711) to the letter: each chunk goes over the whole matrix."""
    scores = score_matrix(student, reference)
    own, each = scores.diagonal(), size // len(gumbel)
    picked = (own + gumbel[0]).topk(each).indices
    for noise in gumbel[1:]:
        is_sampled = torch.zeros_like(own)
        is_sampled[picked] = 1
        both = (scores * is_sampled[:, None]).sum(dim=0) + (scores * is_sampled[None, :]).sum(dim=1)
        logits = own + both - 1e8 * is_sampled
        picked = torch.cat([picked, (logits + noise).topk(each).indices])
    return picked


def matrix(student: Embeddings, reference: Embeddings, size: int, gumbel: Tensor) -> Tensor:
    """The same with a running sum: of the N x N scores, a chunk reads its own rows and columns alone."""
    scores = score_matrix(student, reference)
    weights = scores.diagonal().clone()
    chunks = []
    for noise in gumbel:
        rows = (weights + noise).topk(size // len(gumbel)).indices
        weights += scores[rows].sum(dim=0) + scores[:, rows].sum(dim=1)
        weights[rows] = -torch.inf
        chunks.append(rows)
    return torch.cat(chunks)


def draw(form: str, student: Embeddings, reference: Embeddings, size: int, gumbel: Tensor) -> Tensor:
    """The picks of one form."""
    if form == "streaming":
        return select_joint(student, reference, size=size, num_chunks=len(gumbel), gumbel=gumbel)
    return (algorithm_1 if form == "algorithm_1" else matrix)(student, reference, size, gumbel)


def embeddings(items: int, dim: int, seed: int, scale: float, device: str) -> Embeddings:
    """Pairs that match more or less, as float32 [N, D]."""
    noise = torch.Generator().manual_seed(seed)
    image, text = torch.randn(2, items, dim, generator=noise)
    image, text = (F.normalize(part, dim=1).to(device) for part in (image, image + text))
    return Embeddings(image, text, scale, -10.0)


def held_bytes(device: str) -> int:
    """Memory held now, from where `peak_bytes` counts anew."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return int(torch.cuda.memory_allocated())
    ctypes.CDLL(None).malloc_trim(0)  # what was freed must not hide what is asked for next
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak_bytes(device: str) -> int:
    """Most memory held since: the allocator's on a GPU, the process's on a CPU."""
    return int(torch.cuda.max_memory_allocated()) if device == "cuda" else _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def measure(job: Job) -> dict[str, Any]:
    """Time, peak memory and picks of one form."""
    torch.set_num_threads(job.threads)
    student = embeddings(job.items, job.dim, 0, 12.0, job.device)
    reference = embeddings(job.items, job.dim, 1, 40.0, job.device)
    gumbel = gumbel_noise(job.chunks, job.items, torch.Generator().manual_seed(2)).float().to(job.device)
    if job.form == "matrix_float64":
        student, reference = (replace(m, image=m.image.double(), text=m.text.double()) for m in (student, reference))

    # A small draw first loads the libraries behind it; that is neither form's memory or time.
    few = torch.arange(16 * job.chunks, device=job.device)
    draw(job.form, student[few], reference[few], len(few) // 2, gumbel[:, few])
    held = held_bytes(job.device)
    wall, processor = [], []
    for _ in range(job.repeats):
        starts = time.perf_counter(), time.process_time()
        rows = draw(job.form, student, reference, job.size, gumbel).tolist()
        wall.append(time.perf_counter() - starts[0])
        processor.append(time.process_time() - starts[1])
    return {
        "seconds": min(wall),
        "cpu_seconds": min(processor),
        "peak_extra_mib": (peak_bytes(job.device) - held) / 2**20,
        "rows": rows,
    }


def alone(job: Job) -> dict[str, Any]:
    """`measure` in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, job).result()


def compare(job: Job, forms: tuple[str, ...]) -> dict[str, Any]:
    """The forms at one size of the super-batch."""
    results = {form: alone(replace(job, form=form, repeats=_repeats(job, form))) for form in forms}
    rows = {form: result.pop("rows") for form, result in results.items()}
    report: dict[str, Any] = {"super_batch": job.items, "sub_batch": job.size, **results}
    streaming = results["streaming"]
    for form in ("algorithm_1", "matrix"):
        if form in results:
            report[f"{form}_over_streaming"] = {
                "seconds": results[form]["seconds"] / streaming["seconds"],
                "cpu_seconds": results[form]["cpu_seconds"] / streaming["cpu_seconds"],
                "memory": results[form]["peak_extra_mib"] / max(streaming["peak_extra_mib"], 1e-9),
            }
    if "matrix_float64" in results:
        truth = rows.pop("matrix_float64")
        report["identical_indices"] = rows["streaming"] == truth
        report["identical_indices_of"] = {form: picked == truth for form, picked in rows.items()}
    return report


def _repeats(job: Job, form: str) -> int:
    return 1 if form == "matrix_float64" else job.repeats


def flops(items: int, size: int, dim: int) -> int:
    """Of a streaming draw: two models, two directions, a multiplication and an addition each."""
    return 8 * items * size * dim


def paper_scale(largest: dict[str, Any], job: Job, measured: bool) -> dict[str, Any]:
    """The paper's super-batch by arithmetic, and by the clock where asked."""
    cost = flops(PAPER_SUPER_BATCH, PAPER_SUB_BATCH, PAPER_DIM)
    rate = flops(largest["super_batch"], largest["sub_batch"], job.dim) / largest["streaming"]["seconds"]
    training = 3 * 2 * PAPER_MACS * PAPER_SUB_BATCH
    scoring = 2 * PAPER_MACS * PAPER_SUPER_BATCH
    report: dict[str, Any] = {
        "super_batch": PAPER_SUPER_BATCH,
        "sub_batch": PAPER_SUB_BATCH,
        "dim": PAPER_DIM,
        "selection_flops": cost,
        "selection_flops_are": "8 B b d",
        "measured_flops_per_second": rate,
        "extrapolated_seconds": cost / rate,
        "extrapolated_from_super_batch": largest["super_batch"],
        "step_flops": training + scoring,
        "step_flops_are": "B/32 at 256 px: 3 x 2 x 7.14e9 MACs x b for training, 2 x 7.14e9 MACs x B for scoring",
        "share_of_step": cost / (training + scoring),
        "share_of_training_alone": cost / training,
        "share_of_step_with_scoring_at_0.28": cost / (training + 0.28 * scoring),
        "shares_are": "of FLOPs: computed, not timed; selection multiplies in float32, towers may in 16 bits",
    }
    # The whole width with few picks: what it holds does not grow with b.
    wide = replace(job, form="streaming", items=PAPER_SUPER_BATCH, size=64 * job.chunks, dim=64, repeats=1)
    report["fits"] = {"dim": wide.dim, "sub_batch": wide.size, **alone(wide)}
    if measured:
        whole = replace(wide, size=PAPER_SUB_BATCH, dim=PAPER_DIM)
        report["measured"] = alone(whole)
    for part in ("fits", "measured"):
        report.get(part, {}).pop("rows", None)
    return report


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description="streaming joint selection beside N x N forms")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--sizes", type=int, nargs="+", default=[5120, 20480], help="super-batch sizes N; b = N / 5")
    parser.add_argument("--dim", type=int, default=512, help="embedding dimension")
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of each form")
    parser.add_argument("--streaming-only", action="store_true", help="leave the N x N forms out")
    parser.add_argument("--paper", action="store_true", help="run the paper's size too")
    parser.add_argument("--output", type=Path, help="write the JSON object to this file too")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    torch.set_num_threads(arguments.threads)
    job = Job("", 0, 0, arguments.dim, arguments.chunks, arguments.repeats, arguments.device, arguments.threads)
    forms = FORMS[:1] if arguments.streaming_only else FORMS
    results = [compare(replace(job, items=items, size=items // 5), forms) for items in sorted(arguments.sizes)]
    result = {
        "benchmark": "selection",
        "score": "learnability",
        "loss": "sigmoid",
        "dim": arguments.dim,
        "chunks": arguments.chunks,
        "results": results,
        "paper_scale": paper_scale(results[-1], job, arguments.paper),
        **machine(arguments.device),
        "load_average_before": load,
    }
    emit(result, arguments.output)


if __name__ == "__main__":
    main()
