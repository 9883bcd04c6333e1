# SPDX-License-Identifier: Apache-2.0
"""Events of distillation, besides those of any training (`aced_sdk.engine.events`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from aced_sdk.engine.events import Event, StepDone


@dataclass(frozen=True)
class RunStarted(Event):
    """The loop is about to take its first step, anew or after a resume."""

    steps: int
    config_hash: str
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StudentStep(StepDone):
    """A step of distillation; in logs `step_done`.

    Attributes:
        scored: examples scored by the student for selection so far.
        scale: the student's learned scale.
        bias: its learned bias.
        distilled: examples of second, evenly drawn batches so far; not among `trained`.
    """

    log_name: ClassVar[str] = "step_done"
    scored: int
    scale: float | None = None
    bias: float | None = None
    distilled: int = 0


@dataclass(frozen=True)
class Selected(Event):
    """What curation picked in a step; rows are numbers in the pool.

    Attributes:
        picked: rows trained on, in the order drawn.
        candidates: rows of the super-batch.
        statistics: coverage of the pool so far (unique coverage, share of the top tenth, effective pool size ...).
        scores: the 5, 25, 50, 75 and 95 % quantiles of the pairs' own scores, of all `candidates` and of the `picked`.
    """

    picked: tuple[int, ...]
    candidates: tuple[int, ...]
    statistics: dict[str, float]
    scores: dict[str, tuple[float, ...]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As `Event.to_dict`; rows of large super-batches are left out, since a log of them would outgrow the run."""
        values = super().to_dict()
        if len(self.candidates) > 4096:
            del values["picked"], values["candidates"]
        return values


@dataclass(frozen=True)
class Evaluated(Event):
    """Held-out metrics, task name to metric name to value (shares in 0..1)."""

    metrics: dict[str, dict[str, float]]
    trained: int
    scored: int


@dataclass(frozen=True)
class RunEnded(Event):
    """The last step is done and the student is saved."""

    seconds: float
    trained: int
    scored: int
