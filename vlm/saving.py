# SPDX-License-Identifier: Apache-2.0
"""Models in and out of folders that transformers and peft open without this package."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aced_sdk.errors import ModelError
from aced_sdk.files import whole_folder, write_json
from vlm.adapters import base_of, has_adapter

if TYPE_CHECKING:
    from transformers import LlavaProcessor, PreTrainedModel

_CARD = """---
library_name: {library}
pipeline_tag: image-text-to-text
---
A vision-language model tuned with ACED SDK. {how}
"""
_BASE, _ADAPTER = "base", "adapter"
# Where each part lies in memory, and where servers and transformers 4 look for it on disk.
_CLASSIC = {
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
}
_VIT = "vision_tower.vision_model."
_VITS = ("clip_vision_model", "siglip_vision_model")  # transformers 4 keeps these in a submodule of this name


def save(model: Any, processor: LlavaProcessor, directory: str | Path, merge: bool = True) -> Path:
    """Write a model and its processor, whole or not at all; the model in memory stays as it is.

    Weights have LLaVA's classic names (`classic_names`) and the JSON files what older readers look for, so that
    transformers 4, transformers 5 and servers all read the folder.

    Args:
        model: a LLaVA model, or the PeftModel that `tune` gave.
        processor: its processor.
        directory: replaced if it exists.
        merge: True writes one folder for `AutoModelForImageTextToText`, adapters added into the weights. False writes
            `base/` (the model without its training) and `adapter/` for `PeftModel.from_pretrained(base, adapter)`; the
            trained projector lies in the adapter.

    Raises:
        ModelError: with merge=False, if the model has no adapters, or is not the PeftModel that holds them.
    """
    base = base_of(model)
    target = Path(directory)
    if not merge and (model is base or not has_adapter(base)):
        raise ModelError(
            "there is no adapter to keep apart",
            remedy="pass TuneResult.model after an Adapt stage, or set merge=True",
            field="merge",
        )
    with whole_folder(target) as folder:
        if merge:
            _write(base, processor, folder, trained=True)
            how = f'`AutoModelForImageTextToText.from_pretrained("{target.name}")` and `AutoProcessor` open it.'
            (folder / "README.md").write_text(_CARD.format(library="transformers", how=how), encoding="utf-8")
        else:
            _write(base, processor, folder / _BASE, trained=False)
            model.save_pretrained(folder / _ADAPTER, save_embedding_layers=False)
            how = f"`PeftModel.from_pretrained(model, '{_ADAPTER}')` puts the adapter on the model of `{_BASE}`."
            (folder / _ADAPTER / "README.md").unlink(missing_ok=True)  # peft's own has placeholders only
            (folder / "README.md").write_text(_CARD.format(library="peft", how=how), encoding="utf-8")
    return target


def load(directory: str | Path) -> tuple[Any, LlavaProcessor]:
    """A model and its processor from what `save` wrote, merged or apart, or from any LLaVA folder of transformers.

    Raises:
        ModelError: if the folder is neither.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = Path(directory)
    apart = (folder / _ADAPTER / "adapter_config.json").is_file()
    try:
        model = AutoModelForImageTextToText.from_pretrained(folder / _BASE if apart else folder, local_files_only=True)
        processor = AutoProcessor.from_pretrained(folder / _BASE if apart else folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{folder} holds no model: {error}", remedy="name a folder that vlm.save wrote", field="directory"
        ) from error
    base_of(model)
    if apart:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(folder / _ADAPTER))
    return model.eval(), processor


def _write(base: PreTrainedModel, processor: LlavaProcessor, folder: Path, trained: bool) -> None:
    with torch.device("meta"):  # an empty shell that lends its save_pretrained to the plain weights
        shell = type(base)(base.config)
    shell.load_state_dict(plain_state(base, trained), assign=True)
    shell.tie_weights()
    shell.generation_config = base.generation_config
    state = shell.state_dict()
    if shell.lm_head.weight is shell.get_input_embeddings().weight:
        del state["lm_head.weight"]  # tied: the config says so, and a file holds a tensor once
    tower = base.config.vision_config.model_type
    if tower in _VITS:  # transformers 5 has a naming of its own for these, which version 4 and servers do not know
        shell.save_pretrained(folder, state_dict=classic_names(state, tower), save_original_format=False)
    else:
        shell.save_pretrained(folder, state_dict=state)
    processor.save_pretrained(folder)
    _classic_json(folder)


def _classic_json(folder: Path) -> None:
    """Add what transformers 4 and servers look for; without it they compute other numbers, or open no processor."""
    config = _read(folder / "config.json")
    rope = config["text_config"].get("rope_parameters") or {}
    if "rope_theta" in rope:  # a missing one is silently 10,000 in version 4
        config["text_config"]["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            config["text_config"]["rope_scaling"] = rope
    write_json(folder / "config.json", config)
    parts = _read(folder / "processor_config.json")
    if "image_processor" in parts:
        write_json(folder / "preprocessor_config.json", parts.pop("image_processor"))
        write_json(folder / "processor_config.json", parts)
    tokenizer = _read(folder / "tokenizer_config.json")
    if tokenizer.get("tokenizer_class") == "TokenizersBackend":  # version 5's name for the same class
        tokenizer |= {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_input_names": ["input_ids", "attention_mask"],
        }
    write_json(folder / "tokenizer_config.json", tokenizer)


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def classic_names(state: Mapping[str, Tensor], tower: str) -> dict[str, Tensor]:
    """A LLaVA state dict under the names of LLaVA-1.5's published checkpoints.

    They are `vision_tower.vision_model.*` (`vision_tower.*` for a tower that is no CLIP or SigLIP ViT),
    `multi_modal_projector.*`, `language_model.model.*` and `language_model.lm_head.*`.

    Args:
        state: a state dict of `LlavaForConditionalGeneration` or `AyaVisionForConditionalGeneration`.
        tower: the vision config's `model_type`.
    """
    classic = {}
    for name, tensor in state.items():
        part = next(part for part in _CLASSIC if name.startswith(part))
        renamed = _CLASSIC[part] + name.removeprefix(part)
        if tower in _VITS and renamed.startswith("vision_tower.") and not renamed.startswith(_VIT):
            renamed = _VIT + renamed.removeprefix("vision_tower.")
        classic[renamed] = tensor
    return classic


def plain_state(base: PreTrainedModel, trained: bool) -> dict[str, Tensor]:
    """The state dict as if peft had never touched the model.

    Args:
        base: a model, with or without adapters.
        trained: whether adapters are added into the weights and the trained projector is taken, or neither.
    """
    unwanted, wanted = (
        (".original_module.", ".modules_to_save.default.")
        if trained
        else (".modules_to_save.default.", ".original_module.")
    )
    modules = dict(base.named_modules())
    state: dict[str, Tensor] = {}
    for name, tensor in base.state_dict().items():
        if ".lora_" in name or unwanted in name or ".base_layer.weight." in name:  # the last: how 4 bits are read
            continue
        if name.endswith(".base_layer.weight"):
            tensor = _weight(modules[name.removesuffix(".base_layer.weight")], trained)
        state[name.replace(".base_layer.", ".").replace(wanted, ".")] = tensor
    return state


@torch.no_grad()
def _weight(layer: Any, trained: bool) -> Tensor:
    """The weight of a linear layer that has adapters, in full precision, with or without them."""
    from peft.utils.integrations import dequantize_module_weight

    weight: Tensor = dequantize_module_weight(layer.get_base_layer()).detach()
    for adapter in layer.active_adapters if trained else ():
        variant = layer.lora_variant.get(adapter)  # DoRA's magnitudes
        if variant is None:
            weight = weight + layer.get_delta_weight(adapter)
        else:
            weight = variant.merge_safe(layer, adapter, weight)
    return weight
