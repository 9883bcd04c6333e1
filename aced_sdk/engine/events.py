# SPDX-License-Identifier: Apache-2.0
"""Events of all trainings, passed to callbacks. Times are in seconds, counts are totals since step 0."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Protocol


@dataclass(frozen=True)
class Event:
    """Base class of all events.

    Attributes:
        log_name: name in logs, if it differs from the class name.
        step: steps taken so far; 0 before the first.
    """

    log_name: ClassVar[str] = ""
    step: int

    @property
    def name(self) -> str:
        """Name of the event in snake case: `StepDone` is `step_done`."""
        return self.log_name or re.sub(r"(?<!^)(?=[A-Z])", "_", type(self).__name__).lower()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values, with the name as `event`."""
        return {"event": self.name} | asdict(self)


@dataclass(frozen=True)
class StepDone(Event):
    """A step was taken.

    Attributes:
        loss: the total loss.
        parts: the unweighted loss of each term by name.
        learning_rate: learning rate of this step.
        gradient_norm: norm before clipping.
        trained: examples trained on so far.
        seconds: wall time of this step.
        data_seconds: part of `seconds` spent waiting for data.
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
    """A step was skipped because its loss or gradient was not finite. The weights are unchanged.

    Attributes:
        reason: whether the loss or the gradient was not finite.
        in_a_row: consecutive skipped steps, including this one.
        keys: keys of at most 8 pairs of the step: those with non-finite embeddings, or any if there are none.
    """

    reason: str
    in_a_row: int
    keys: tuple[str, ...] = ()


@dataclass(frozen=True)
class CheckpointSaved(Event):
    """A checkpoint was saved."""

    directory: str


@dataclass(frozen=True)
class Warned(Event):
    """A warning with cause and remedy."""

    cause: str
    remedy: str


class Callback(Protocol):
    """A function or object that receives events, such as a progress bar or a log writer."""

    def __call__(self, event: Event) -> None:
        """Receive one event. An exception ends the run."""
