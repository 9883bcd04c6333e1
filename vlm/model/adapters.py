# SPDX-License-Identifier: Apache-2.0
"""What a stage trains: the projector alone, or with it the language model, by adapters or as a whole."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from aced_sdk.errors import EngineError, MissingPackageError, UnsupportedError
from aced_sdk.files import ReadError, check_tensors, printable, read_json, tensor_digest
from vlm.config import Adapt, Align, Lora
from vlm.model.projectors import model_kinds

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

PROJECTOR = "multi_modal_projector"
_PARTS = {"projector": f"{PROJECTOR}.", "adapter": "lora_", "vision tower": "vision_tower.", "language model": ""}

_WEIGHTS = "adapter_model.safetensors"
# What an adapter of `save` may choose; peft's other options import modules, load files or repeat layers by name.
_CHOICES = {
    "r": (1, 2**16),
    "lora_alpha": (1e-6, 1e6),
    "lora_dropout": (0, 1),
    "use_dora": (0, 1),
    "use_rslora": (0, 1),
    "inference_mode": (0, 1),
}
_MAX_TARGETS = 200  # characters
_TARGETS = re.compile(r"\.\*language_model\.\*\\\.\([a-z|]+\)_proj")  # of `Lora.target_modules`
_UNUSED = {"base_model_name_or_path", "revision", "auto_mapping", "peft_version"}


def base_of(model: Any) -> PreTrainedModel:
    """The vision-language model itself, whether or not peft has wrapped it.

    Raises:
        UnsupportedError: if it is of no kind that `vlm.build` makes.
    """
    kinds = model_kinds()
    base: PreTrainedModel = model if isinstance(model, kinds) else getattr(model, "get_base_model", lambda: model)()
    if not isinstance(base, kinds):
        raise UnsupportedError(
            f"this package tunes and saves {', '.join(kind.__name__ for kind in kinds)}, not {type(base).__name__}",
            remedy="use vlm.build",
            field="model",
        )
    return base


def has_adapter(model: nn.Module) -> bool:
    """Whether LoRA layers have been put into the model."""
    return any(".lora_A." in name for name, _ in model.named_parameters())


def load_adapter(model: PreTrainedModel, folder: Path) -> tuple[PeftModel, set[str]]:
    """The model with the adapter of a folder, and the names of the tensors that its file lacks.

    Raises:
        ReadError: if it is not a LoRA adapter of the form that `vlm.save` writes, or has tensors of another model.
        Exception: of peft, if config or weights are broken.
    """
    from peft import PeftModel, get_peft_model_state_dict

    held = _check_adapter(folder)
    with _quiet():
        adapted: Any = PeftModel.from_pretrained(model, str(folder), trust_remote_code=False, use_safetensors=True)
    expected = get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
    if unknown := sorted(held - expected):
        raise ReadError(f"the adapter's {printable(unknown[0])} has no place in the model", remedy="save it again")
    return adapted, expected - held


def _check_adapter(folder: Path) -> set[str]:
    """The names of an adapter's tensors, after a check of its config."""
    from peft import LoraConfig

    config = read_json(folder / "adapter_config.json")
    if not isinstance(config, dict):
        raise ReadError(f"{printable(folder / 'adapter_config.json')} holds no JSON object", remedy="save it again")
    check_tensors(folder / _WEIGHTS)
    with safe_open(folder / _WEIGHTS, framework="pt") as file:
        held = set(file.keys())
        ranks = {file.get_slice(name).get_shape()[0] for name in held if ".lora_A." in name}
    targets = config.pop("target_modules", None)
    if not isinstance(targets, str) or len(targets) > _MAX_TARGETS or not _TARGETS.fullmatch(targets):
        raise ReadError(f"the adapter's target_modules are {printable(repr(targets), 200)}", remedy="save it again")
    plain = LoraConfig().to_dict() | {"peft_type": "LORA", "modules_to_save": [PROJECTOR], "r": config.get("r")}
    for key, value in config.items():
        low, high = _CHOICES.get(key, (1, 0))
        chosen = key in _UNUSED or (isinstance(value, int | float) and low <= value <= high)
        if not chosen and (key in _CHOICES or value not in (plain.get(key), None, False, {}, [])):
            raise ReadError(f"the adapter's {printable(key)} is {printable(repr(value))}", remedy="save it again")
    if ranks != {config.get("r")}:
        raise ReadError(f"the adapter's weights have the ranks {sorted(ranks)}, not r", remedy="save it again")
    return held


def prepare(model: PreTrainedModel, stage: Align | Adapt, seed: int) -> PreTrainedModel | PeftModel:
    """Freeze all but what the stage trains; an Adapt stage puts its adapters in.

    Raises:
        MissingPackageError: if peft or bitsandbytes is needed and not installed.
        UnsupportedError: if the language model has no layers of the names that adapters go to.
    """
    model.requires_grad_(False)
    if isinstance(stage, Adapt) and stage.lora is not None:
        return _with_adapters(model, stage.lora, seed)
    model.model.multi_modal_projector.requires_grad_(True)
    if isinstance(stage, Adapt):
        model.model.language_model.requires_grad_(True)
        model.lm_head.requires_grad_(True)
    return model


def check_adapters(model: PreTrainedModel, lora: Lora) -> list[str]:
    """The names of the layers that get adapters; call it before anything is trained.

    Raises:
        MissingPackageError: if peft or bitsandbytes is needed and not installed.
        UnsupportedError: if the language model has no layers of these names.
    """
    _import("peft", "LoRA needs peft", "pip install 'aced-sdk[vlm]'", "stages")
    if lora.qlora:
        remedy = "pip install bitsandbytes, or leave out qlora=True"
        _import("bitsandbytes", "QLoRA needs bitsandbytes", remedy, "lora.qlora")
    targets = [name for name, _ in model.named_modules() if re.fullmatch(lora.target_modules, name)]
    if not targets:
        raise UnsupportedError(
            f"the language model, a '{model.config.text_config.model_type}', has no layers of the names "
            f"{', '.join(f'{layer}_proj' for layer in lora.layers)}",
            remedy="train it as a whole with Adapt(lora=None), or take a Llama-, Qwen- or Gemma-like one",
            field="lora.layers",
        )
    return targets


def _import(name: str, cause: str, remedy: str, field: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise MissingPackageError(f"{cause}: {error}", remedy=remedy, field=field) from error


def _with_adapters(model: PreTrainedModel, lora: Lora, seed: int) -> PeftModel:
    targets = check_adapters(model, lora)
    from peft import LoraConfig, get_peft_model

    if lora.qlora:
        _to_four_bits(model, targets)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        modules_to_save=[PROJECTOR],
        use_dora=lora.dora,
    )
    with torch.random.fork_rng(devices=[]), _quiet():
        torch.manual_seed(seed)
        return get_peft_model(model, config)


@contextmanager
def _quiet() -> Iterator[None]:
    """Ignore what peft's call of a renamed attribute makes transformers 5 warn of: no user can change it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def _to_four_bits(model: Any, names: list[str]) -> None:
    """Hold these linear layers in NF4 from now on, so that peft puts its 4-bit adapters on them."""
    bitsandbytes = import_module("bitsandbytes")
    for name in names:
        parent, _, own = name.rpartition(".")
        old = model.get_submodule(name)
        new = bitsandbytes.nn.Linear4bit(
            old.in_features, old.out_features, old.bias is not None, compute_dtype=old.weight.dtype, quant_type="nf4"
        )
        new.weight = bitsandbytes.nn.Params4bit(old.weight.data, requires_grad=False, quant_type="nf4", module=new)
        new.bias = old.bias
        new.support_avx512bf16_for_cpu = False  # else the first answer on a CPU repacks the weights, with a loss
        setattr(model.get_submodule(parent), own, new.to(old.weight.device))
    model.is_loaded_in_4bit = True  # what peft asks


def part_of(name: str) -> str:
    """Which part of the model a parameter belongs to."""
    return next(part for part, mark in _PARTS.items() if mark in name)


def table(model: nn.Module) -> dict[str, dict[str, int]]:
    """Parameters per part, trained and frozen."""
    counts = {part: {"trained": 0, "frozen": 0} for part in _PARTS}
    for name, parameter in model.named_parameters():
        counts[part_of(name)]["trained" if parameter.requires_grad else "frozen"] += parameter.numel()
    return counts


def shown(counts: Mapping[str, Mapping[str, int]]) -> str:
    """`table` for people, a line for each part."""
    head = f"{'part':<16}{'trained':>15}{'frozen':>15}"
    lines = [f"{part:<16}{count['trained']:>15,}{count['frozen']:>15,}" for part, count in counts.items()]
    return "\n".join([head, *lines])


def snapshot(model: nn.Module) -> dict[str, str]:
    """A digest of every trained parameter."""
    return {name: tensor_digest({name: p}) for name, p in model.named_parameters() if p.requires_grad}


def check_saved(weights: Path, trained: Mapping[str, Tensor], start: Mapping[str, str]) -> None:
    """Read saved weights back: nothing empty, equal to the model's, and every trained part changed from the start.

    Args:
        weights: safetensors file of all trained parameters.
        trained: the model's own.
        start: `snapshot` before the first step.

    Raises:
        EngineError: if one of these does not hold; the run must not go on towards an artefact that lost its training.
    """
    saved: dict[str, Tensor] = load_file(weights)
    changed: dict[str, bool] = {}
    for name, before in start.items():
        if name not in saved or saved[name].numel() == 0 or not torch.equal(saved[name], trained[name]):
            raise EngineError(
                f"the saved '{name}' is {'missing' if name not in saved else 'not the trained one'}",
                remedy="this is a fault of the engine: use engine.kind='single' or ZeRO stage 0, and report it",
            )
        part = part_of(name)
        changed[part] = changed.get(part, False) or tensor_digest({name: trained[name]}) != before
    for part, moved in changed.items():
        if not moved:
            raise EngineError(
                f"the {part} is as it was before training",
                remedy="raise the learning rate, or check that the data has answers to learn",
            )
