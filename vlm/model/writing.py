# SPDX-License-Identifier: Apache-2.0
"""A model and its processor as files that transformers and servers read."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from aced_sdk.files import read_json, write_json
from aced_sdk.towers.trust import library_errors
from vlm.model.card import card
from vlm.model.decoding import decoding, drop_settings, warn_of_lost
from vlm.model.tokens import settle

if TYPE_CHECKING:
    from transformers import LlavaProcessor, PreTrainedModel

# Where each part lies in memory, and where servers and transformers 4 look for it on disk.
_CLASSIC = {
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
}
_VIT = "vision_tower.vision_model."
_VITS = ("clip_vision_model", "siglip_vision_model")  # transformers 4 keeps these in a submodule of this name
_QUESTIONS = ("What is this?", "Is it red, 12.5 % or naïve?\n\tHow many?")  # of different lengths


def check_savable(base: PreTrainedModel, processor: LlavaProcessor) -> None:
    """Try all that saving needs, but for the space that the weights take.

    Raises:
        ModelError: if the model or the processor cannot be saved.
    """
    with TemporaryDirectory(prefix="aced-") as folder:
        write(base, processor, Path(folder), trained=True, weights=False)
    card(base, "model", True, None, None, None)


def check_adapter_savable(model: Any) -> None:
    """As `check_savable`, for the adapter of a model that has one.

    Raises:
        ModelError: if it cannot be saved.
    """
    with TemporaryDirectory(prefix="aced-") as folder:
        write_adapter(model, Path(folder, "adapter"))


def write_adapter(model: Any, folder: Path, base: str = "base") -> None:
    """The trained part of a model with adapters, for peft.

    Args:
        model: the PeftModel.
        folder: made if it is not there.
        base: the name under which `AutoPeftModel` looks for the base model: a folder beside `folder`, which it finds
            from the folder that holds both.

    Raises:
        ModelError: if peft cannot save it.
    """
    with library_errors("peft cannot save the adapter", remedy="pass what vlm.tune gave", field="model"):
        model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # peft's own has placeholders only
    path = folder / "adapter_config.json"
    write_json(path, read_json(path) | {"base_model_name_or_path": base})


def write(base: PreTrainedModel, processor: LlavaProcessor, folder: Path, trained: bool, weights: bool = True) -> None:
    """The model as if peft had never touched it, decoding greedily, and its processor, which pads on the left.

    What was written is read back: it must describe the same weights, and give the same tokens and pixels.

    Args:
        base: the model, with or without adapters.
        processor: its processor.
        folder: made if it is not there.
        trained: as in `plain_state`.
        weights: False writes all but the weights.

    Raises:
        ModelError: if transformers cannot save it, or reads it back otherwise.
    """
    with library_errors(
        "transformers cannot save the model",
        remedy="correct what the message names, in the model's config or in the processor",
        field="model",
    ):
        held = deepcopy(processor)
        settle(held.tokenizer)
        shell = _shell(base, held, trained)
        state = shell.state_dict()
        shapes = {name: tensor.shape for name, tensor in state.items()}
        if shell.lm_head.weight is shell.get_input_embeddings().weight:
            del state["lm_head.weight"]  # tied: the config says so, and a file holds a tensor once
        tower = base.config.vision_config.model_type
        classic = tower in _VITS  # version 5 has a naming of its own for these, which version 4 and servers do not know
        if classic:
            state = classic_names(state, tower)
        shell.save_pretrained(folder, state_dict=state, save_original_format=not classic, is_main_process=weights)
        if not weights:
            shell.config.save_pretrained(folder)
            shell.generation_config.save_pretrained(folder)
        held.save_pretrained(folder)
        _classic_json(folder)
        for path in folder.glob("*config.json"):
            write_json(path, _without_code(read_json(path)))
        _read_back(type(base), shapes, held, folder)


def _shell(base: Any, processor: LlavaProcessor, trained: bool) -> Any:
    """An empty model that lends its `save_pretrained` to the plain weights."""
    given, config = base.generation_config.to_dict(), deepcopy(base.config)
    warn_of_lost(given)
    drop_settings(config)
    drop_settings(config.text_config)
    with torch.device("meta"):
        shell = type(base)(config)
    shell.load_state_dict(plain_state(base, trained), assign=True)
    shell.tie_weights()
    shell.generation_config = decoding(given, processor.tokenizer, base.config.image_token_id)
    return shell


def _read_back(kind: Any, shapes: Mapping[str, torch.Size], processor: LlavaProcessor, folder: Path) -> None:
    """Compare what plain transformers reads from a folder with what is in memory.

    Raises:
        ValueError: if it differs.
    """
    from transformers import AutoConfig, AutoProcessor

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        described = {name: tensor.shape for name, tensor in kind(config).state_dict().items()}
    if odd := sorted(name for name in described.keys() | shapes if described.get(name) != shapes.get(name)):
        raise ValueError(f"its config, read back, describes '{odd[0]}' otherwise")
    saved = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if _template(saved) != _template(processor):
        raise ValueError("its chat template, read back, is another")
    if saved.tokenizer.get_vocab() != processor.tokenizer.get_vocab():
        raise ValueError("its vocabulary, read back, is another")
    for questions in (_QUESTIONS[:1], _QUESTIONS):
        ours, theirs = _inputs(processor, questions), _inputs(saved, questions)
        if odd := sorted(name for name in ours.keys() | theirs if not _equal(ours.get(name), theirs.get(name))):
            raise ValueError(f"its processor, read back, gives other {', '.join(odd)}")


def _template(processor: LlavaProcessor) -> Any:
    return processor.chat_template or processor.tokenizer.chat_template


def _inputs(processor: LlavaProcessor, questions: tuple[str, ...]) -> dict[str, Any]:
    """What a processor makes of questions about a picture, called as transformers' documentation does."""
    picture = Image.linear_gradient("L").resize((61, 47)).convert("RGB")
    special = "".join(token for token in processor.tokenizer.all_special_tokens if token != processor.image_token)
    texts = [f"{processor.image_token}{question}{special}" for question in questions]
    return dict(processor(images=[picture] * len(texts), text=texts, padding=True, return_tensors="pt"))


def _equal(ours: Any, theirs: Any) -> bool:
    return isinstance(ours, Tensor) and isinstance(theirs, Tensor) and torch.equal(ours, theirs)


def _without_code(value: Any) -> Any:
    """A config without the names of Python files and repositories that its parts came with.

    All parts are transformers' own. Other programs, llama.cpp's converter among them, would run that code.
    """
    if isinstance(value, dict):
        return {key: _without_code(part) for key, part in value.items() if key not in ("auto_map", "custom_pipelines")}
    return [_without_code(part) for part in value] if isinstance(value, list) else value


def _classic_json(folder: Path) -> None:
    """Add what transformers 4 and servers look for; without it they compute other numbers, or open no processor."""
    config = read_json(folder / "config.json")
    rope = config["text_config"].get("rope_parameters") or {}
    if "rope_theta" in rope:  # a missing one is silently 10,000 in version 4
        config["text_config"]["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            config["text_config"]["rope_scaling"] = rope
    write_json(folder / "config.json", config)
    parts = read_json(folder / "processor_config.json")
    if "image_processor" in parts:
        write_json(folder / "preprocessor_config.json", parts.pop("image_processor"))
        write_json(folder / "processor_config.json", parts)
    tokenizer = read_json(folder / "tokenizer_config.json")
    if tokenizer.get("tokenizer_class") == "TokenizersBackend":  # version 5's name for the same class
        tokenizer |= {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_input_names": ["input_ids", "attention_mask"],
        }
    if isinstance(tokenizer.get("extra_special_tokens"), list):  # version 4 reads a mapping there, and fails
        tokenizer["additional_special_tokens"] = tokenizer.pop("extra_special_tokens")
    write_json(folder / "tokenizer_config.json", tokenizer)


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
