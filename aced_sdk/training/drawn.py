# SPDX-License-Identifier: Apache-2.0
"""The data of a step, and the events and errors that describe it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from aced_sdk.curation import Embeddings
from aced_sdk.data import SuperBatch
from aced_sdk.engine import Step
from aced_sdk.errors import EngineError
from aced_sdk.training.events import MAX_LOGGED, Selected, StudentStep, digests
from aced_sdk.training.parts import Parts
from aced_sdk.training.progress import Totals
from aced_sdk.training.step import Gradient

_FOR_NOISY = 1024  # pairs of a large super-batch whose marks are looked up


@dataclass(frozen=True, eq=False)
class Drawn:
    """The data of a step.

    Attributes:
        super_batch: the candidates.
        picked: int64 [b], indices in the super-batch.
        batch: the picked pairs, then those of the second, uniformly drawn batch.
        student: the student's embeddings of the candidates, if it scored them.
        reference: the reference's, likewise.
        gradient: loss and embeddings of the batch.
        waited: seconds for data.
    """

    super_batch: SuperBatch
    picked: Tensor
    batch: SuperBatch
    student: Embeddings | None
    reference: Embeddings | None
    gradient: Gradient
    waited: float

    def student_step(self, step: Step, totals: Totals) -> StudentStep:
        """The event of a step that was taken."""
        return StudentStep(
            step=step.number,
            loss=step.loss,
            parts=self.gradient.parts,
            learning_rate=step.learning_rate,
            gradient_norm=step.gradient_norm,
            trained=totals.trained,
            seconds=step.seconds,
            data_seconds=self.waited,
            scored=totals.scored,
            scale=float(self.gradient.student.scale),
            bias=float(self.gradient.student.bias),
            distilled=totals.distilled,
        )

    def selected(self, number: int, parts: Parts) -> Selected:
        """The event of a selection."""
        rows, summary = self.super_batch.rows[self.picked], parts.statistics.summary()
        statistics = {
            "unique_coverage": summary.unique_coverage,
            "top_decile_fraction": summary.top_decile_fraction,
            "effective_pool_size": summary.effective_pool_size,
        }
        if parts.pool.knows_noisy:
            for name, of in (("noisy_selected", rows), ("noisy_candidates", self.super_batch.rows)):
                some = of if len(of) <= MAX_LOGGED else of[:: len(of) // _FOR_NOISY]
                statistics[name] = float(parts.pool.noisy(some.numpy()).mean())
        scores = parts.selector.quantiles(self.student, self.reference, self.picked)
        picked, candidates = (tuple(of.numpy().tolist()) for of in (rows, self.super_batch.rows))
        return Selected(number, picked, candidates, statistics, scores, *digests(rows))

    def suspects(self) -> Tensor:
        """Rows of the pairs with non-finite embeddings; all pairs of the step if there are none."""
        student, rows = self.gradient.student, self.batch.rows
        whole = (torch.isfinite(student.image) & torch.isfinite(student.text)).all(dim=1).cpu()
        return rows if whole.all() else rows[~whole]


def non_finite(step: Step) -> str:
    """What of a skipped step was not finite: its loss or its gradient."""
    return "gradient" if math.isfinite(step.loss) else "loss"


def diverged(step: Step, in_a_row: int, suspects: Tensor, parts: Parts) -> EngineError:
    """The error for too many skipped steps in a row; it names pairs of the last one."""
    more = f" and {len(suspects) - 3} more" if len(suspects) > 3 else ""
    return EngineError(
        f"the {non_finite(step)} was not finite in {in_a_row} steps in a row, up to step {step.number}, "
        f"whose pairs are {', '.join(parts.keys(suspects[:3]))}{more}",
        remedy="look at these pairs, lower optimizer.learning_rate, or resume from the last checkpoint with "
        "engine.precision fp32",
        field="optimizer.learning_rate",
    )
