# SPDX-License-Identifier: Apache-2.0
"""Trainable weights and AdamW state as safetensors: no pickle is ever read back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from aced_sdk.errors import AcedError, EngineError
from aced_sdk.files import ReadError, check_tensors, inside, printable, save_tensors

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def trainable_state(module: nn.Module) -> dict[str, Tensor]:
    """What training changes: trainable parameters and buffers (batch-norm statistics), not frozen weights."""
    frozen = {name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}
    return {name: tensor for name, tensor in module.state_dict().items() if name not in frozen}


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's tensors as `index.key`; parameters are counted through its groups, in their order."""
    return {
        f"{index}.{key}": value.detach().cpu()
        for index, values in optimizer.state_dict()["state"].items()
        for key, value in values.items()
    }


def save_state(folder: Path, weights: dict[str, Tensor], moments: dict[str, Tensor]) -> None:
    """Write `weights.safetensors` and `optimizer.safetensors` into `folder`."""
    # Tied weights share storage, which safetensors refuses.
    save_tensors(folder / "weights.safetensors", {name: t.contiguous().clone() for name, t in weights.items()})
    save_tensors(folder / "optimizer.safetensors", {name: t.contiguous() for name, t in moments.items()})


def unreadable(folder: Path, error: Exception) -> EngineError:
    """The error for a checkpoint that cannot be read."""
    cause = error.cause if isinstance(error, AcedError) else error
    return EngineError(
        f"the checkpoint {printable(folder)} cannot be read: {printable(cause)}",
        remedy="remove that folder and resume from the next older checkpoint",
    )


def load_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """The tensors of a file of a checkpoint.

    Raises:
        EngineError: if it is missing, torn, or a link out of the checkpoint.
    """
    try:
        path = inside(folder, name)
        check_tensors(path)
        return dict(load_file(path))
    except (OSError, RuntimeError, MemoryError, ReadError, SafetensorError) as error:  # two of them: no memory for it
        raise unreadable(folder, error) from error


def read_state(
    folder: Path, shapes: Mapping[str, torch.Size], trained: Sequence[torch.Size], types: Mapping[str, torch.dtype]
) -> tuple[dict[str, Tensor], dict[int, dict[str, Tensor]]]:
    """Read what `save_state` wrote: weights by name, and by parameter the optimizer's tensors.

    Args:
        folder: a checkpoint.
        shapes: those of the weights that must be there.
        trained: those of the optimizer's parameters, in their order.
        types: number formats of the weights; the optimizer's are among them, or float32.

    Raises:
        EngineError: if a file is missing, torn or of another model.
    """
    weights, moments = (load_tensors(folder, name) for name in ("weights.safetensors", "optimizer.safetensors"))
    _check(folder, weights, dict(shapes))
    allowed = {name: {types[name]} for name in weights} | {
        name: {torch.float32, *types.values()} - {torch.int64, torch.bool} for name in moments
    }
    for name, tensor in (weights | moments).items():
        if tensor.dtype not in allowed[name]:  # torch would convert it, an imaginary part or a fraction lost
            raise unreadable(folder, TypeError(f"{printable(name)} holds {tensor.dtype}"))
    # A parameter that has taken part in no step has no moments.
    indices = {name.split(".")[0] for name in moments}
    expected = {f"{i}.{key}": shape for i, shape in enumerate(trained) if str(i) in indices for key in _MOMENTS}
    _check(folder, moments, expected | {name: torch.Size() for name in expected if name.endswith(".step")})
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in moments.items():
        index, key = name.split(".")
        state.setdefault(int(index), {})[key] = value
    return weights, state


def _check(folder: Path, found: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> None:
    sizes = {name: tensor.shape for name, tensor in found.items()}
    if other := sorted({name for name, _ in shapes.items() ^ sizes.items()}):
        raise EngineError(
            f"the checkpoint {printable(folder)} is of another model "
            f"({len(other)} tensors differ, {printable(other[0])} first)",
            remedy="resume with the config that the run was started with",
        )


def load_weights(folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put what `save_state` wrote into a module and optimizer of the same shape.

    Raises:
        EngineError: if a file is missing, torn or of another model.
    """
    own = trainable_state(module)
    trained = [parameter.shape for group in optimizer.param_groups for parameter in group["params"]]
    shapes, types = ({name: getattr(t, of) for name, t in own.items()} for of in ("shape", "dtype"))
    weights, state = read_state(folder, shapes, trained, types)
    module.load_state_dict(weights, strict=False)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
