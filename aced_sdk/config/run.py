# SPDX-License-Identifier: Apache-2.0
"""The config of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from aced_sdk.config.base import Config
from aced_sdk.config.curation import AnyCuration, Iid
from aced_sdk.config.engine import Engine, Optimizer, Schedule
from aced_sdk.config.models import AnyFrozen, Data, FrozenConfig, SeveralFrozen, Student
from aced_sdk.config.objective import Objective
from aced_sdk.errors import ConfigError


class Evaluation(Config):
    """Evaluation on held-out tasks during and after training; none if `tasks` is empty."""

    tasks: tuple[str, ...] = ()
    data_root: Path | None = Field(
        None, description="folder with one folder per task, in CLIP_benchmark's WebDataset layout"
    )
    every: int = Field(0, ge=0, description="steps between evaluations; 0: only at the end")
    max_unusable_fraction: float = Field(0.02, ge=0, le=1, description="fail if more than this fraction is unusable")

    @model_validator(mode="after")
    def _root(self) -> Self:
        if self.tasks and self.data_root is None:
            raise ConfigError("evaluation tasks are named, but no data", remedy="name their folder", field="data_root")
        return self


class DistillConfig(Config):
    """The config of a run. Methods differ only in `curation` and `objective`."""

    student: Student
    data: Data
    reference: AnyFrozen | None = None
    teacher: SeveralFrozen | None = Field(
        None, description="one teacher, or several that terms refer to by index; None: the reference is the teacher"
    )
    curation: AnyCuration = Iid()
    objective: Objective = Objective()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule
    engine: Engine = Engine()
    evaluation: Evaluation = Evaluation()
    seed: int = Field(0, ge=0, description="seed of weights, order of the pool and selection")
    directory: Path = Field(description="folder of the run: config, events, checkpoints, student")

    @model_validator(mode="after")
    def _models(self) -> Self:
        if self.curation.needs_reference and self.reference is None:
            raise ConfigError(
                f"curation '{self.curation.method}' needs a reference, and none is set",
                remedy="set reference=Frozen(model=...)",
                field="reference",
            )
        teachers = self.teachers
        if self.objective.needs_teacher and not teachers:
            raise ConfigError(
                "a distillation term needs a teacher, and none is set",
                remedy="set teacher=Frozen(model=...), or a reference to use as teacher",
                field="teacher",
            )
        for place, term in enumerate(self.objective.distillation):
            if term.weight > 0 and term.teacher >= len(teachers):
                raise ConfigError(
                    f"a distillation term needs teacher {term.teacher} (counted from 0), got {len(teachers)} teachers",
                    remedy="use the index of a teacher, or add one to `teacher`",
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
        """Check that the pool has enough pairs for a step.

        Raises:
            ConfigError: if a step draws more pairs; it names the field to change.
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
        """Field of a frozen model that is set but read by neither curation nor objective; None if there is none."""
        if self.teacher is not None and not self.objective.needs_teacher:
            return "teacher"
        if self.reference is not None and not self.curation.needs_reference and self.reference not in self.teachers:
            return "reference"
        return None

    @property
    def teachers(self) -> tuple[FrozenConfig, ...]:
        """The teachers by index; the reference if none is set; () without distillation."""
        if not self.objective.needs_teacher:
            return ()
        if self.teacher is None:
            return () if self.reference is None else (self.reference,)
        return self.teacher if isinstance(self.teacher, tuple) else (self.teacher,)
