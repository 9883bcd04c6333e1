# SPDX-License-Identifier: Apache-2.0
"""Weights of a model folder: safetensors alone, compared with the model's outline before any tensor is read."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aced_sdk.errors import ModelError
from aced_sdk.files import open_regular, printable

_MAX_HEADER = 16 * 2**20  # of a safetensors file; a tensor takes about 150 bytes of it
_DTYPES = {"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"}
_MAX_LOG_SCALE, _MAX_BIAS = math.log(1e6), 1e6  # an ONNX export has the same bounds
_REMEDY = "restore or re-save the folder"


def check_fit(outline: Any, path: Path, foreign: bool) -> None:
    """Compare the names and shapes in a safetensors file's header with a model's.

    Args:
        outline: the model on the meta device.
        path: the file.
        foreign: as for `read_weights`.

    Raises:
        ModelError: if the file is broken, lacks tensors, or holds unknown ones or other shapes.
        ReadError: if the file cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    own = outline.state_dict()
    with open_regular(path) as stream:
        header = int.from_bytes(stream.read(8), "little")
        size = os.fstat(stream.fileno()).st_size
    if header > _MAX_HEADER or size > 8 + header + sum(8 * tensor.numel() for tensor in own.values()):
        raise _unfit(path, f"it has {size:,} bytes, {header:,} of them of its header")
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            kinds = {part.get_dtype() for part in slices.values()}
            found = {name: torch.empty(part.get_shape(), device="meta") for name, part in slices.items()}
        if kinds - _DTYPES:
            raise ValueError(f"it holds tensors of the type {min(kinds - _DTYPES)}")
        found = _own_names(outline, found) if foreign else found
    except (SafetensorError, OSError, RuntimeError, KeyError, ValueError) as error:
        raise _unfit(path, str(error)) from None
    for name in own.keys() & found.keys():
        if own[name].shape != found[name].shape:
            raise _unfit(path, f"{printable(name)} is {[*found[name].shape]} and must be {[*own[name].shape]}")
    missing, unknown = sorted(own.keys() - found.keys()), sorted(found.keys() - own.keys())
    if missing or unknown:
        raise ModelError(
            f"{printable(path)} lacks {len(missing)} tensors and has {len(unknown)} unknown ones "
            f"({printable((missing + unknown)[0])} first)",
            remedy=_REMEDY,
        )


def read_weights(model: Any, path: Path, foreign: bool) -> None:
    """Load a safetensors file into a model that it fits.

    Args:
        model: the model.
        path: the file.
        foreign: whether open_clip or another library wrote it, perhaps under older names.

    Raises:
        ModelError: if the file is broken or does not fit.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights = load_file(path)
        weights = _own_names(model, weights) if foreign else weights
        _check_values(model, weights, path)
        model.load_state_dict(weights)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise _unfit(path, str(error)) from error


def is_finite(tensor: Tensor) -> bool:
    """Whether every value is finite; needs no memory for it. True for whole numbers."""
    if not tensor.is_floating_point() or tensor.numel() == 0 or tensor.is_meta:
        return True
    low, high = torch.aminmax(tensor.detach())  # both are NaN if one value is
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _check_values(model: Any, weights: dict[str, Tensor], path: Path) -> None:
    """Refuse whole numbers in the place of real ones, values that are not finite, and a scale that overflows."""
    for name, own in model.state_dict().items():
        tensor = weights.get(name)
        if tensor is None:
            continue
        if own.is_floating_point() != tensor.is_floating_point():
            raise _unfit(path, f"{printable(name)} is of the type {tensor.dtype}")
        if not is_finite(tensor.to(own.dtype)):  # 1e300 is infinite in float32
            raise _unfit(path, f"{printable(name)} has values that are not finite")
    for name, most in (("logit_scale", _MAX_LOG_SCALE), ("logit_bias", _MAX_BIAS)):
        if name in weights and bool((weights[name].abs() > most).any()):
            raise _unfit(path, f"{name} is {weights[name].flatten()[0].item():.3g}, beyond {most:.3g}")


def _unfit(path: Path, why: str) -> ModelError:
    return ModelError(f"{printable(path)} does not fit its config: {printable(why)}", remedy=_REMEDY)


def _own_names(model: Any, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names and shapes that open_clip gives its tensors today, as its own loader of checkpoints does it."""
    from open_clip.convert import convert_state_dict
    from open_clip.model import convert_to_custom_text_state_dict

    own = model.state_dict()
    if next(iter(weights), "").startswith("module."):  # saved from a model wrapped for several GPUs
        weights = {name.removeprefix("module."): tensor for name, tensor in weights.items()}
    weights = convert_state_dict(model, dict(weights))
    if "positional_embedding" in weights and "positional_embedding" not in own:
        weights = convert_to_custom_text_state_dict(weights)
    if "logit_bias" in own and "logit_scale" in weights:
        weights.setdefault("logit_bias", torch.zeros_like(weights["logit_scale"]))
    for name in ("logit_scale", "logit_bias"):
        if name in own and name in weights:
            weights[name] = weights[name].reshape(own[name].shape)
    if "text.transformer.embeddings.position_ids" not in own:
        weights.pop("text.transformer.embeddings.position_ids", None)
    return weights
