# SPDX-License-Identifier: Apache-2.0
"""Distil efficient vision encoders with active data curation (ACED, arXiv 2411.18674).

Names are loaded on first use, so `import aced_sdk` is fast and does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aced_sdk import presets
    from aced_sdk.cache import EmbeddingCache
    from aced_sdk.config import (
        Cached,
        Contrastive,
        Data,
        Distillation,
        DistillConfig,
        Engine,
        Evaluation,
        Frozen,
        Iid,
        Independent,
        Joint,
        Objective,
        Optimizer,
        Schedule,
        StaticFilter,
        Stored,
        Student,
    )
    from aced_sdk.errors import AcedError
    from aced_sdk.evaluation import EvaluationReport
    from aced_sdk.towers import DualEncoder, Embeddings
    from aced_sdk.verbs import Plan, Run, cache_embeddings, distill, evaluate, index, load, plan, report, resume

_HOMES = {
    "aced_sdk.config": (
        "Cached", "Contrastive", "Data", "DistillConfig", "Distillation", "Engine", "Evaluation", "Frozen", "Iid",
        "Independent", "Joint", "Objective", "Optimizer", "Schedule", "StaticFilter", "Stored", "Student",
    ),
    "aced_sdk.errors": ("AcedError",),
    "aced_sdk.cache": ("EmbeddingCache",),
    "aced_sdk.evaluation": ("EvaluationReport",),
    "aced_sdk.towers": ("DualEncoder", "Embeddings"),
    "aced_sdk.verbs": (
        *("Plan", "Run", "cache_embeddings", "distill", "evaluate", "index", "load", "plan", "report", "resume"),
    ),
}  # fmt: skip
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "AcedError",
    "Cached",
    "Contrastive",
    "Data",
    "DistillConfig",
    "Distillation",
    "DualEncoder",
    "EmbeddingCache",
    "Embeddings",
    "Engine",
    "Evaluation",
    "EvaluationReport",
    "Frozen",
    "Iid",
    "Independent",
    "Joint",
    "Objective",
    "Optimizer",
    "Plan",
    "Run",
    "Schedule",
    "StaticFilter",
    "Stored",
    "Student",
    "cache_embeddings",
    "distill",
    "evaluate",
    "index",
    "load",
    "plan",
    "presets",
    "report",
    "resume",
]


def __getattr__(name: str) -> Any:
    if name == "presets":
        return import_module("aced_sdk.presets")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'aced_sdk' has no attribute {name!r}")
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
