# SPDX-License-Identifier: Apache-2.0
"""What a step minimises."""

from __future__ import annotations

import difflib
from typing import Any, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from aced_sdk.config.base import Config
from aced_sdk.config.curation import LossForm
from aced_sdk.errors import ConfigError
from aced_sdk.files import one_line

Repeated = Literal["negatives", "masked", "positives"]


class Contrastive(Config):
    """The task loss over the sub-batch."""

    loss: LossForm = "sigmoid"
    weight: float = Field(1.0, ge=0, description="task weight; 0 trains by distillation alone")
    chunk: int | None = Field(
        None, gt=0, description="texts (softmax: rows) per slab; None: one slab. Saves memory, changes nothing"
    )
    repeated: Repeated = Field(
        "negatives",
        description="what another pair of the sub-batch with the same caption is: a negative as in the paper, "
        "nothing at all, or a positive weighted by 1 / count",
    )


class LossKind(NamedTuple):
    """A distillation loss by name.

    Attributes:
        target: the function, as `module:name`: `loss(student, teacher, **settings)` of two `Embeddings`, 0-dim.
        settings: which of `teacher_scale`, `student_scale` and `chunk` it takes.
    """

    target: str
    settings: tuple[str, ...] = ()


_ROOM = "aced_sdk.objectives.distillation"
_ALL = ("teacher_scale", "student_scale", "chunk")
DISTILLATION_LOSSES: dict[str, LossKind] = {
    "softmax": LossKind(f"{_ROOM}:softmax_kd", _ALL),
    "sigmoid": LossKind(f"{_ROOM}:sigmoid_kd", _ALL),
    "feature": LossKind(f"{_ROOM}:feature_matching"),
    "interactive": LossKind(f"{_ROOM}:interactive", ("student_scale", "chunk")),
    "relational": LossKind(f"{_ROOM}:relational", _ALL),
}
"""Losses that `Distillation.loss` may name; a loss of your own is added to it."""


class Distillation(Config):
    """One distillation loss; its targets come from a teacher's cached embeddings."""

    loss: str = Field("softmax", description="softmax, sigmoid, feature, interactive or relational")
    weight: float = Field(1.0, ge=0, description="lambda")
    teacher: int = Field(0, ge=0, description="which of the teachers, where there are several")
    batch: Literal["same", "iid"] = Field(
        "same",
        description="the sub-batch itself (ACIDistill), or a second one drawn evenly from the super-batch (IIDistill)",
    )
    teacher_scale: float | None = Field(
        None, gt=0, description="scale on the teacher's similarities; None: its own learned one"
    )
    student_scale: float | None = Field(
        None, gt=0, description="scale on the student's similarities; None: its own learned one"
    )
    chunk: int | None = Field(None, gt=0, description="rows per slab; None: one slab. Saves memory, changes nothing")

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.loss not in DISTILLATION_LOSSES:
            near = difflib.get_close_matches(self.loss, DISTILLATION_LOSSES, n=1, cutoff=0.6)
            known = ", ".join(DISTILLATION_LOSSES)
            raise ConfigError(
                f"unknown distillation loss '{one_line(self.loss, 80)}'",
                remedy=f"did you mean '{near[0]}'?" if near else f"use one of {known}",
                field="loss",
            )
        for name in _ALL:
            if getattr(self, name) is not None and name not in DISTILLATION_LOSSES[self.loss].settings:
                raise ConfigError(
                    f"the distillation loss '{self.loss}' has no {name}", remedy=f"leave {name} out", field=name
                )
        return self

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments of the loss by name."""
        return {name: getattr(self, name) for name in DISTILLATION_LOSSES[self.loss].settings}


class Objective(Config):
    """What a step minimises: weight * contrastive + the sum of lambda * distillation."""

    contrastive: Contrastive = Contrastive()
    distillation: tuple[Distillation, ...] = ()

    @model_validator(mode="after")
    def _something(self) -> Self:
        if self.contrastive.weight == 0 and not any(term.weight > 0 for term in self.distillation):
            raise ConfigError(
                "nothing to learn: the task weight is 0 and no distillation term has a weight",
                remedy="give contrastive.weight or a distillation term a positive weight",
                field="contrastive.weight",
            )
        return self

    @property
    def trained_with(self) -> LossForm:
        """The form of the loss that trains the student's scale and bias: the task's, else that of the distillation."""
        if self.contrastive.weight > 0:
            return self.contrastive.loss
        return "sigmoid" if any(term.loss == "sigmoid" and term.weight > 0 for term in self.distillation) else "softmax"

    @property
    def needs_iid_batch(self) -> bool:
        """Whether a term is computed on a second, evenly drawn batch."""
        return any(term.weight > 0 and term.batch == "iid" for term in self.distillation)

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher's embeddings are read."""
        return any(term.weight > 0 for term in self.distillation)
