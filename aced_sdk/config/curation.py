# SPDX-License-Identifier: Apache-2.0
"""Configs of curation: how the sub-batch of a step is selected."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from aced_sdk.config.base import IMPORT_HINT, Component, built, check_registered, register, unknown
from aced_sdk.errors import ConfigError

Score = Literal["learnability", "easy_reference", "hard_learner"]
LossForm = Literal["sigmoid", "softmax"]
SelectionLoss = Literal["auto", "sigmoid", "softmax"]
_AUTO = "auto: sigmoid if all scored models were trained with the sigmoid loss, else softmax"
MAX_BATCH = 2**24


class Curation(Component):
    """Base class of the curation configs.

    Subclasses set `method`, the name used in YAML, and `target`, the class of the selector
    (`aced_sdk.curation.Selector`). A subclass outside this package is registered when its module is imported. Its
    method must be its own.
    """

    methods: ClassVar[dict[str, type[Curation]]] = {}

    method: str = ""
    sub_batch: int = Field(256, gt=0, le=MAX_BATCH, description="b: examples trained per step")

    @property
    def candidates(self) -> int:
        """B: examples drawn from the pool per step."""
        return self.sub_batch

    @property
    def needs_student(self) -> bool:
        """Whether the student scores the super-batch."""
        return False

    @property
    def needs_reference(self) -> bool:
        """Whether the reference's embeddings are read."""
        return False

    @property
    def filters_pool(self) -> bool:
        """Whether pairs are selected once before training instead of in each step."""
        return False

    @property
    def scoring_side(self) -> int | None:
        """Image size in pixels for scoring; None: the student's own."""
        return None

    @property
    def cheap_fraction(self) -> float:
        """Fraction of each sub-batch that is trained at `scoring_side`."""
        return 0.0

    @property
    def collapse_level(self) -> float:
        """Warn if the effective pool size falls below this fraction of that of uniform draws; 0: never."""
        return 0.0

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        register(cls, "method", Curation.methods)

    @model_validator(mode="after")
    def _enough_candidates(self) -> Self:
        if self.candidates < self.sub_batch:
            raise ConfigError(
                f"the sub-batch of {self.sub_batch} cannot be selected from {self.candidates} candidates",
                remedy=f"draw at least {self.sub_batch} candidates, or make sub_batch smaller",
                field="super_batch" if "super_batch" in type(self).model_fields else "sub_batch",
            )
        return self


class Iid(Curation):
    """No curation: all drawn examples are trained on."""

    target: ClassVar[str] = "aced_sdk.curation.selectors:Selector"

    method: Literal["iid"] = "iid"


class StaticFilter(Curation):
    """An offline filter: draw only from the top fraction of the pool by the reference's pair score."""

    target: ClassVar[str] = "aced_sdk.curation.selectors:StaticSelector"

    method: Literal["static"] = "static"
    keep_fraction: float = Field(0.2, gt=0, le=1, description="fraction of the pool that is kept")
    loss: SelectionLoss = Field("auto", description=f"form of the reference's pair score; {_AUTO}")

    @property
    def needs_reference(self) -> bool:
        return True

    @property
    def filters_pool(self) -> bool:
        return True


class Scored(Curation):
    """Base class of the curations that score a super-batch in each step."""

    super_batch: int = Field(1280, gt=0, le=MAX_BATCH, description="B: examples scored per step")
    score: Score = Field("learnability", description="learnability (H-ACID), easy_reference (I-ACID) or hard_learner")
    loss: SelectionLoss = Field("auto", description=f"form of the loss in the scores; {_AUTO}")
    gain: float = Field(1.0, gt=0, le=1e6, description="factor on the log-weights before a draw; larger is greedier")
    scoring_size: int | None = Field(
        None,
        gt=0,
        le=4096,
        description="image size in pixels for scoring; None: the student's own. "
        "A smaller size is cheaper; the student is then trained at both sizes, so that its scores are valid",
    )
    scoring_fraction: float = Field(
        0.5, gt=0, lt=1, description="fraction of each sub-batch that is trained at scoring_size"
    )
    collapse_margin: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="warn when the effective pool size is near its minimum, 1 - f of that of uniform draws; "
        "0: never. Higher values warn earlier",
    )

    @model_validator(mode="after")
    def _sizes(self) -> Self:
        if self.super_batch % self.sub_batch:
            raise ConfigError(
                f"the super-batch of {self.super_batch} is not a multiple of the sub-batch of {self.sub_batch}",
                remedy=f"take {max(1, round(self.super_batch / self.sub_batch)) * self.sub_batch}",
                field="super_batch",
            )
        return self

    @model_validator(mode="after")
    def _scoring(self) -> Self:
        if self.scoring_size is not None and not self.needs_student:
            raise ConfigError(
                f"the score {self.score!r} is the reference's alone: the student scores nothing at a smaller size",
                remedy="leave scoring_size out",
                field="scoring_size",
            )
        return self

    @property
    def collapse_level(self) -> float:
        """Warn if the effective pool size falls below this fraction of that of uniform draws.

        The fraction cannot fall below 1 - f, because the order offers each pair once per pass.
        """
        return 0.0 if self.collapse_margin == 0 else 1 - self.filter_ratio * (1 - self.collapse_margin)

    @property
    def scoring_side(self) -> int | None:
        return self.scoring_size if self.needs_student else None

    @property
    def cheap_fraction(self) -> float:
        return 0.0 if self.scoring_side is None else self.scoring_fraction

    @property
    def filter_ratio(self) -> float:
        """f = 1 - b/B."""
        return 1 - self.sub_batch / self.super_batch

    @property
    def candidates(self) -> int:
        return self.super_batch

    @property
    def needs_student(self) -> bool:
        return self.score != "easy_reference"

    @property
    def needs_reference(self) -> bool:
        return self.score != "hard_learner"


class Independent(Scored):
    """Score each example independently by its own pair loss: the baseline of the joint sampler."""

    target: ClassVar[str] = "aced_sdk.curation.selectors:IndependentSelector"

    method: Literal["independent"] = "independent"


class Joint(Scored):
    """Joint example selection in chunks (JEST, Algorithm 1), as in ACID and ACED."""

    target: ClassVar[str] = "aced_sdk.curation.selectors:JointSelector"

    method: Literal["joint"] = "joint"
    num_chunks: int = Field(16, gt=0, description="n: the sub-batch is drawn in n chunks of b/n")

    @model_validator(mode="after")
    def _chunks(self) -> Self:
        if self.sub_batch % self.num_chunks:
            raise ConfigError(
                f"the sub-batch of {self.sub_batch} does not divide into {self.num_chunks} chunks",
                remedy="make the sub-batch a multiple of num_chunks",
                field="num_chunks",
            )
        return self


def _of_method(value: Any) -> Any:
    """Build the curation config named by `method` in a mapping.

    Raises:
        ConfigError: if the method is missing or unknown, or the config's class is not registered.
    """
    if isinstance(value, Curation):
        if type(value) is Curation:
            raise ConfigError("the base class selects nothing", remedy="use one of its subclasses, such as Iid()")
        check_registered(value, "method", Curation.methods)
    if not isinstance(value, Mapping):
        return value
    if "method" not in value:
        raise ConfigError("'method' is missing", remedy=f"use one of {', '.join(Curation.methods)}", field="method")
    method = str(value["method"])
    if method not in Curation.methods:
        raise unknown("method", method, Curation.methods, "method", IMPORT_HINT)
    return built(Curation.methods[method], value)


AnyCuration = Annotated[SerializeAsAny[Curation], BeforeValidator(_of_method)]
"""Type of a field for any curation config."""
