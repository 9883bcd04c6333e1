# SPDX-License-Identifier: Apache-2.0
"""Typed events of a run, passed to callbacks. Times are seconds, counts are totals since step 0."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Event:
    """Base of all events.

    Attributes:
        step: steps taken when it happened; 0 before the first.
    """

    step: int

    @property
    def name(self) -> str:
        """The event's kind in snake case: `StepDone` is `step_done`."""
        return re.sub(r"(?<!^)(?=[A-Z])", "_", type(self).__name__).lower()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values with the kind under `event`."""
        return {"event": self.name} | asdict(self)


@dataclass(frozen=True)
class RunStarted(Event):
    """The loop is about to take its first step, anew or after a resume."""

    steps: int
    config_hash: str
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StepDone(Event):
    """One step was taken.

    Attributes:
        loss: the objective's total.
        parts: its named terms, unweighted.
        learning_rate: in effect in this step.
        gradient_norm: before clipping.
        trained: examples trained on so far.
        scored: examples scored by the student for selection so far.
        seconds: wall time of this step.
        data_seconds: share of `seconds` spent waiting for data.
        scale: the student's learned scale, where it has one.
        bias: its learned bias.
        distilled: examples of second, evenly drawn batches so far; 0 where no distillation term has one. They are
            not among `trained`.
    """

    loss: float
    parts: dict[str, float]
    learning_rate: float
    gradient_norm: float
    trained: int
    scored: int
    seconds: float
    data_seconds: float
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
class StepSkipped(Event):
    """A step whose loss or gradient was not finite; the weights are as before.

    Attributes:
        reason: what was not finite.
        in_a_row: such steps without a good one between them, this one included.
        keys: names of at most 8 pairs of the step, and only of those whose embeddings are not finite where there are
            such.
    """

    reason: str
    in_a_row: int
    keys: tuple[str, ...] = ()


@dataclass(frozen=True)
class CheckpointSaved(Event):
    """A checkpoint is complete on disk."""

    directory: str


@dataclass(frozen=True)
class Warned(Event):
    """Something a user should know, with what to do about it."""

    cause: str
    remedy: str


@dataclass(frozen=True)
class RunEnded(Event):
    """The last step is done and the student is saved."""

    seconds: float
    trained: int
    scored: int


class Callback(Protocol):
    """Anything that wants to hear: a product pipeline, a progress bar, a writer."""

    def __call__(self, event: Event) -> None:
        """Take one event; what it raises ends the run."""
