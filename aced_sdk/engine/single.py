# SPDX-License-Identifier: Apache-2.0
"""The plain engine: one process, torch AdamW."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aced_sdk.config import Engine as EngineConfig
from aced_sdk.config import Optimizer as OptimizerConfig
from aced_sdk.engine.base import adamw, marked, pick_device, precision, set_learning_rate
from aced_sdk.engine.launch import Launch
from aced_sdk.engine.ranks import Ranks
from aced_sdk.engine.state import load_weights, optimizer_state, trainable_state


class SingleProcess:
    """The engine for one process. See `aced_sdk.engine.base.TrainingEngine`."""

    def __init__(
        self,
        module: nn.Module,
        config: EngineConfig,
        optimizer: OptimizerConfig,
        factors: dict[str, float] | None = None,
    ) -> None:
        self.device = pick_device(config, 0)
        self.ranks = Ranks(Launch(0, 0, 1), self.device)
        self.module = module.to(self.device)
        self.config = config
        self.clip_norm = optimizer.clip_norm
        self.optimizer = adamw(self.module, optimizer, factors)

    def forward(self, *inputs: Any) -> Any:
        with precision(self.config, self.device):
            return self.module(*inputs)

    def backward(self, loss: Tensor, last: bool = True) -> None:
        marked(loss).backward()  # type: ignore[no-untyped-call]

    def step(self, learning_rate: float) -> float:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.clip_norm))
        if math.isfinite(norm):
            set_learning_rate(self.optimizer, learning_rate)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def weights(self) -> dict[str, Tensor]:
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in trainable_state(self.module).items()}

    def moments(self) -> dict[str, Tensor]:
        return optimizer_state(self.optimizer)

    def load(self, folder: Path) -> None:
        load_weights(folder, self.module, self.optimizer)

    def release(self) -> None:
        """Do nothing: the module is not wrapped."""
