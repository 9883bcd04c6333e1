# SPDX-License-Identifier: Apache-2.0
"""Evaluation as a call, and as a callback of the loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from statistics import mean
from typing import Any

from aced_sdk.engine.events import Callback, Event
from aced_sdk.errors import EvaluationError
from aced_sdk.evaluation.kinds import Task, first_of_own_kinds, main_metric, run_task
from aced_sdk.evaluation.stable_eval import expand_names, group_of
from aced_sdk.evaluation.tasks import load_task
from aced_sdk.towers import DualEncoder, load
from aced_sdk.training.events import Evaluated, RunEnded, RunStarted, StudentStep


@dataclass(frozen=True)
class EvaluationReport:
    """Metrics by task, as shares in 0..1.

    Attributes:
        tasks: task to metric to value.
        skipped: unusable samples by task and reason.
        main: the metric of each task that enters means: top-1 accuracy, for retrieval the mean of both recalls at 1,
            for several classes per picture the mean average precision.
    """

    tasks: dict[str, dict[str, float]]
    skipped: dict[str, dict[str, int]]
    main: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Metrics per task, means of StableEval's groups (`other`: tasks that are not in it), and the plain mean."""
        grouped: dict[str, list[float]] = {}
        for name, value in self.main.items():
            if (group := group_of(name)) != "mean_only":
                grouped.setdefault(group, []).append(value)
        return {
            "tasks": self.tasks,
            "main": self.main,
            "grouped": {group: mean(values) for group, values in grouped.items()},
            "mean": mean(self.main.values()),
            "skipped": self.skipped,
        }


def evaluate(
    folder_or_model: str | PathLike[str] | DualEncoder,
    tasks: str | Sequence[str] = ("stable_eval",),
    data_root: str | Path = ".",
    *,
    max_unusable_fraction: float = 0.02,
) -> EvaluationReport:
    """Zero-shot classification and retrieval on held-out tasks.

    Args:
        folder_or_model: a student's folder, a hub name, or an encoder.
        tasks: task names (folders under `data_root`) or one of them, or `stable_eval` for the 27 of ACED.
        data_root: tasks in CLIP_benchmark's WebDataset layout (`classnames.txt`, `test/*.tar` with KEY.png and KEY.cls;
            `dataset_type.txt` = retrieval with KEY.txt, or multilabel with KEY.npy). Folders may have the names under
            which CLIP_benchmark and DataComp publish them (`wds_vtab-pets`).
        max_unusable_fraction: largest fraction of a task's samples that may be unusable.

    Raises:
        EvaluationError: if a task is missing or cannot be used, too many of its samples are unusable, or its kind does
            not return finite numbers.
    """
    names = expand_names([tasks] if isinstance(tasks, str) else list(tasks))
    if not names:
        raise EvaluationError("no task is named", remedy="name tasks, or 'stable_eval'", field="tasks")
    encoder = folder_or_model if isinstance(folder_or_model, DualEncoder) else load(folder_or_model)
    loaded = [load_task(name, Path(data_root), encoder, max_unusable_fraction=max_unusable_fraction) for name in names]
    metrics = {task.name: run_task(encoder, task) for task in loaded}
    main = {task.name: main_metric(task, metrics[task.name]) for task in loaded}
    return EvaluationReport(metrics, {task.name: task.skipped for task in loaded}, main)


class EvaluateEvery:
    """A callback that evaluates the student every `every` steps and at the end, and passes metrics to other callbacks.

    It comes first, so that the others receive the last metrics before the end of the run. Kinds of your own are tried
    on their smallest task before the first step, so that a mistake in them does not end the run later.
    """

    def __init__(self, encoder: DualEncoder, tasks: Sequence[Task], every: int, listeners: Sequence[Callback]) -> None:
        self.encoder = encoder
        self.tasks = tasks
        self.every = every
        self.listeners = listeners
        self._steps = 0

    def __call__(self, event: Event) -> None:
        if isinstance(event, RunStarted):
            self._steps = event.steps
            for task in first_of_own_kinds(self.tasks):
                run_task(self.encoder, task)
        if isinstance(event, StudentStep) and event.step % self.every == 0 and event.step < self._steps:
            self._evaluate(event)
        if isinstance(event, RunEnded):
            self._evaluate(event)

    def _evaluate(self, event: StudentStep | RunEnded) -> None:
        metrics = {task.name: run_task(self.encoder, task) for task in self.tasks}
        for listener in self.listeners:
            listener(Evaluated(event.step, metrics, event.trained, event.scored))
