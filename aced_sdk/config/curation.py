# SPDX-License-Identifier: Apache-2.0
"""How a step's sub-batch is chosen."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from aced_sdk.config.base import Config
from aced_sdk.errors import ConfigError

Score = Literal["learnability", "easy_reference", "hard_learner"]
LossForm = Literal["sigmoid", "softmax"]
SelectionLoss = Literal["auto", "sigmoid", "softmax"]
_AUTO = "auto: sigmoid if every model that is scored was trained with the sigmoid loss, else softmax"
MAX_BATCH = 2**24


class _Selection(Config):
    sub_batch: int = Field(256, gt=0, le=MAX_BATCH, description="b: examples trained on in a step")

    @property
    def candidates(self) -> int:
        """B: examples drawn from the pool for one step."""
        return self.sub_batch

    @property
    def needs_student(self) -> bool:
        """Whether the student has to score the super-batch."""
        return False

    @property
    def needs_reference(self) -> bool:
        """Whether the reference's embeddings are read."""
        return False


class Iid(_Selection):
    """No curation: every drawn example is trained on."""

    method: Literal["iid"] = "iid"


class StaticFilter(_Selection):
    """An offline filter: only the top share of the pool by the reference's own pair score is ever drawn."""

    method: Literal["static"] = "static"
    share: float = Field(0.2, gt=0, le=1, description="share of the pool that is kept")
    loss: SelectionLoss = Field("auto", description=f"form of the reference's pair score; {_AUTO}")

    @property
    def needs_reference(self) -> bool:
        return True


class _Scored(_Selection):
    super_batch: int = Field(1280, gt=0, le=MAX_BATCH, description="B: examples scored in a step")
    score: Score = Field("learnability", description="learnability (H-ACID), easy_reference (I-ACID) or hard_learner")
    loss: SelectionLoss = Field("auto", description=f"form of the loss in the scores; {_AUTO}")
    gain: float = Field(1.0, gt=0, le=1e6, description="factor on the log-weights before a draw; larger is greedier")
    scoring_size: int | None = Field(
        None,
        gt=0,
        le=4096,
        description="side in pixels at which the student scores the super-batch; None: its own. "
        "Smaller is cheaper, and the student is then trained at both sizes, so that its scores are valid",
    )
    scoring_share: float = Field(
        0.5, gt=0, lt=1, description="with scoring_size: share of every sub-batch that is trained at that size"
    )
    collapse_margin: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="the run warns when draws come this close to always taking the same 1 - f of the pool; "
        "0: never, and towards 1 for ever milder preferences",
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
        """Warn when the effective pool size falls below this fraction of what uniform draws give.

        A stream that offers each pair once a pass cannot fall below 1 - f.
        """
        return 0.0 if self.collapse_margin == 0 else 1 - self.filter_ratio * (1 - self.collapse_margin)

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


class Independent(_Scored):
    """Every example scored by its own pair loss alone; the baseline of the joint sampler."""

    method: Literal["independent"] = "independent"


class Joint(_Scored):
    """Joint example selection in chunks (JEST, Algorithm 1), the sampler of ACID and ACED."""

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


Curation = Annotated[Iid | StaticFilter | Independent | Joint, Field(discriminator="method")]
