# SPDX-License-Identifier: Apache-2.0
"""CLIP_benchmark's own command on students and task folders, in float32 as here."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path

from tools.clients.inside import Check

# CLIP_benchmark's name of each metric
METRICS = {
    "classes": {"acc1": "acc1", "acc5": "acc5", "mean_per_class_recall": "mean_per_class_recall"},
    "multilabel": {"mean_average_precision": "mean_average_precision"},
    "retrieval": {
        f"{ours}_r{k}": f"{theirs}_retrieval_recall@{k}"
        for k in (1, 5)
        for ours, theirs in (("image_to_text", "text"), ("text_to_image", "image"))
    },
}


def checks(folder: Path) -> Iterator[Check]:
    """Each metric of each task."""
    for task, names in METRICS.items():
        for ours, theirs in names.items():
            yield Check(f"tasks/{task}", ours, "clip_benchmark eval", partial(figure, folder, task, theirs))


def figure(folder: Path, task: str, metric: str) -> float:
    """One figure."""
    return run(folder, task)[metric]


@cache
def run(folder: Path, task: str) -> dict[str, float]:
    """The figures of one task."""
    kind = "zeroshot_retrieval" if task == "retrieval" else "zeroshot_classification"
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out.json"
        options = {"dataset": f"wds/{task}", "dataset_root": folder / "tasks" / task, "task": kind, "output": out}
        options |= {"model": f"local-dir:{folder / 'students/clip'}", "pretrained": "", "num_workers": 0}
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        command = [sys.executable, "-m", "clip_benchmark.cli", "eval", *words, "--no_amp", "--recall_k", "1", "5"]
        subprocess.run(command, cwd=scratch, check=True, stdout=sys.stderr)
        return dict(json.loads(out.read_text())["metrics"])
