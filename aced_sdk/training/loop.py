# SPDX-License-Identifier: Apache-2.0
"""The distillation loop. It is the same for all methods (IID, KD, I-ACID, H-ACID, ACED); they differ in the config."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from aced_sdk.config import DistillConfig
from aced_sdk.curation import COLLAPSE_REMEDY, check_picked, select_random
from aced_sdk.data import SuperBatch
from aced_sdk.data.rowset import Rows
from aced_sdk.engine import Learned, Snapshot, Step, stop_signals, take_steps
from aced_sdk.engine.events import CheckpointSaved, StepSkipped, Warned
from aced_sdk.errors import EngineError
from aced_sdk.training.drawn import Drawn, diverged, non_finite
from aced_sdk.training.parts import Parts
from aced_sdk.training.progress import Totals, restore, snapshot
from aced_sdk.training.scoring import score
from aced_sdk.training.step import can_accumulate, is_quiet, learn

_KEYS = 8  # pairs named in the event of a skipped step


def train(config: DistillConfig, parts: Parts, resume_from: Path | None = None) -> Totals:
    """Train for the remaining steps.

    Args:
        config: the run.
        parts: the components of the loop.
        resume_from: a checkpoint folder of this run.

    Returns:
        The totals at the end.

    Raises:
        ConfigError: if the config sets micro-batches and the student has batch norm.
        CurationError: if the selector returns something else than a sub-batch.
        EngineError: if losses stay non-finite, all steps were skipped, or a checkpoint cannot be written or read.
        Interrupted: after SIGTERM or SIGUSR1; a checkpoint is written before.
    """
    can_accumulate(config, parts.engine.module)
    done, lanes = (Totals(), parts.order.start()) if resume_from is None else restore(resume_from, parts)
    batches = parts.batches(lanes)
    steps = _Distillation(config, parts, batches, done)
    rate = config.optimizer.learning_rate
    try:
        with stop_signals() as stop:
            take_steps(steps, parts.engine, config.schedule, rate, config.engine, steps.totals.step, stop)
    finally:
        batches.close()
    if not steps.totals.trained:
        raise EngineError(
            f"nothing was trained: all of the {steps.totals.step} steps were skipped because of a non-finite loss or "
            "gradient",
            remedy="check the teachers' embeddings and the data, or lower optimizer.learning_rate",
        )
    return steps.totals


class _Distillation:
    """The steps of distillation: read, score, select, learn; then count and log."""

    def __init__(
        self, config: DistillConfig, parts: Parts, batches: Iterator[tuple[SuperBatch, Rows]], done: Totals
    ) -> None:
        self.config = config
        self.parts = parts
        self.batches = batches
        self.totals = done
        # Scores at full size can be reused as the first pass over micro-batches, unless the student has dropout.
        curation = config.curation
        full = curation.needs_student and curation.scoring_side is None
        self._scores_serve: bool | None = None if full and config.engine.micro_batch is not None else False

    def learn(self, number: int) -> Learned:
        config, parts, device = self.config, self.parts, self.parts.engine.device
        started = time.perf_counter()
        super_batch, self._lanes = next(self.batches)
        waited = time.perf_counter() - started

        student = score(super_batch, parts.student, config, device) if config.curation.needs_student else None
        reference = parts.reference.rows(super_batch.rows, device) if parts.reference else None
        picked = check_picked(
            parts.selector.select(student, reference, parts.generator),
            config.curation.sub_batch,
            len(super_batch),
            type(parts.selector).__name__,
        )
        drawn = picked
        if config.objective.needs_iid_batch:
            drawn = torch.cat([picked, select_random(len(picked), len(super_batch), parts.generator)])
        batch = super_batch[drawn]
        teachers = [teacher.rows(batch.rows, device) for teacher in parts.teachers]

        if self._scores_serve is None:
            self._scores_serve = is_quiet(parts.engine, batch)
        known = student[drawn.to(device)] if student is not None and self._scores_serve else None
        gradient = learn(config, parts.engine, parts.objective, batch, teachers, known)

        scored = self.totals.scored + (len(super_batch) if student is not None else 0)
        self.totals = replace(self.totals, step=number, scored=scored)
        self._drawn = Drawn(super_batch, picked, batch, student, reference, gradient, waited)
        return Learned(gradient.loss, has_gradient=math.isfinite(gradient.loss))

    def taken(self, step: Step) -> None:
        drawn, parts, first = self._drawn, self.parts, not self.totals.trained
        size = len(drawn.picked)
        self.totals = replace(
            self.totals,
            trained=self.totals.trained + size,
            distilled=self.totals.distilled + len(drawn.batch) - size,
        )
        parts.statistics.update(drawn.super_batch.rows[drawn.picked])
        if first and (doubt := parts.selector.doubts(drawn.student, drawn.reference)):
            parts.emit(Warned(step.number, *doubt))
        if len(drawn.super_batch) > size:
            parts.emit(drawn.selected(step.number, parts))
        parts.emit(drawn.student_step(step, self.totals))
        level = self.config.curation.collapse_level
        if level and not self.totals.collapsed and (cause := parts.statistics.collapsed(level)):
            parts.emit(Warned(step.number, cause, COLLAPSE_REMEDY))
            self.totals = replace(self.totals, collapsed=True)

    def skipped(self, step: Step, in_a_row: int) -> None:
        keys = tuple(self.parts.keys(self._drawn.suspects()[:_KEYS]))
        self.parts.emit(StepSkipped(step.number, f"the {non_finite(step)} was not finite", in_a_row, keys))

    def snapshot(self) -> Snapshot:
        return snapshot(self.config, self.parts, self.totals, self._lanes)

    def saved(self, number: int, folder: Path) -> None:
        self.parts.emit(CheckpointSaved(number, str(folder)))

    def diverged(self, step: Step, in_a_row: int) -> EngineError:
        return diverged(step, in_a_row, self._drawn.suspects(), self.parts)
