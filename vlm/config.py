# SPDX-License-Identifier: Apache-2.0
"""What a user writes about a vision-language model and its tuning. Nothing here imports torch."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from aced_sdk.config import Config, Engine
from aced_sdk.errors import ConfigError


class Projector(Config):
    """The connector between the vision tower and the language model, in the layouts that transformers loads."""

    kind: Literal["mlp", "linear", "pixel_shuffle"] = Field(
        "mlp",
        description="mlp: linear, GELU, linear (LLaVA-1.5). linear: the same without the GELU (transformers loads no "
        "single layer). pixel_shuffle: neighbouring patches become one token, then norm, linear, SwiGLU, linear (Aya "
        "Vision)",
    )
    factor: Literal[2, 3, 4] = Field(
        2, description="pixel_shuffle alone: so many patches along each side become one token, 4, 9 or 16 times fewer"
    )


class Lora(Config):
    """Low-rank adapters on the language model's linear layers; never on the vision tower."""

    rank: int = Field(8, gt=0, description="r")
    alpha: float = Field(16, gt=0, description="the adapters' output is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="on the adapters' input")
    layers: tuple[Literal["q", "k", "v", "o", "gate", "up", "down"], ...] = Field(
        ("q", "k", "v", "o", "gate", "up", "down"),
        min_length=1,
        description="projections of every decoder layer that get one",
    )
    dora: bool = Field(False, description="DoRA: the weights' magnitudes are trained beside the low-rank directions")
    qlora: bool = Field(
        False,
        description="QLoRA: the layers that get an adapter are themselves held in 4 bits (NF4); needs bitsandbytes",
    )

    @property
    def target_modules(self) -> str:
        """A regex for peft that cannot hit the vision tower, whose layers have the same names."""
        return rf".*language_model.*\.({'|'.join(self.layers)})_proj"


class _Stage(Config):
    steps: int = Field(gt=0, description="optimiser steps")
    batch_size: int = Field(
        8,
        gt=0,
        description="rows per step; a row has the pictures of up to `conversations_per_row` conversations",
    )
    micro_batch: int | None = Field(
        None, gt=0, description="rows a forward pass; None: all. Saves memory, changes nothing"
    )
    learning_rate: float = Field(1e-3, gt=0, description="peak rate; cosine to zero")
    weight_decay: float = Field(0.0, ge=0, description="decoupled; matrices only")
    warmup: float = Field(0.05, ge=0, lt=1, description="fraction of the steps with a linear rise")
    clip_norm: float = Field(1.0, gt=0, description="largest norm of the whole gradient")


class Align(_Stage):
    """Train the projector alone; tower and language model stay frozen."""

    stage: Literal["align"] = "align"


class Adapt(_Stage):
    """Train the projector and the language model, by adapters or as a whole; the tower stays frozen."""

    stage: Literal["adapt"] = "adapt"
    lora: Lora | None = Field(
        Lora(), description="adapters; None: all of the language model's weights (try a learning rate of 2e-5)"
    )


class TuneConfig(Config):
    """Stages one after the other, and how their steps are taken."""

    stages: tuple[Annotated[Align | Adapt, Field(discriminator="stage")], ...] = Field(min_length=1)
    seed: int = Field(0, ge=0, description="of the adapters' first weights, the order of the data and dropout")
    conversations_per_row: int = Field(
        4,
        gt=0,
        description="conversations about the same pictures that share one pass over them; saves time, changes no loss",
    )
    max_unusable_fraction: float = Field(
        0.02, ge=0, le=1, description="largest fraction of conversations left out: nothing to learn, too long"
    )
    feature_cache_mb: int = Field(1024, ge=0, description="MiB to keep the frozen tower's features of pictures in")
    engine: Engine = Engine(kind="single")

    @model_validator(mode="after")
    def _order(self) -> Self:
        if self.engine.micro_batch is not None:
            raise ConfigError(
                "tuning has a micro_batch in each stage, and none of the engine's",
                remedy="set it on the stage: Align(micro_batch=...)",
                field="engine.micro_batch",
            )
        if any(stage.stage == "adapt" for stage in self.stages[:-1]):
            raise ConfigError("an Adapt stage must be the last", remedy="put it last, once", field="stages")
        return self
