# SPDX-License-Identifier: Apache-2.0
"""Build the objective of a config: weight * contrastive + sum of lambda * distillation (ACED, eq. 4)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import signature
from itertools import count
from typing import Literal

import torch
from torch import Tensor

from aced_sdk import config
from aced_sdk.config.base import named
from aced_sdk.config.objective import DISTILLATION_LOSSES
from aced_sdk.errors import ConfigError
from aced_sdk.files import one_line
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
    """A weighted sum of loss terms. Terms of weight 0 are not computed.

    Raises:
        ConfigError: if two terms have the same name.
    """

    terms: tuple[WeightedLoss, ...]

    def __post_init__(self) -> None:
        names = [term.name for term in self.terms]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ConfigError(f"two loss terms have the name '{twice}'", remedy="give them different names")

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

    Terms are named `contrastive`, or after the distillation loss (`softmax`; the second one is `softmax_2`). A name
    that another term has is counted up.

    Raises:
        ConfigError: if a loss cannot be found, or does not accept its settings.
    """
    task = objective.contrastive
    terms = [WeightedLoss("contrastive", task.weight, "same", _contrastive(task))] if task.weight > 0 else []
    names = ["contrastive"]
    for place, term in enumerate(objective.distillation):
        names.append(next(name for name in _names(term.loss) if name not in names))
        if term.weight > 0:
            loss = _with_teacher(term, f"objective.distillation.{place}.loss")
            terms.append(WeightedLoss(names[-1], term.weight, term.batch, loss))
    return WeightedLosses(tuple(terms))


def _names(loss: str) -> Iterator[str]:
    yield loss
    yield from (f"{loss}_{number}" for number in count(2))


def _contrastive(task: config.Contrastive) -> Callable[[Embeddings, Sequence[Embeddings], Tensor | None], Tensor]:
    form = contrastive.sigmoid_loss if task.loss == "sigmoid" else contrastive.softmax_loss

    def loss(student: Embeddings, teachers: Sequence[Embeddings], captions: Tensor | None) -> Tensor:
        return form(student, task.chunk, captions=captions, repeated=task.repeated)

    return loss


def _distillation(term: config.Distillation, field: str) -> Callable[[Embeddings, Embeddings], Tensor]:
    """The loss with its settings.

    Raises:
        ConfigError: if it cannot be found, or does not accept them.
    """
    try:
        loss = named(DISTILLATION_LOSSES[term.loss].target)
    except ConfigError as error:
        raise error.under(field) from None
    try:
        accepted = signature(loss)
    except (TypeError, ValueError):  # not callable, or written in C
        accepted = None
    try:
        if accepted is not None:
            accepted.bind(None, None, **term.settings)
        elif not callable(loss):
            raise TypeError("it is not a function")
    except TypeError as error:
        given = ", ".join(["student", "teacher", *term.settings])
        raise ConfigError(
            f"the distillation loss '{one_line(term.loss, 80)}' cannot be called with ({given}): {error}",
            remedy="correct the function, or the settings of its LossKind",
            field=field,
        ) from None
    return partial(loss, **term.settings)


def _with_teacher(
    term: config.Distillation, field: str
) -> Callable[[Embeddings, Sequence[Embeddings], Tensor | None], Tensor]:
    loss, number = _distillation(term, field), term.teacher

    def checked(student: Embeddings, teachers: Sequence[Embeddings], captions: Tensor | None) -> Tensor:
        if number >= len(teachers):
            raise ConfigError(
                f"a distillation term needs teacher {number} (counted from 0), got {len(teachers)} teachers",
                remedy="set teacher=Frozen(model=...), one per index, or a reference to use as teacher",
                field="teacher",
            )
        value: object = loss(student, teachers[number])
        if not isinstance(value, Tensor) or value.ndim or not value.is_floating_point():
            shape = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ConfigError(
                f"the distillation loss '{one_line(term.loss, 80)}' returns {shape.removeprefix('torch.')}",
                remedy="return a 0-dim floating-point tensor, such as the mean over the pairs",
                field=field,
            )
        return value

    return checked
