# SPDX-License-Identifier: Apache-2.0
"""Build the objective of a config: weight * contrastive + sum of lambda * distillation (ACED, eq. 4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from aced_sdk import config
from aced_sdk.config.base import named
from aced_sdk.config.objective import DISTILLATION_LOSSES
from aced_sdk.errors import ConfigError
from aced_sdk.objectives import contrastive
from aced_sdk.towers.embeddings import Embeddings

Batch = Literal["same", "iid"]


@dataclass(frozen=True, eq=False)
class LossTerms:
    """The loss of a step.

    Attributes:
        total: 0-dim, with gradient.
        parts: unweighted loss of each term by name, 0-dim and detached.
    """

    total: Tensor
    parts: dict[str, Tensor]


@dataclass(frozen=True)
class WeightedLoss:
    """A weighted loss.

    Attributes:
        name: unique in its objective.
        weight: above 0.
        batch: the pairs it is computed on: the sub-batch, or a second, uniformly drawn batch.
        loss: function of the student's embeddings, all teachers' embeddings and caption ids.
    """

    name: str
    weight: float
    batch: Batch
    loss: Callable[[Embeddings, Sequence[Embeddings], Tensor | None], Tensor]


@dataclass(frozen=True)
class WeightedLosses:
    """A weighted sum of loss terms. Terms of weight 0 are not computed."""

    terms: tuple[WeightedLoss, ...]

    def __call__(
        self,
        student: Embeddings,
        teachers: Sequence[Embeddings] | Embeddings | None = (),
        *,
        captions: Tensor | None = None,
        batch: Batch = "same",
    ) -> LossTerms:
        """Compute the loss of all terms of a batch; 0 if there are none.

        Args:
            student: the student's embeddings of b pairs; scale and bias may be learned 0-dim tensors.
            teachers: the teachers' embeddings of the same pairs, by index, or those of a single teacher.
            captions: int64 [b], equal ids for equal captions; only needed if repeated captions are not negatives.
            batch: "same" for the sub-batch, "iid" for the second, uniformly drawn batch.

        Raises:
            ConfigError: if a distillation term has no teacher, or captions are needed and missing.
            ModelError: if shapes of embeddings do not match.
        """
        taught = () if teachers is None else (teachers,) if isinstance(teachers, Embeddings) else teachers
        terms = [term for term in self.terms if term.batch == batch]
        losses = {term.name: term.loss(student, taught, captions) for term in terms}
        weighted = [term.weight * losses[term.name] for term in terms]
        total = torch.stack(weighted).sum() if weighted else student.image.new_zeros(())
        return LossTerms(total, {name: loss.detach() for name, loss in losses.items()})


def build_objective(objective: config.Objective) -> WeightedLosses:
    """Build the objective of a config.

    Terms are named `contrastive`, or after the distillation loss (`softmax`; the second one is `softmax_2`).
    """
    task = objective.contrastive
    terms = [WeightedLoss("contrastive", task.weight, "same", _contrastive(task))] if task.weight > 0 else []
    for place, term in enumerate(objective.distillation):
        loss = _with_teacher(_distillation(term), term.teacher)
        before = sum(other.loss == term.loss for other in objective.distillation[:place])
        if term.weight > 0:
            name = f"{term.loss}_{before + 1}" if before else term.loss
            terms.append(WeightedLoss(name, term.weight, term.batch, loss))
    return WeightedLosses(tuple(terms))


def _contrastive(task: config.Contrastive) -> Callable[[Embeddings, Sequence[Embeddings], Tensor | None], Tensor]:
    form = contrastive.sigmoid_loss if task.loss == "sigmoid" else contrastive.softmax_loss

    def loss(student: Embeddings, teachers: Sequence[Embeddings], captions: Tensor | None) -> Tensor:
        return form(student, task.chunk, captions=captions, repeated=task.repeated)

    return loss


def _distillation(term: config.Distillation) -> Callable[[Embeddings, Embeddings], Tensor]:
    return partial(named(DISTILLATION_LOSSES[term.loss].target), **term.settings)


def _with_teacher(
    loss: Callable[[Embeddings, Embeddings], Tensor], number: int
) -> Callable[[Embeddings, Sequence[Embeddings], Tensor | None], Tensor]:
    def checked(student: Embeddings, teachers: Sequence[Embeddings], captions: Tensor | None) -> Tensor:
        if number >= len(teachers):
            raise ConfigError(
                f"a distillation term needs teacher {number} (counted from 0), got {len(teachers)} teachers",
                remedy="set teacher=Frozen(model=...), one per index, or a reference to use as teacher",
                field="teacher",
            )
        return loss(student, teachers[number])

    return checked
