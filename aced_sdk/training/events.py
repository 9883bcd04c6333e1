# SPDX-License-Identifier: Apache-2.0
"""Events of distillation. `aced_sdk.engine.events` has the events of all trainings."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from aced_sdk.engine.events import Event, StepDone

MAX_LOGGED = 4096
"""Largest super-batch whose rows are logged."""


@dataclass(frozen=True)
class RunStarted(Event):
    """The loop starts or resumes."""

    steps: int
    config_hash: str
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StudentStep(StepDone):
    """A step of distillation, logged as `step_done`.

    Attributes:
        scored: examples scored by the student for selection so far.
        scale: the student's learned scale.
        bias: the student's learned bias.
        distilled: examples of second, uniformly drawn batches so far; not included in `trained`.
    """

    log_name: ClassVar[str] = "step_done"
    scored: int
    scale: float | None = None
    bias: float | None = None
    distilled: int = 0


@dataclass(frozen=True)
class Selected(Event):
    """The selection of a step. Rows are indices in the pool.

    Attributes:
        picked: rows trained on, in draw order.
        candidates: rows of the super-batch.
        statistics: statistics of the draws so far, such as the effective pool size.
        scores: 5, 25, 50, 75 and 95 % quantiles of the pair scores of all `candidates` and of the `picked` pairs.
        digest: sha256 of the picked rows (int64, little-endian) in draw order, as hex; equal in runs that draw alike.
        digest_set: likewise, of the sorted rows.
    """

    picked: tuple[int, ...]
    candidates: tuple[int, ...]
    statistics: dict[str, float]
    scores: dict[str, tuple[float, ...]] = field(default_factory=dict)
    digest: str = ""
    digest_set: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values. Rows are left out above 4096 candidates, to keep the log small."""
        names = ["statistics", "scores", "digest", "digest_set"]
        if len(self.candidates) <= MAX_LOGGED:
            names += ["picked", "candidates"]
        return {"event": self.name, "step": self.step} | {name: getattr(self, name) for name in names}


def digests(picked: Tensor) -> tuple[str, str]:
    """`Selected.digest` and `Selected.digest_set` of rows, int64 [b]."""
    rows = picked.numpy().astype("<i8")
    in_order, as_set = (hashlib.sha256(array.tobytes()).hexdigest() for array in (rows, np.sort(rows)))
    return in_order, as_set


@dataclass(frozen=True)
class Evaluated(Event):
    """Held-out metrics: task name to metric name to value (fractions in 0..1)."""

    metrics: dict[str, dict[str, float]]
    trained: int
    scored: int


@dataclass(frozen=True)
class RunEnded(Event):
    """The last step is done and the student is saved."""

    seconds: float
    trained: int
    scored: int
