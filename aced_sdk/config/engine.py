# SPDX-License-Identifier: Apache-2.0
"""Configs of optimizer, learning-rate schedule and engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from aced_sdk.config.base import Config, JsonObject
from aced_sdk.errors import ConfigError

MAX_STEPS = 10**12  # fits in event logs and in the names of checkpoints
Beta = Annotated[float, Field(ge=0, lt=1)]


class Optimizer(Config):
    """AdamW."""

    learning_rate: float = Field(1e-3, gt=0, le=1e6, description="peak learning rate")
    weight_decay: float = Field(1e-4, ge=0, le=1e6, description="decoupled; only on matrices")
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    clip_norm: float = Field(1.0, gt=0, description="gradients are clipped to this total norm")


class Schedule(Config):
    """Length of training and shape of the learning rate."""

    steps: int = Field(gt=0, le=MAX_STEPS, description="training steps; trained examples = steps * sub_batch")
    shape: Literal["cosine", "rsqrt", "constant"] = "cosine"
    warmup: float = Field(0.1, ge=0, lt=1, description="fraction of the steps with a linear rise")
    cooldown: float = Field(
        0.1, ge=0, lt=1, description="fraction of the steps with a linear decay to zero; rsqrt and constant only"
    )

    @model_validator(mode="after")
    def _room(self) -> Self:
        if self.warmup + self.cooldown > 1:
            raise ConfigError("warm-up and cool-down overlap", remedy="make their sum at most 1", field="cooldown")
        return self


class Engine(Config):
    """Engine, precision, device, batch sizes of passes, and checkpoints."""

    kind: Literal["deepspeed", "single"] = Field("deepspeed", description="DeepSpeed, or a single plain process")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="precision of forward passes (autocast); weights stay float32"
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(0, description="DeepSpeed ZeRO stage")
    deepspeed: JsonObject | Path | None = Field(
        None, description="more DeepSpeed settings, or their JSON file; they override the fields above"
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = Field(None, gt=0, le=1024, description="CPU threads of this process; None: torch's default")
    micro_batch: int | None = Field(
        None,
        gt=0,
        description="pairs per forward and backward pass. The gradient is still that of the whole sub-batch "
        "(GradCache), for one more forward pass. None: the whole sub-batch",
    )
    scoring_batch: int = Field(1024, gt=0, description="examples per forward pass for scoring")
    checkpoint_every: int = Field(100, gt=0, description="steps between checkpoints")
    keep_checkpoints: int = Field(2, gt=0, description="number of newest checkpoints to keep")
    max_nonfinite_steps: int = Field(
        3, ge=0, description="consecutive non-finite steps (loss or gradient) that are skipped before the run fails"
    )
    timeout_seconds: float = Field(
        600, gt=0, le=10**6, description="all ranks fail if one of them does not answer for this many seconds"
    )
    signal_exit_code: int | None = Field(
        None,
        ge=0,
        le=255,
        description="exit code of `aced` when SIGTERM or SIGUSR1 ends a run; None: 128 + the signal (143 or 138)",
    )
