# SPDX-License-Identifier: Apache-2.0
"""Trainable weights and AdamW state as safetensors: no pickle is ever read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from aced_sdk.errors import EngineError
from aced_sdk.files import save_tensors


def trainable_state(module: nn.Module) -> dict[str, Tensor]:
    """What training changes: trainable parameters and buffers (batch-norm statistics), not frozen weights."""
    frozen = {name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}
    return {name: tensor for name, tensor in module.state_dict().items() if name not in frozen}


def save_weights(folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write `weights.safetensors` and `optimizer.safetensors` into `folder`."""
    weights = {name: t.detach().cpu().contiguous().clone() for name, t in trainable_state(module).items()}
    save_tensors(folder / "weights.safetensors", weights)
    state = optimizer.state_dict()["state"]
    moments = {
        f"{index}.{name}": value.detach().cpu().contiguous()
        for index, values in state.items()
        for name, value in values.items()
    }
    save_tensors(folder / "optimizer.safetensors", moments)


def load_weights(folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Read what `save_weights` wrote into a module and optimizer of the same shape.

    Raises:
        EngineError: if a file is missing, torn or of another model.
    """
    try:
        weights = load_file(folder / "weights.safetensors")
        moments = load_file(folder / "optimizer.safetensors")
    except (OSError, SafetensorError) as error:
        raise EngineError(
            f"the checkpoint {folder} cannot be read: {error}",
            remedy="remove that folder and resume: the next older checkpoint serves",
        ) from error
    expected = {(name, tensor.shape) for name, tensor in trainable_state(module).items()}
    found = {(name, tensor.shape) for name, tensor in weights.items()}
    if expected != found:
        other = sorted({name for name, _ in expected ^ found})
        raise EngineError(
            f"the checkpoint {folder} is of another model ({len(other)} tensors differ, {other[0]} first)",
            remedy="resume with the config that the run was started with",
        )
    module.load_state_dict(weights, strict=False)
    state: dict[int, dict[str, Any]] = {}
    for name, value in moments.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
