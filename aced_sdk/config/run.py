# SPDX-License-Identifier: Apache-2.0
"""A whole run."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from aced_sdk.config.base import Config
from aced_sdk.config.curation import AnyCuration, Iid
from aced_sdk.config.engine import Engine, Optimizer, Schedule
from aced_sdk.config.models import Data, Frozen, Stored, Student
from aced_sdk.config.objective import Objective
from aced_sdk.errors import ConfigError


class Evaluation(Config):
    """Evaluation on held-out tasks while training and at its end; no tasks, none."""

    tasks: tuple[str, ...] = ()
    data_root: Path | None = Field(
        None, description="folder with one folder per task, in CLIP_benchmark's WebDataset layout"
    )
    every: int = Field(0, ge=0, description="steps between evaluations; 0: only at the end")
    max_bad_fraction: float = Field(0.02, ge=0, le=1, description="largest share of a task's unusable samples")

    @model_validator(mode="after")
    def _root(self) -> Self:
        if self.tasks and self.data_root is None:
            raise ConfigError("evaluation tasks are named, but no data", remedy="name their folder", field="data_root")
        return self


class DistillConfig(Config):
    """A whole run. Methods differ in `curation` and `objective` alone."""

    student: Student
    data: Data
    reference: Frozen | Stored | None = None
    teacher: Frozen | Stored | tuple[Frozen | Stored, ...] | None = Field(
        None, description="one, or several that terms name by number; None with a distillation term: the reference"
    )
    curation: AnyCuration = Iid()
    objective: Objective = Objective()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule
    engine: Engine = Engine()
    evaluation: Evaluation = Evaluation()
    seed: int = Field(0, ge=0, description="of weights, order of the pool and selection")
    directory: Path = Field(description="folder of the run: config, events, checkpoints, student")

    @model_validator(mode="after")
    def _models(self) -> Self:
        if self.curation.needs_reference and self.reference is None:
            raise ConfigError(
                f"curation '{self.curation.method}' reads a reference, and none is named",
                remedy="set reference=Frozen(model=...)",
                field="reference",
            )
        teachers = self.teachers
        if self.objective.needs_teacher and not teachers:
            raise ConfigError(
                "a distillation term needs a teacher, and none is named",
                remedy="set teacher=Frozen(model=...), or a reference that teaches too",
                field="teacher",
            )
        for place, term in enumerate(self.objective.distillation):
            if term.weight > 0 and term.teacher >= len(teachers):
                raise ConfigError(
                    f"a distillation term names teacher {term.teacher}, and there are {len(teachers)} (counted from 0)",
                    remedy="name one that is there, or add it to `teacher`",
                    field=f"objective.distillation.{place}.teacher",
                )
        size = self.engine.micro_batch
        if size is not None and self.curation.sub_batch % size:
            raise ConfigError(
                f"the sub-batch of {self.curation.sub_batch} does not divide into micro-batches of {size}",
                remedy="take a divisor of curation.sub_batch",
                field="engine.micro_batch",
            )
        return self

    def check_pool(self, pairs: int) -> None:
        """Raise if a step draws more pairs than there are.

        Raises:
            ConfigError: naming the field to change.
        """
        candidates = self.curation.candidates
        if pairs < candidates:
            raise ConfigError(
                f"a step draws {candidates} candidates, and {pairs} pairs can be drawn from",
                remedy="make the batches smaller or the pool larger",
                field="curation.super_batch" if candidates != self.curation.sub_batch else "curation.sub_batch",
            )

    @property
    def unused(self) -> str | None:
        """The frozen model that is named and that neither curation nor objective reads: a field's name, or None."""
        if self.teacher is not None and not self.objective.needs_teacher:
            return "teacher"
        if self.reference is not None and not self.curation.needs_reference and self.reference not in self.teachers:
            return "reference"
        return None

    @property
    def teachers(self) -> tuple[Frozen | Stored, ...]:
        """Who teaches, in the terms' numbering: the reference where nobody else is named; () without distillation."""
        if not self.objective.needs_teacher:
            return ()
        if self.teacher is None:
            return () if self.reference is None else (self.reference,)
        return self.teacher if isinstance(self.teacher, tuple) else (self.teacher,)
