# SPDX-License-Identifier: Apache-2.0
"""How a step is taken and kept."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from aced_sdk.config.base import Config, JsonObject
from aced_sdk.errors import ConfigError

MAX_STEPS = 10**12  # an event log and the names of checkpoints hold them
Beta = Annotated[float, Field(ge=0, lt=1)]


class Optimizer(Config):
    """AdamW."""

    learning_rate: float = Field(1e-3, gt=0, le=1e6, description="peak rate")
    weight_decay: float = Field(1e-4, ge=0, le=1e6, description="decoupled; matrices only")
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    clip_norm: float = Field(1.0, gt=0, description="largest norm of the whole gradient")


class Schedule(Config):
    """Length of training, and the learning rate over it as a factor of the peak."""

    steps: int = Field(gt=0, le=MAX_STEPS, description="steps of training; trained examples = steps * sub_batch")
    shape: Literal["cosine", "rsqrt", "constant"] = "cosine"
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps with a linear rise")
    cooldown: float = Field(
        0.1, ge=0, lt=1, description="share of the steps with a linear fall to zero; rsqrt and constant only"
    )

    @model_validator(mode="after")
    def _room(self) -> Self:
        if self.warmup + self.cooldown > 1:
            raise ConfigError("warm-up and cool-down overlap", remedy="make their sum at most 1", field="cooldown")
        return self


class Engine(Config):
    """How a step is taken and kept."""

    kind: Literal["deepspeed", "single"] = Field("deepspeed", description="DeepSpeed, or one plain process")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="of the forward passes (autocast); weights stay float32"
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(0, description="DeepSpeed ZeRO stage")
    deepspeed: JsonObject | Path | None = Field(
        None, description="further DeepSpeed JSON, laid over what the fields above give"
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = Field(
        None, gt=0, le=1024, description="CPU threads of this process; None: torch's own choice"
    )
    micro_batch: int | None = Field(
        None,
        gt=0,
        description="pairs per forward and backward pass; the gradient stays that of the whole sub-batch (GradCache), "
        "for one more forward pass. None: the whole sub-batch at once",
    )
    scoring_batch: int = Field(1024, gt=0, description="examples per forward pass when the super-batch is scored")
    checkpoint_every: int = Field(100, gt=0, description="steps between checkpoints")
    keep_checkpoints: int = Field(2, gt=0, description="newest checkpoints that are kept")
    max_bad_steps: int = Field(
        3, ge=0, description="steps in a row with a non-finite loss that are skipped before the run stops"
    )
