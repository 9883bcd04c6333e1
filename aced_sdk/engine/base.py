# SPDX-License-Identifier: Apache-2.0
"""The interface of both engines for taking and storing steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from aced_sdk.config import Engine as EngineConfig
from aced_sdk.config import Optimizer as OptimizerConfig
from aced_sdk.engine.ranks import Ranks
from aced_sdk.errors import EngineError


class Engine(Protocol):
    """Holds the module and its optimizer.

    Attributes:
        module: what is trained; never wrapped, so that its names are the ones a folder holds.
        device: where inputs must lie.
        ranks: this process among those of its launch.
    """

    module: nn.Module
    device: torch.device
    ranks: Ranks

    def forward(self, *inputs: Any) -> Any:
        """Run the module with gradient, in the engine's precision."""

    def backward(self, loss: Tensor, last: bool = True) -> None:
        """Add the gradient of `loss`, of which all processes take the mean; `last` marks the last before `step`."""

    def step(self, learning_rate: float) -> float:
        """Clip, update at this rate, clear gradients; returns the gradient norm before clipping.

        A norm that is not finite leaves the weights as they are.
        """

    def weights(self) -> dict[str, Tensor]:
        """Trained weights and buffers, whole, on the CPU. Every process takes part; all but rank 0 get nothing."""

    def moments(self) -> dict[str, Tensor]:
        """The optimizer's state, as `weights` gives those: per parameter's number `step`, `exp_avg`, `exp_avg_sq`."""

    def load(self, folder: Path) -> None:
        """Read what `save_checkpoint` wrote, in one form for all engines and world sizes.

        Raises:
            EngineError: if the folder does not fit.
        """

    def release(self) -> None:
        """Give the module's parameters back whole and plain, in every process; the engine takes no more steps."""


def parameter_groups(
    module: nn.Module, config: OptimizerConfig, factors: dict[str, float] | None = None
) -> list[dict[str, Any]]:
    """AdamW groups: decay on matrices only, and a learning-rate factor per name prefix.

    Args:
        module: its trainable parameters are taken.
        config: weight decay.
        factors: name prefix to factor on the learning rate; the longest match counts, 1 without one.
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
    """Torch's fused AdamW over `parameter_groups`."""
    return torch.optim.AdamW(parameter_groups(module, config, factors), betas=config.betas, fused=True)


def set_learning_rate(optimizer: Any, learning_rate: float) -> None:
    """Put a rate into effect, each group's factor kept."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("factor", 1.0)


def precision(config: EngineConfig, device: torch.device) -> AbstractContextManager[Any]:
    """Autocast to bfloat16 where the config asks for it."""
    if config.precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def pick_device(config: EngineConfig, local_rank: int) -> torch.device:
    """The device of this process.

    Raises:
        EngineError: if CUDA is asked for and not there.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise EngineError(
            "torch finds no CUDA device here", remedy="set engine.device to 'auto' or 'cpu'", field="engine.device"
        )
    cuda = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    return torch.device("cuda", local_rank) if cuda else torch.device("cpu")


@contextmanager
def thread_limit(threads: int | None) -> Iterator[None]:
    """Limit torch's CPU threads for a block, and give the former number back."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
