# SPDX-License-Identifier: Apache-2.0
"""The loop shared by all trainings: compute gradients, step, skip non-finite steps, save checkpoints."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Protocol

from aced_sdk.config import Engine as EngineConfig
from aced_sdk.config import Schedule
from aced_sdk.engine.base import TrainingEngine
from aced_sdk.engine.schedule import factor
from aced_sdk.errors import EngineError


@dataclass(frozen=True)
class Learned:
    """The loss of a step.

    Attributes:
        loss: the total loss, the same on all ranks.
        has_gradient: whether the engine has a gradient. If not, the step is skipped. The gradient of a non-finite
            loss is not finite either (`TrainingEngine.backward`).
    """

    loss: float
    has_gradient: bool = True


@dataclass(frozen=True)
class Step:
    """A taken or skipped step.

    Attributes:
        number: index of the step, from 1.
        loss: loss of the batch.
        learning_rate: learning rate of this step.
        gradient_norm: norm before clipping; NaN without a gradient.
        seconds: wall time.
    """

    number: int
    loss: float
    learning_rate: float
    gradient_norm: float
    seconds: float


class Training(Protocol):
    """The methods that a training implements for `take_steps`."""

    def learn(self, number: int) -> Learned:
        """Read the batch of step `number` and add its gradient to the engine."""

    def taken(self, step: Step) -> None:
        """Count and log a step."""

    def skipped(self, step: Step, in_a_row: int) -> None:
        """Log a skipped step; the weights are unchanged."""

    def save(self, number: int) -> None:
        """Write a checkpoint after step `number`."""

    def diverged(self, step: Step, in_a_row: int) -> EngineError:
        """Return the error for too many consecutive skipped steps."""


def take_steps(
    training: Training,
    engine: TrainingEngine,
    schedule: Schedule,
    learning_rate: float,
    config: EngineConfig,
    done: int = 0,
) -> None:
    """Train for the remaining steps.

    A step with a non-finite loss or gradient norm is skipped. A checkpoint is written every `config.checkpoint_every`
    steps, unless that step was skipped, and after the last step.

    Args:
        training: computes gradients, counts, logs and saves.
        engine: updates the weights.
        schedule: number of steps and shape of the learning rate.
        learning_rate: peak learning rate.
        config: checkpoint interval and limit of consecutive skipped steps.
        done: steps taken before a resume.

    Raises:
        EngineError: `training.diverged`, after more than `config.max_nonfinite_steps` consecutive skipped steps.
    """
    in_a_row = 0
    for number in range(done + 1, schedule.steps + 1):
        started = time.perf_counter()
        learned = training.learn(number)
        rate = learning_rate * factor(schedule, number - 1)
        norm = engine.step(rate) if learned.has_gradient else math.nan
        step = Step(number, learned.loss, rate, norm, time.perf_counter() - started)
        if math.isfinite(norm):
            in_a_row = 0
            training.taken(step)
        else:
            in_a_row += 1
            training.skipped(step, in_a_row)
            if in_a_row > config.max_nonfinite_steps:
                raise training.diverged(step, in_a_row)
        if number == schedule.steps or (in_a_row == 0 and number % config.checkpoint_every == 0):
            training.save(number)
