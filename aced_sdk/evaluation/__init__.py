# SPDX-License-Identifier: Apache-2.0
"""Zero-shot classification, retrieval and StableEval."""

from aced_sdk.evaluation.evaluate import EvaluateEvery, EvaluationReport, evaluate
from aced_sdk.evaluation.kinds import KINDS, Kind, Retrieval, Task, ZeroShot, main_metric, run_task
from aced_sdk.evaluation.metrics import class_embeddings, merged_retrieval, multilabel, retrieval, zero_shot
from aced_sdk.evaluation.stable_eval import STABLE_EVAL, expand_names
from aced_sdk.evaluation.tasks import load_task, open_task

__all__ = [
    "KINDS",
    "STABLE_EVAL",
    "EvaluateEvery",
    "EvaluationReport",
    "Kind",
    "Retrieval",
    "Task",
    "ZeroShot",
    "class_embeddings",
    "evaluate",
    "expand_names",
    "load_task",
    "main_metric",
    "merged_retrieval",
    "multilabel",
    "open_task",
    "retrieval",
    "run_task",
    "zero_shot",
]
