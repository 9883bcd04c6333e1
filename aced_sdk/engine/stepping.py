# SPDX-License-Identifier: Apache-2.0
"""The loop over steps that every training shares: learn, step, skip what is not finite, save checkpoints."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Protocol

from aced_sdk.config import Engine as EngineConfig
from aced_sdk.config import Schedule
from aced_sdk.engine.base import Engine
from aced_sdk.engine.schedule import factor
from aced_sdk.errors import EngineError


@dataclass(frozen=True)
class Learned:
    """The loss of a step.

    Attributes:
        loss: the total, the same on every rank.
        has_gradient: whether a gradient was brought into the engine; without one the step is skipped.
    """

    loss: float
    has_gradient: bool = True


@dataclass(frozen=True)
class Step:
    """A step that was taken or skipped.

    Attributes:
        number: counted from 1.
        loss: of its batch.
        learning_rate: in effect.
        gradient_norm: before clipping.
        seconds: since the step began.
    """

    number: int
    loss: float
    learning_rate: float
    gradient_norm: float
    seconds: float


class Training(Protocol):
    """What differs between trainings."""

    def learn(self, number: int) -> Learned:
        """Draw the batch of step `number` and bring its gradient into the engine."""

    def taken(self, step: Step) -> None:
        """Count and report a step."""

    def skipped(self, step: Step, in_a_row: int) -> None:
        """Report a step that was not finite; the weights are as before."""

    def save(self, number: int) -> None:
        """Write a checkpoint after step `number`."""

    def diverged(self, step: Step, in_a_row: int) -> EngineError:
        """The error for too many skipped steps in a row."""


def take_steps(
    training: Training, engine: Engine, schedule: Schedule, learning_rate: float, config: EngineConfig, done: int = 0
) -> None:
    """Take the steps that are left.

    A step whose loss or gradient norm is not finite is skipped. A checkpoint is written every
    `config.checkpoint_every` steps, unless the last step was skipped, and at the end.

    Args:
        training: learns, counts, reports and saves.
        engine: takes the steps.
        schedule: number of steps and shape of the learning rate.
        learning_rate: its peak.
        config: how often to save, and how many steps in a row may be skipped.
        done: steps taken by an earlier, interrupted run.

    Raises:
        EngineError: `training.diverged`, after more than `config.max_bad_steps` skipped steps in a row.
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
            if in_a_row > config.max_bad_steps:
                raise training.diverged(step, in_a_row)
        if number == schedule.steps or (in_a_row == 0 and number % config.checkpoint_every == 0):
            training.save(number)
