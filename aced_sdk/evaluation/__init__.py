# SPDX-License-Identifier: Apache-2.0
"""Zero-shot classification, retrieval and StableEval."""

from aced_sdk.evaluation.evaluate import EvaluateEvery, EvaluationReport, evaluate, main_metric
from aced_sdk.evaluation.metrics import class_embeddings, retrieval, run_task, zero_shot
from aced_sdk.evaluation.tasks import STABLE_EVAL, Task, load_task

__all__ = [
    "STABLE_EVAL",
    "EvaluateEvery",
    "EvaluationReport",
    "Task",
    "class_embeddings",
    "evaluate",
    "load_task",
    "main_metric",
    "retrieval",
    "run_task",
    "zero_shot",
]
