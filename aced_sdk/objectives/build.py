# SPDX-License-Identifier: Apache-2.0
"""From an objective's config to one callable: weight * contrastive + the sum of lambda * distillation (ACED, eq. 4)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from aced_sdk import config
from aced_sdk.errors import ConfigError
from aced_sdk.objectives import contrastive, distillation
from aced_sdk.towers.embeddings import Embeddings


@dataclass(frozen=True, eq=False)
class LossTerms:
    """A step's loss.

    Attributes:
        total: 0-dim, to be differentiated.
        parts: each term by name, before its weight, 0-dim and detached.
    """

    total: Tensor
    parts: dict[str, Tensor]


@dataclass(frozen=True)
class Term:
    """One weighted loss of student and teacher."""

    name: str
    weight: float
    loss: Callable[[Embeddings, Embeddings | None], Tensor]


@dataclass(frozen=True)
class Objective:
    """The weighted terms of an objective; those of weight 0 are left out and cost nothing."""

    terms: tuple[Term, ...]

    def __call__(self, student: Embeddings, teacher: Embeddings | None = None) -> LossTerms:
        """The loss of a sub-batch.

        Args:
            student: embeddings of the b pairs, in training; scale and bias may be learned 0-dim tensors.
            teacher: the teacher's embeddings of the same pairs; None without distillation.

        Raises:
            ConfigError: if a distillation term finds no teacher.
            ModelError: if embeddings do not fit each other.
        """
        losses = {term.name: term.loss(student, teacher) for term in self.terms}
        total = torch.stack([term.weight * losses[term.name] for term in self.terms]).sum()
        return LossTerms(total, {name: loss.detach() for name, loss in losses.items()})


def build_objective(objective: config.Objective) -> Objective:
    """The callable that a config describes.

    A part is named `contrastive`, or by its distillation loss (`softmax`, and `softmax_2` for a second one).

    Raises:
        ConfigError: if a distillation term sets a scale that its loss does not have.
    """
    task = objective.contrastive
    if task.loss == "softmax" and task.chunk is not None:
        raise ConfigError(
            "only the sigmoid loss is computed in slabs", remedy="leave chunk out", field="objective.contrastive.chunk"
        )
    terms = [Term("contrastive", task.weight, _contrastive(task))] if task.weight > 0 else []
    for place, term in enumerate(objective.distillation):
        loss = _with_teacher(_distillation(term, f"objective.distillation.{place}"))
        before = sum(other.loss == term.loss for other in objective.distillation[:place])
        if term.weight > 0:
            terms.append(Term(f"{term.loss}_{before + 1}" if before else term.loss, term.weight, loss))
    return Objective(tuple(terms))


def _contrastive(task: config.Contrastive) -> Callable[[Embeddings, Embeddings | None], Tensor]:
    def loss(student: Embeddings, teacher: Embeddings | None) -> Tensor:
        if task.loss == "sigmoid":
            return contrastive.sigmoid_loss(student, task.chunk)
        return contrastive.softmax_loss(student)

    return loss


def _distillation(term: config.Distillation, field: str) -> Callable[[Embeddings, Embeddings], Tensor]:
    scales = {"teacher_scale": term.teacher_scale, "student_scale": term.student_scale}
    known = {"feature": (), "interactive": ("student_scale",)}.get(term.loss, tuple(scales))
    for name, value in scales.items():
        if value is not None and name not in known:
            raise ConfigError(
                f"the distillation loss {term.loss!r} has no {name}",
                remedy=f"leave {name} out",
                field=f"{field}.{name}",
            )
    losses: dict[str, Callable[..., Tensor]] = {
        "softmax": distillation.softmax_kd,
        "sigmoid": distillation.sigmoid_kd,
        "feature": distillation.feature_matching,
        "interactive": distillation.interactive,
        "relational": distillation.relational,
    }
    return partial(losses[term.loss], **{name: scales[name] for name in known})


def _with_teacher(
    loss: Callable[[Embeddings, Embeddings], Tensor],
) -> Callable[[Embeddings, Embeddings | None], Tensor]:
    def checked(student: Embeddings, teacher: Embeddings | None) -> Tensor:
        if teacher is None:
            raise ConfigError(
                "a distillation term needs the teacher's embeddings",
                remedy="set teacher=Frozen(model=...), or a reference that teaches too",
                field="teacher",
            )
        return loss(student, teacher)

    return checked
