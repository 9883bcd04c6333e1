# SPDX-License-Identifier: Apache-2.0
"""The interface of engines, and helpers for optimizer, precision and device."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from aced_sdk.config import Engine
from aced_sdk.config import Optimizer as OptimizerConfig
from aced_sdk.engine.ranks import Ranks
from aced_sdk.errors import EngineError


class TrainingEngine(Protocol):
    """Train a module with its optimizer.

    Attributes:
        module: the trained module, not wrapped, so that its parameter names are those of saved folders.
        device: device of the inputs.
        ranks: communication with the other processes.
    """

    module: nn.Module
    device: torch.device
    ranks: Ranks

    def forward(self, *inputs: Any) -> Any:
        """Run the module with gradient, in the engine's precision."""

    def backward(self, loss: Tensor, last: bool = True) -> None:
        """Add the gradient of `loss`, averaged over ranks; set `last` in the last call before `step`.

        The gradient of a non-finite loss is not finite, so that `step` skips it on all ranks.
        """

    def step(self, learning_rate: float) -> float:
        """Clip gradients, update the weights, clear gradients; return the gradient norm before clipping.

        If the norm is not finite, the weights are not updated.
        """

    def weights(self) -> dict[str, Tensor]:
        """Return copies of trained weights and buffers, unsharded on the CPU.

        All ranks call it; only rank 0 gets values.
        """

    def moments(self) -> dict[str, Tensor]:
        """Return the optimizer's state like `weights`: `step`, `exp_avg`, `exp_avg_sq` by index of the parameter."""

    def load(self, folder: Path) -> None:
        """Load a folder of `save_checkpoint`. The format is the same for all engines and world sizes.

        Raises:
            EngineError: if the folder does not match the module.
        """

    def release(self) -> None:
        """Restore the module's plain, unsharded parameters on all ranks. The engine cannot be used afterwards."""


def parameter_groups(
    module: nn.Module, config: OptimizerConfig, factors: dict[str, float] | None = None
) -> list[dict[str, Any]]:
    """Parameter groups of AdamW: weight decay only on matrices, and learning-rate factors by name prefix.

    Args:
        module: its trainable parameters are used.
        config: learning rate and weight decay.
        factors: name prefix to factor on the learning rate; the longest match is used. Default: 1.
    """
    factors = factors or {}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        prefix = max((p for p in factors if name.startswith(p)), key=len, default=None)
        decay = config.weight_decay if parameter.ndim >= 2 else 0.0
        groups.setdefault((decay, 1.0 if prefix is None else factors[prefix]), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "lr": config.learning_rate * factor, "factor": factor}
        for (decay, factor), parameters in groups.items()
    ]


def adamw(module: nn.Module, config: OptimizerConfig, factors: dict[str, float] | None = None) -> torch.optim.AdamW:
    """Torch's fused AdamW with `parameter_groups`."""
    return torch.optim.AdamW(parameter_groups(module, config, factors), betas=config.betas, fused=True)


def set_learning_rate(optimizer: Any, learning_rate: float) -> None:
    """Set the learning rate of all groups, times each group's factor."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("factor", 1.0)


def precision(config: Engine, device: torch.device) -> AbstractContextManager[Any]:
    """Autocast to bfloat16 if `precision` is bf16."""
    if config.precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def pick_device(config: Engine, local_rank: int) -> torch.device:
    """Return the device of this process.

    Raises:
        EngineError: if the config sets CUDA and there is none.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise EngineError(
            "torch finds no CUDA device here", remedy="set engine.device to 'auto' or 'cpu'", field="engine.device"
        )
    cuda = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    return torch.device("cuda", local_rank) if cuda else torch.device("cpu")


def marked(loss: Tensor) -> Tensor:
    """Return a loss whose gradient is NaN if it is not finite itself; else the same loss. No device is synchronised.

    A loss can overflow where its gradient is finite, such as exp of a constant that is added to it.
    """
    return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan).to(loss.dtype)


@contextmanager
def thread_limit(threads: int | None) -> Iterator[None]:
    """Limit torch's CPU threads in a `with` block; the old limit is restored."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
