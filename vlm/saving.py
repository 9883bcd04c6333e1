# SPDX-License-Identifier: Apache-2.0
"""Models in and out of folders that transformers and peft open without this package."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aced_sdk.errors import ModelError
from aced_sdk.files import (
    check_digests,
    check_links,
    expand,
    file_digests,
    printable,
    read_json,
    whole_folder,
    write_json,
)
from aced_sdk.towers.trust import bounded, check_folder, check_vision_language, library_errors, weight_bytes
from vlm.adapters import base_of, has_adapter, load_adapter
from vlm.card import card
from vlm.language import reads
from vlm.pictures import check_fit

if TYPE_CHECKING:
    from transformers import LlavaProcessor, PreTrainedModel

    from vlm.scoring import Scores

_BASE, _ADAPTER, _MANIFEST = "base", "adapter", "aced_vlm.json"
# Where each part lies in memory, and where servers and transformers 4 look for it on disk.
_CLASSIC = {
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
}
_VIT = "vision_tower.vision_model."
_VITS = ("clip_vision_model", "siglip_vision_model")  # transformers 4 keeps these in a submodule of this name


def save(
    model: Any,
    processor: LlavaProcessor,
    directory: str | Path,
    merge: bool = True,
    *,
    scores: Scores | None = None,
    license: str | None = None,
    about: str | None = None,
) -> Path:
    """Write a model, its processor, a model card and digests of all files, whole or not at all.

    The model in memory stays as it is.

    Weights have LLaVA's classic names (`classic_names`) and the JSON files what older readers look for, so that
    transformers 4, transformers 5 and servers all read the folder.

    Args:
        model: a LLaVA model, or the PeftModel that `tune` gave.
        processor: its processor.
        directory: replaced if a model is in it already.
        merge: True writes one folder for `AutoModelForImageTextToText`, adapters added into the weights. False writes
            `base/` (the model without its training) and `adapter/` for `PeftModel.from_pretrained(base, adapter)`; the
            trained projector lies in the adapter.
        scores: what `vlm.evaluate` gave, for the card.
        license: the hub's name of the licence (`apache-2.0`), for the card; None says that it is not stated.
        about: what the tower and the language model are, which data the model was tuned on, or anything else that the
            card shall say.

    Raises:
        ModelError: with merge=False, if the model has no adapters, or is not the PeftModel that holds them; if the
            processor is another model's; if the directory holds something else than a model.
    """
    base = base_of(model)
    check_fit(base, processor)
    target = free_for_a_model(directory)
    if not merge and (model is base or not has_adapter(base)):
        raise ModelError(
            "there is no adapter to keep apart",
            remedy="pass TuneResult.model after an Adapt stage, or set merge=True",
            field="merge",
        )
    with whole_folder(target) as folder:
        if merge:
            _write(base, processor, folder, trained=True)
        else:
            _write(base, processor, folder / _BASE, trained=False)
            model.save_pretrained(folder / _ADAPTER, save_embedding_layers=False)
            (folder / _ADAPTER / "README.md").unlink(missing_ok=True)  # peft's own has placeholders only
        text = card(base, target.name, merge, scores, license, about)
        (folder / "README.md").write_text(text, encoding="utf-8")
        write_json(folder / _MANIFEST, {"format": 1, "files": file_digests(folder, [_MANIFEST])})
    return target


def free_for_a_model(directory: str | Path, *, mark: str = "config.json") -> Path:
    """The absolute path of a folder that may be replaced: there is none yet, it is empty, or an older one of its kind.

    Args:
        directory: the folder.
        mark: a file that tells one of its kind, in it or in its `base/`.

    Raises:
        ModelError: if it holds something else, which would be lost.
    """
    target = Path(directory).absolute()
    held = target.is_dir() and any((target / part / mark).is_file() for part in (".", _BASE))
    if target.exists() and not held and (target.is_file() or any(target.iterdir())):
        raise ModelError(
            f"{target} holds something else than a model, and would be replaced",
            remedy="name a new folder, or remove what is there",
            field="directory",
        )
    return target


def load(directory: str | Path) -> tuple[Any, LlavaProcessor]:
    """A model and its processor from what `save` wrote, merged or apart, or from any LLaVA folder of transformers.

    No code of the folder runs, and weights are read from safetensors alone. A folder that `save` wrote must be as it
    was saved; one without `aced_vlm.json` is taken for a folder of transformers.

    Raises:
        ModelError: if the folder is neither, was altered, names files outside of it, describes a model far larger than
            its weights, or is not whole: nothing is ever filled up with new weights.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = Path(directory)
    with library_errors(
        f"{printable(folder)} holds no model that is whole",
        remedy="name a folder that vlm.save wrote",
        field="directory",
    ):
        folder = expand(directory)
        _check_saved(folder)
        apart = (folder / _ADAPTER).is_dir()
        held = folder / _BASE if apart else folder
        check_vision_language(check_folder(held, pictures=True, tokens=True), held)
        with bounded(weight_bytes(held)):
            model, found = AutoModelForImageTextToText.from_pretrained(
                held, local_files_only=True, trust_remote_code=False, use_safetensors=True, output_loading_info=True
            )
        processor = AutoProcessor.from_pretrained(held, local_files_only=True, trust_remote_code=False)
        # LLaVA reads no pooling head of a tower, and some checkpoints have none
        lost = {name for name in found["missing_keys"] if ".head." not in name and ".pooler." not in name}
        check_fit(base_of(model), processor)
        reads(model.config.text_config)
        if apart:
            model, more = load_adapter(model, folder / _ADAPTER)
            lost |= more
    if lost:
        raise ModelError(
            f"{folder} lacks {len(lost)} of the model's tensors, {min(lost)} first",
            remedy="copy or save the model again",
            field="directory",
        )
    return model.eval(), processor


def _check_saved(folder: Path) -> None:
    """Compare a folder of `save` with the digests in its manifest, and refuse links out of any folder.

    Raises:
        ReadError: naming the file.
    """
    check_links(folder)
    if (folder / _MANIFEST).exists():
        files = read_json(folder / _MANIFEST).get("files")
        check_digests(folder, files, [_MANIFEST])


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
    for path in folder.glob("*config.json"):
        write_json(path, _without_code(read_json(path)))


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
    write_json(folder / "tokenizer_config.json", tokenizer)


def _without_code(value: Any) -> Any:
    """A config without the names of Python files and repositories that its parts came with.

    All parts are transformers' own. Other programs, llama.cpp's converter among them, would run that code.
    """
    if isinstance(value, dict):
        return {key: _without_code(part) for key, part in value.items() if key not in ("auto_map", "custom_pipelines")}
    return [_without_code(part) for part in value] if isinstance(value, list) else value


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
