# SPDX-License-Identifier: Apache-2.0
"""What a step minimises."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from aced_sdk.config.base import Config
from aced_sdk.config.curation import LossForm
from aced_sdk.errors import ConfigError

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


class Distillation(Config):
    """One distillation loss; its targets come from a teacher's cached embeddings."""

    loss: Literal["softmax", "sigmoid", "feature", "interactive", "relational"] = "softmax"
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


class Objective(Config):
    """What a step minimises: weight * contrastive + the sum of lambda * distillation."""

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
