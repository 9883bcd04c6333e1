# SPDX-License-Identifier: Apache-2.0
"""Save and load trainable weights and AdamW state as safetensors, without pickle."""

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
    """Return trainable parameters and all buffers (such as batch-norm statistics), without frozen weights."""
    frozen = {name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}
    return {name: tensor for name, tensor in module.state_dict().items() if name not in frozen}


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return copies of the optimizer's tensors as `index.key`; parameters are indexed in the order of the groups."""
    return {
        f"{index}.{key}": value.detach().to("cpu", copy=True)
        for index, values in optimizer.state_dict()["state"].items()
        for key, value in values.items()
    }


def save_state(folder: Path, weights: dict[str, Tensor], moments: dict[str, Tensor]) -> None:
    """Write `weights.safetensors` and `optimizer.safetensors` into `folder`. No two tensors may share memory."""
    save_tensors(folder / "weights.safetensors", {name: t.contiguous() for name, t in weights.items()})
    save_tensors(folder / "optimizer.safetensors", {name: t.contiguous() for name, t in moments.items()})


def unreadable(folder: Path, error: Exception) -> EngineError:
    """The error for a checkpoint that cannot be read."""
    cause = error.cause if isinstance(error, AcedError) else error
    return EngineError(
        f"the checkpoint {printable(folder)} cannot be read: {printable(cause)}",
        remedy="remove that folder and resume from the next older checkpoint",
    )


def load_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """Load the tensors of a file in a checkpoint.

    Raises:
        EngineError: if the file is missing, damaged, or a link out of the checkpoint.
    """
    try:
        path = inside(folder, name)
        check_tensors(path)
        return dict(load_file(path))
    except (OSError, RuntimeError, MemoryError, ReadError, SafetensorError) as error:  # two mean out of memory
        raise unreadable(folder, error) from error


def read_state(
    folder: Path, shapes: Mapping[str, torch.Size], trained: Sequence[torch.Size], types: Mapping[str, torch.dtype]
) -> tuple[dict[str, Tensor], dict[int, dict[str, Tensor]]]:
    """Read the files of `save_state`: weights by name, and the optimizer's tensors by parameter index.

    Args:
        folder: a checkpoint.
        shapes: expected shapes of the weights.
        trained: shapes of the optimizer's parameters, in their order.
        types: expected dtypes of the weights. The optimizer's tensors have one of them, or float32.

    Raises:
        EngineError: if a file is missing, damaged or of another model.
    """
    weights, moments = (load_tensors(folder, name) for name in ("weights.safetensors", "optimizer.safetensors"))
    _check(folder, weights, dict(shapes))
    allowed = {name: {types[name]} for name in weights} | {
        name: {torch.float32, *types.values()} - {torch.int64, torch.bool} for name in moments
    }
    for name, tensor in (weights | moments).items():
        if tensor.dtype not in allowed[name]:  # torch would convert it and could lose information
            raise unreadable(folder, TypeError(f"{printable(name)} holds {tensor.dtype}"))
    # A parameter that never got a gradient has no moments.
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
    """Load the files of `save_state` into a module and an optimizer.

    Raises:
        EngineError: if a file is missing, damaged or of another model.
    """
    own = trainable_state(module)
    trained = [parameter.shape for group in optimizer.param_groups for parameter in group["params"]]
    shapes, types = ({name: getattr(t, of) for name, t in own.items()} for of in ("shape", "dtype"))
    weights, state = read_state(folder, shapes, trained, types)
    module.load_state_dict(weights, strict=False)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
