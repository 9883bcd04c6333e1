# SPDX-License-Identifier: Apache-2.0
"""Configs of the objective: the task loss and distillation losses."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from aced_sdk.config.base import IMPORT_HINT, Config, shown, unknown
from aced_sdk.config.curation import LossForm
from aced_sdk.errors import ConfigError

Repeated = Literal["negatives", "masked", "positives"]


class Contrastive(Config):
    """The contrastive task loss over the sub-batch."""

    loss: LossForm = "sigmoid"
    weight: float = Field(1.0, ge=0, description="task weight; 0 trains only by distillation")
    chunk: int | None = Field(
        None, gt=0, description="texts (softmax: rows) per slab; None: one slab. Saves memory; the loss is the same"
    )
    repeated: Repeated = Field(
        "negatives",
        description="how other pairs with the same caption are treated: as negatives (as in the paper), "
        "masked, or as positives weighted by 1 / count",
    )


class LossKind(NamedTuple):
    """A registered distillation loss.

    Attributes:
        target: the function as `module:name`. `loss(student, teacher, **settings)` takes two `Embeddings` and returns
            a 0-dim tensor.
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
"""Registry of the losses for `Distillation.loss`. Add your own loss to it."""


class Distillation(Config):
    """A distillation loss against a teacher's cached embeddings."""

    loss: str = Field("softmax", description="softmax, sigmoid, feature, interactive or relational")
    weight: float = Field(1.0, ge=0, description="lambda: weight of the loss")
    teacher: int = Field(0, ge=0, description="index of the teacher, if there are several")
    batch: Literal["same", "iid"] = Field(
        "same",
        description="same: the sub-batch (ACIDistill); iid: a second batch, uniform from the super-batch (IIDistill)",
    )
    teacher_scale: float | None = Field(
        None, gt=0, description="scale on the teacher's similarities; None: its learned scale"
    )
    student_scale: float | None = Field(
        None, gt=0, description="scale on the student's similarities; None: its learned scale"
    )
    chunk: int | None = Field(
        None, gt=0, description="rows per slab; None: one slab. Saves memory; the loss is the same"
    )

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.loss not in DISTILLATION_LOSSES:
            raise unknown("distillation loss", self.loss, DISTILLATION_LOSSES, "loss", IMPORT_HINT)
        kind = DISTILLATION_LOSSES[self.loss]
        if not isinstance(kind, LossKind) or not set(kind.settings) <= set(_ALL):
            raise ConfigError(
                f"the distillation loss '{self.loss}' is registered as {shown(kind)}",
                remedy=f"register LossKind('module:name', settings), with settings of {', '.join(_ALL)}",
                field="loss",
            )
        for name in _ALL:
            if getattr(self, name) is not None and name not in kind.settings:
                raise ConfigError(
                    f"the distillation loss '{self.loss}' has no {name}", remedy=f"leave {name} out", field=name
                )
        return self

    @property
    def settings(self) -> dict[str, Any]:
        """Keyword arguments of the loss."""
        return {name: getattr(self, name) for name in DISTILLATION_LOSSES[self.loss].settings}


class Objective(Config):
    """The objective: weight * contrastive + sum of lambda * distillation."""

    contrastive: Contrastive = Contrastive()
    distillation: tuple[Distillation, ...] = Field((), max_length=64)

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
        """The loss that trains the student's scale and bias: the task loss, or distillation if that has no weight."""
        if self.contrastive.weight > 0:
            return self.contrastive.loss
        return "sigmoid" if any(term.loss == "sigmoid" and term.weight > 0 for term in self.distillation) else "softmax"

    @property
    def needs_iid_batch(self) -> bool:
        """Whether a term is computed on a second, uniformly drawn batch."""
        return any(term.weight > 0 and term.batch == "iid" for term in self.distillation)

    @property
    def needs_teacher(self) -> bool:
        """Whether teacher embeddings are read."""
        return any(term.weight > 0 for term in self.distillation)
