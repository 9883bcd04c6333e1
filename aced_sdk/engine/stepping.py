# SPDX-License-Identifier: Apache-2.0
"""The loop of all trainings: compute gradients, step, skip non-finite steps, save checkpoints, stop on signals."""

from __future__ import annotations

import math
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from aced_sdk.config import Engine as EngineConfig
from aced_sdk.config import Schedule
from aced_sdk.engine.base import TrainingEngine
from aced_sdk.engine.schedule import factor
from aced_sdk.engine.signals import StopSignal
from aced_sdk.engine.writer import CheckpointWriter, Snapshot
from aced_sdk.errors import EngineError, Interrupted
from aced_sdk.files import printable


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

    def snapshot(self) -> Snapshot | None:
        """Return what is saved in a checkpoint now; None: checkpoints are not written."""

    def saved(self, number: int, folder: Path) -> None:
        """Log that the checkpoint of step `number` is written. Later steps may have been taken."""

    def diverged(self, step: Step, in_a_row: int) -> EngineError:
        """Return the error for too many consecutive skipped steps."""


def take_steps(
    training: Training,
    engine: TrainingEngine,
    schedule: Schedule,
    learning_rate: float,
    config: EngineConfig,
    done: int = 0,
    stop: StopSignal | None = None,
) -> None:
    """Train for the remaining steps.

    A step with a non-finite loss or gradient norm is skipped. A checkpoint is written every `config.checkpoint_every`
    steps, unless that step was skipped, after the last step, and after a signal. Training continues while it is
    written. If that fails, the error is raised after the next step.

    Args:
        training: computes gradients, counts, logs and saves.
        engine: updates the weights.
        schedule: number of steps and shape of the learning rate.
        learning_rate: peak learning rate.
        config: checkpoint interval and limit of consecutive skipped steps.
        done: steps taken before a resume.
        stop: from `stop_signals`; a signal on any rank ends the training on all ranks after the same step.

    Raises:
        EngineError: `training.diverged`, after more than `config.max_nonfinite_steps` consecutive skipped steps; or if
            a checkpoint cannot be written.
        Interrupted: after a signal.
    """
    in_a_row = 0
    with CheckpointWriter(engine, config.keep_checkpoints) as writer:
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
            if written := writer.poll():
                training.saved(*written)
            received = 0 if stop is None else int(engine.ranks.max(stop.number))
            due = number == schedule.steps or (in_a_row == 0 and number % config.checkpoint_every == 0)
            if (due or received) and (snapshot := training.snapshot()) is not None:
                if written := writer.wait():
                    training.saved(*written)
                writer.start(number, snapshot)
            if number == schedule.steps or received:
                written = writer.wait()
                if written:
                    training.saved(*written)
                if stop is not None and received:
                    stop.taken = True
                    raise _interrupted(received, number, written[1] if written else None, config)


def _interrupted(received: int, number: int, checkpoint: Path | None, config: EngineConfig) -> Interrupted:
    code = 128 + received if config.signal_exit_code is None else config.signal_exit_code
    return Interrupted(
        f"{signal.Signals(received).name} ended the run after step {number}",
        remedy="resume the run" + (f" from its checkpoint {printable(checkpoint)}" if checkpoint else ""),
        checkpoint=checkpoint,
        exit_code=code,
    )
