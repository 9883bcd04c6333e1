# SPDX-License-Identifier: Apache-2.0
"""Shallow copies of a model, so that an inference call changes nothing that another thread can see."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


def replaced(model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A model that shares everything with `model` but the named parameters and buffers.

    Unlike `torch.func.functional_call` it leaves `model` itself untouched, also when it is interrupted.

    Args:
        model: any module.
        tensors: {dotted name inside `model`: tensor}, of any shape that the forward pass takes.
    """
    if not tensors:
        return model
    root = _shallow(model)
    for name, tensor in tensors.items():
        *path, last = name.split(".")
        module, original = root, model
        for part in path:
            original = original._modules[part]  # type: ignore[assignment]
            if module._modules[part] is original:
                module._modules[part] = _shallow(original)
            module = module._modules[part]  # type: ignore[assignment]
        module._parameters.pop(last, None)
        module._buffers.pop(last, None)
        module.__dict__[last] = tensor
    return root


def evaluating(model: nn.Module) -> nn.Module:
    """The model itself if it is in evaluation mode, else a copy that is and shares parameters and buffers with it."""
    if not any(module.training for module in model.modules()):
        return model
    copies: dict[nn.Module, nn.Module] = {}
    for module in model.modules():
        copies[module] = _shallow(module)
        copies[module].__dict__["training"] = False
    for module, copy in copies.items():
        copy._modules = {name: child and copies[child] for name, child in module._modules.items()}
    return copies[model]


def _shallow(module: nn.Module) -> nn.Module:
    copy: nn.Module = module.__new__(type(module))
    copy.__dict__ = module.__dict__ | {
        table: dict(module.__dict__[table]) for table in ("_parameters", "_buffers", "_modules")
    }
    return copy
