# SPDX-License-Identifier: Apache-2.0
"""Which runs are made, in which order, and what is said of them.

1. *tune*: in a world of its own every row tries its three settings; the validation split chooses.
2. *main*: every row, in one world per seed, at equal trained examples; the test tasks are looked at once.
3. *compute*: rows that score nothing, and ACED that scores at half the side (and trains half of each sub-batch at it),
   run on until they have cost what ACED costs (3 + 1/(1-f) forward passes a trained example, a backward pass counted
   as two).
4. *forms*: curation scored by the sigmoid and by the softmax loss, with a reference trained with either.
5. *sweeps*: length, trusted pairs, noise, f, reference, pool, gain, chunks; around the chosen settings, on fewer seeds.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from itertools import pairwise
from multiprocessing import get_context
from statistics import mean, stdev
from typing import Any

from aced_sdk.config import LossForm
from benchmarks.ordering.rows import CHOICES, ROWS, Job, Knobs, run_job
from benchmarks.ordering.world import Material, WorldConfig, get_material, make_world

TUNING_SEED = 1000
Progress = Callable[[str, int, int], None]
_material: Material | None = None


def _begin() -> None:
    """A worker's own: one compute thread, and the material read once."""
    import torch

    torch.set_num_threads(1)
    global _material  # the worker's own
    _material = get_material(lambda *_: None)


def _work(job: Job) -> dict[str, Any]:
    if _material is None:
        raise RuntimeError("a worker runs jobs only after it has begun")
    return run_job(job, _material)


def _deal(config: WorldConfig) -> dict[str, float | None]:
    if _material is None:
        raise RuntimeError("a worker deals worlds only after it has begun")
    return make_world(config, _material).auc


class Workers:
    """Processes with one compute thread each, side by side."""

    def __init__(self, processes: int, progress: Progress) -> None:
        os.environ["OMP_NUM_THREADS"] = "1"  # read by the children as they start
        self._pool = ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=_begin)
        self._progress = progress

    def deal(self, worlds: Iterable[WorldConfig]) -> None:
        """Make every world once."""
        distinct = sorted(set(worlds), key=lambda world: world.name())
        for done, future in enumerate(as_completed([self._pool.submit(_deal, world) for world in distinct]), start=1):
            future.result()
            self._progress("deal worlds", done, len(distinct))

    def run(self, what: str, jobs: Sequence[Job]) -> dict[Job, dict[str, Any]]:
        """All jobs' results; the longest go first."""
        order = sorted(set(jobs), key=lambda job: -job.cost() * job.steps)
        futures = {self._pool.submit(_work, job): job for job in order}
        results = {}
        for done, future in enumerate(as_completed(futures), start=1):
            results[futures[future]] = future.result()
            self._progress(what, done, len(order))
        return {job: results[job] for job in jobs}

    def close(self) -> None:
        """Let go of what has not begun."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def tune(workers: Workers, steps: int, world: WorldConfig) -> tuple[dict[str, Knobs], dict[str, Any]]:
    """Each row's best setting on the validation split, and what was tried."""
    jobs = {
        row: [Job(row, world, steps, "validation", Knobs.of(choice)) for choice in choices]
        for row, choices in CHOICES.items()
    }
    workers.deal([world])
    results = workers.run("tune", [job for tried in jobs.values() for job in tried])
    chosen: dict[str, Knobs] = {}
    told: dict[str, Any] = {}
    for row, tried in jobs.items():
        scores = [results[job]["figures"]["score"] for job in tried]
        best = max(range(len(tried)), key=scores.__getitem__)
        chosen[row] = tried[best].knobs
        told[row] = {
            "tried": [dict(choice) | {"score": score} for choice, score in zip(CHOICES[row], scores, strict=True)],
            "chosen": dict(CHOICES[row][best]),
        }
    return chosen, told


def main_jobs(chosen: Mapping[str, Knobs], steps: int, worlds: Sequence[WorldConfig]) -> dict[str, list[Job]]:
    """Every row in every world."""
    return {row: [Job(row, world, steps, knobs=chosen[row]) for world in worlds] for row in ROWS}


def compute_jobs(chosen: Mapping[str, Knobs], steps: int, worlds: Sequence[WorldConfig]) -> dict[str, list[Job]]:
    """Rows that score nothing or at half the side, for as many steps as cost what ACED's cost."""
    aced = Job("aced", worlds[0], steps, knobs=chosen["aced"]).cost()
    rows = ("iid", "softmax_kd", "i_acid", "i_acid_kd", "static", "static_kd", "trusted", "aced_cheap")
    known = {**chosen, "aced_cheap": chosen["aced"]}
    longer = {row: round(steps * aced / Job(row, worlds[0], steps, knobs=known[row]).cost()) for row in rows}
    return {row: [Job(row, world, longer[row], knobs=known[row]) for world in worlds] for row in rows}


FORM_ROWS = ("i_acid", "h_acid", "aced")


def form_jobs(
    chosen: Mapping[str, Knobs], steps: int, worlds: Sequence[WorldConfig], methods: Sequence[str] = FORM_ROWS
) -> dict[str, dict[str, dict[str, list[Job]]]]:
    """Loss of the reference's training to form of the scores to row to jobs."""
    losses: tuple[LossForm, ...] = ("sigmoid", "softmax")
    return {
        trained: {
            form: {
                row: [
                    Job(row, replace(world, reference_loss=trained), steps, knobs=chosen[row], form=form)
                    for world in worlds
                ]
                for row in methods
            }
            for form in losses
        }
        for trained in losses
    }


def sweep_jobs(
    chosen: Mapping[str, Knobs], steps: int, worlds: Sequence[WorldConfig]
) -> dict[str, dict[str, dict[str, list[Job]]]]:
    """Sweep to value to row to jobs."""

    def jobs(row: str, length: int = steps, world: Mapping[str, Any] | None = None, **changes: Any) -> list[Job]:
        reference = changes.pop("reference", "large")
        knobs = replace(chosen[row], **changes)
        return [Job(row, replace(w, **(world or {})), length, knobs=knobs, reference=reference) for w in worlds]

    def few(share: float) -> dict[str, float]:
        """That share of all trusted pairs; the reference learns from no more than these."""
        return {"trusted_emoji": 0.8 * share, "trusted_pool": 0.15 * share}

    strong = ("aced", "i_acid_kd", "static_kd", "trusted")
    return {
        "length": {str(n * steps): {row: jobs(row, n * steps) for row in strong} for n in (1, 4)},
        "trusted": {f"{share:g}": {row: jobs(row, world=few(share)) for row in strong} for share in (0.25, 0.5, 1)},
        "few_trusted_and_long": {str(4 * steps): {row: jobs(row, 4 * steps, few(0.25)) for row in strong}},
        "noise": {
            str(n): {row: jobs(row, world={"noise": n}) for row in ("iid", "softmax_kd", "aced", "static_kd")}
            for n in (0.0, 0.3, 0.5)
        },
        "f": {
            "0": {"aced": jobs("softmax_kd")},  # nothing is left out: the same as distillation alone
            **{str(f): {"aced": jobs("aced", f=f)} for f in (0.5, 0.8, 0.9)},
        },
        "reference": {
            size: {row: jobs(row, reference=size) for row in ("softmax_kd", "i_acid", "aced")}
            for size in ("small", "equal", "large")
        },
        "gain": {str(g): {"aced": jobs("aced", gain=g)} for g in (0.1, 1.0, 10.0)},
        "pool": {str(n): {row: jobs(row, world={"pool": n}) for row in ("aced", "static_kd")} for n in (3000, 12000)},
        "chunks": {
            "independent": {"h_acid": jobs("h_acid_independent", gain=chosen["h_acid"].gain)},
            **{str(n): {"h_acid": jobs("h_acid", chunks=n)} for n in (2, 16, 64)},
        },
    }


def summary(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation (of a sample; 0 for one seed) of each figure, in per cent, and what it cost."""
    told: dict[str, Any] = {}
    for name in results[0]["figures"]:
        values = [100 * result["figures"][name] for result in results]
        told[name] = {"mean": mean(values), "std": stdev(values) if len(values) > 1 else 0.0, "values": values}
    for name in ("trained", "scored"):
        told[name] = results[0][name]
    for name in ("seconds", "noisy_selected", "unique_coverage"):
        values = [result[name] for result in results if result[name] is not None]
        told[name] = mean(values) if values else None
    return told


def claims(
    variants: Mapping[str, Mapping[str, Any]], curves: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]
) -> dict[str, Any]:
    """What the paper leads one to expect, each with its figures, true or not."""

    def score(row: str) -> float:
        return float(variants[row]["score"]["mean"])

    def lead(row: str, over: str) -> dict[str, Any]:
        pairs = zip(variants[row]["score"]["values"], variants[over]["score"]["values"], strict=True)
        gaps = [ours - theirs for ours, theirs in pairs]
        spread = (variants[row]["score"]["std"] ** 2 + variants[over]["score"]["std"] ** 2) ** 0.5
        return {
            "points": mean(gaps),
            "std_of_paired_difference": stdev(gaps) if len(gaps) > 1 else None,
            "over_two_deviations": mean(gaps) > 2 * spread,
            "seeds_won": sum(gap > 0 for gap in gaps),
        }

    chain = ("iid", "softmax_kd", "i_acid", "h_acid", "aced")
    quarter = mean(100 * curve[0]["score"] for curve in curves["aced"])  # the first of four points
    return {
        "order": {f"{low} < {high}": lead(high, low) for low, high in pairwise(chain)},
        "aced_over_iid_ratio": score("aced") / score("iid"),
        "aced_over_softmax_kd": lead("aced", "softmax_kd"),
        "aced_over_static_kd": lead("aced", "static_kd"),
        "aced_over_trusted": lead("aced", "trusted"),
        "aced_over_i_acid_kd": lead("aced", "i_acid_kd"),
        "joint_over_independent": lead("h_acid", "h_acid_independent"),
        "aced_at_a_quarter_of_the_steps": {"score": quarter, "iid_at_the_end": score("iid")},
    }
