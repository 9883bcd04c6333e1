# SPDX-License-Identifier: Apache-2.0
"""What a stage trains: the projector alone, or the projector and LoRA adapters on the language model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from aced_sdk.errors import EngineError, MissingPackageError, UnsupportedError
from vlm.config import Adapt, Align

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import LlavaForConditionalGeneration

PROJECTOR = "multi_modal_projector"
_PARTS = {"projector": f"{PROJECTOR}.", "adapter": "lora_", "vision tower": "vision_tower.", "language model": ""}


def base_of(model: Any) -> LlavaForConditionalGeneration:
    """The LLaVA model itself, whether or not peft has wrapped it."""
    from transformers import LlavaForConditionalGeneration

    base = model if isinstance(model, LlavaForConditionalGeneration) else model.get_base_model()
    if not isinstance(base, LlavaForConditionalGeneration):
        raise UnsupportedError(
            f"this version tunes and saves LlavaForConditionalGeneration, not {type(base).__name__}",
            remedy="use vlm.build",
            field="model",
        )
    return base


def has_adapter(model: nn.Module) -> bool:
    """Whether LoRA layers have been put into the model."""
    return any(".lora_A." in name for name, _ in model.named_parameters())


def prepare(
    model: LlavaForConditionalGeneration, stage: Align | Adapt, seed: int
) -> LlavaForConditionalGeneration | PeftModel:
    """Freeze all but what the stage trains; an Adapt stage puts its adapters in.

    Raises:
        MissingPackageError: if peft is needed and not installed.
    """
    model.requires_grad_(False)
    if isinstance(stage, Align):
        model.model.multi_modal_projector.requires_grad_(True)
        return model
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise MissingPackageError(
            f"LoRA needs peft: {error}", remedy="pip install 'aced-sdk[vlm]'", field="stages"
        ) from error
    lora = LoraConfig(
        r=stage.lora.rank,
        lora_alpha=stage.lora.alpha,
        lora_dropout=stage.lora.dropout,
        target_modules=stage.lora.target_modules,
        modules_to_save=[PROJECTOR],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(model, lora)


def part_of(name: str) -> str:
    """Which part of the model a parameter belongs to."""
    return next(part for part, mark in _PARTS.items() if mark in name)


def table(model: nn.Module) -> dict[str, dict[str, int]]:
    """Parameters per part, trained and frozen."""
    counts = {part: {"trained": 0, "frozen": 0} for part in _PARTS}
    for name, parameter in model.named_parameters():
        counts[part_of(name)]["trained" if parameter.requires_grad else "frozen"] += parameter.numel()
    return counts


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all trained parameters."""
    return {name: p.detach().cpu().clone() for name, p in model.named_parameters() if p.requires_grad}


def check_saved(weights: Path, model: nn.Module, start: Mapping[str, Tensor]) -> None:
    """Read saved weights back: nothing empty, equal to the model's, and every trained part changed from the start.

    Args:
        weights: safetensors file of all trained parameters.
        model: what was saved.
        start: `snapshot` before the first step.

    Raises:
        EngineError: if one of these does not hold; the run must not go on towards an artefact that lost its training.
    """
    saved = load_file(weights)
    now = snapshot(model)
    for name, value in now.items():
        if name not in saved or saved[name].numel() == 0 or not torch.equal(saved[name], value):
            raise EngineError(
                f"the saved '{name}' is {'missing' if name not in saved else 'not the trained one'}",
                remedy="this is a fault of the engine: use engine.kind='single' or ZeRO stage 0, and report it",
            )
    for part in {part_of(name) for name in now}:
        if all(torch.equal(start[name], value) for name, value in now.items() if part_of(name) == part):
            raise EngineError(
                f"the {part} is as it was before training",
                remedy="raise the learning rate, or check that the data has answers to learn",
            )
