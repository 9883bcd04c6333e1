# SPDX-License-Identifier: Apache-2.0
"""Does ACED order as published, and against which simple opponents does it hold?

    python -m benchmarks.ordering [--seeds 5] [--steps 600] [--stages main compute forms sweeps] [--output FILE]

Finished runs are kept in the cache home, so that a stopped call goes on. One JSON object is printed; figures are per
cent, chance is about 0.3 on seen concepts, 3 on unseen ones and their retrieval, 1.5 on the stamps.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from aced_sdk.files import write_json
from aced_sdk.reporting.run_bar import RunBar
from benchmarks.machine import emit, machine
from benchmarks.ordering.protocol import (
    FORM_ROWS,
    TUNING_SEED,
    Workers,
    claims,
    compute_jobs,
    form_jobs,
    main_jobs,
    summary,
    sweep_jobs,
    tune,
)
from benchmarks.ordering.rows import SUB_BATCH, Job, Knobs
from benchmarks.ordering.world import STUDENT, WorldConfig, get_material

STAGES = ("main", "compute", "forms", "sweeps")


def main() -> None:
    """Run what is asked for, writing the file anew after every stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=600, help=f"of {SUB_BATCH} trained pairs each")
    parser.add_argument("--pool", type=int, default=12_000, help="pairs in a world's pool")
    parser.add_argument("--form-rows", nargs="+", choices=FORM_ROWS, default=FORM_ROWS, help="of the stage forms")
    parser.add_argument("--stages", nargs="*", choices=STAGES, default=STAGES)
    parser.add_argument("--sweep-seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2, help="one compute thread each")
    parser.add_argument("--tuned", type=Path, help="take the settings from this earlier output")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()

    with RunBar("ordering") as bar:
        get_material(bar.watch)  # fetched and rendered once, before workers ask for it
        workers = Workers(arguments.processes, bar.watch)
        try:
            result = _run(arguments, workers)
        finally:
            workers.close()
    emit(result, arguments.output)


def _run(arguments: argparse.Namespace, workers: Workers) -> dict[str, Any]:
    worlds = [WorldConfig(seed=seed, pool=arguments.pool) for seed in range(arguments.seeds)]
    apart = WorldConfig(seed=TUNING_SEED, pool=arguments.pool)
    if arguments.tuned is None:
        chosen, tuning = tune(workers, arguments.steps, apart)
    else:
        tuning = json.loads(arguments.tuned.read_text(encoding="utf-8"))["tuning"]
        chosen = {row: Knobs.of(tried["chosen"]) for row, tried in tuning.items()}
    result: dict[str, Any] = {
        "benchmark": "ordering",
        "seeds": arguments.seeds,
        "steps": arguments.steps,
        "sub_batch": SUB_BATCH,
        "world": asdict(worlds[0]),
        "student": STUDENT,
        "tuning": tuning,
        **machine("cpu"),
    }

    def table(jobs: Mapping[str, list[Job]], done: Mapping[Job, dict[str, Any]]) -> dict[str, Any]:
        return {row: {"cost": runs[0].cost()} | summary([done[job] for job in runs]) for row, runs in jobs.items()}

    def keep() -> None:
        if arguments.output is not None:
            write_json(arguments.output, result)

    if "main" in arguments.stages:
        workers.deal(worlds)
        jobs = main_jobs(chosen, arguments.steps, worlds)
        done = workers.run("every row", [job for runs in jobs.values() for job in runs])
        result["variants"] = table(jobs, done)
        result["auc_true_against_shuffled"] = [done[job]["auc"] for job in jobs["iid"]]
        result["curves"] = {row: [done[job]["curve"] for job in jobs[row]] for row in jobs}
        if arguments.seeds > 1:
            result["claims"] = claims(result["variants"], result["curves"])
        keep()
    if "compute" in arguments.stages:
        jobs = compute_jobs(chosen, arguments.steps, worlds)
        done = workers.run("equal compute", [job for runs in jobs.values() for job in runs])
        result["equal_compute"] = {
            row: {"steps": jobs[row][0].steps} | values for row, values in table(jobs, done).items()
        }
        keep()
    if "forms" in arguments.stages:
        forms = form_jobs(chosen, arguments.steps, worlds, arguments.form_rows)
        jobs_of = [
            job for by_form in forms.values() for rows in by_form.values() for runs in rows.values() for job in runs
        ]
        workers.deal(job.world for job in jobs_of)
        done = workers.run("forms of the score", jobs_of)
        result["forms"] = {
            trained: {form: table(rows, done) for form, rows in by_form.items()} for trained, by_form in forms.items()
        }
        keep()
    if "sweeps" in arguments.stages:
        result["sweep_seeds"] = arguments.sweep_seeds
        result["sweeps"] = {}
        for name, values in sweep_jobs(chosen, arguments.steps, worlds[: arguments.sweep_seeds]).items():
            jobs_of = [job for rows in values.values() for runs in rows.values() for job in runs]
            workers.deal(job.world for job in jobs_of)
            done = workers.run(f"sweep of {name}", jobs_of)
            result["sweeps"][name] = {value: table(rows, done) for value, rows in values.items()}
            keep()
    return result


if __name__ == "__main__":
    main()
