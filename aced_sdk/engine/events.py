# SPDX-License-Identifier: Apache-2.0
"""Typed events of any training, passed to callbacks. Times are in seconds, counts are totals since step 0."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Protocol


@dataclass(frozen=True)
class Event:
    """Base of all events.

    Attributes:
        log_name: the event's name in logs, if it is not that of its class.
        step: steps taken when it happened; 0 before the first.
    """

    log_name: ClassVar[str] = ""
    step: int

    @property
    def name(self) -> str:
        """The event's kind in snake case: `StepDone` is `step_done`."""
        return self.log_name or re.sub(r"(?<!^)(?=[A-Z])", "_", type(self).__name__).lower()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values with the kind under `event`."""
        return {"event": self.name} | asdict(self)


@dataclass(frozen=True)
class StepDone(Event):
    """One step was taken.

    Attributes:
        loss: the objective's total.
        parts: its named terms, unweighted.
        learning_rate: in effect in this step.
        gradient_norm: before clipping.
        trained: examples trained on so far.
        seconds: wall time of this step.
        data_seconds: share of `seconds` spent waiting for data.
    """

    loss: float
    parts: dict[str, float]
    learning_rate: float
    gradient_norm: float
    trained: int
    seconds: float
    data_seconds: float


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
    """A warning: its cause, and what to do about it."""

    cause: str
    remedy: str


class Callback(Protocol):
    """A function or object that receives events: a product pipeline, a progress bar, a log writer."""

    def __call__(self, event: Event) -> None:
        """Receive one event. An exception ends the run."""
