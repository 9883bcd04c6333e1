# SPDX-License-Identifier: Apache-2.0
"""Models in and out of folders that transformers and peft open without this package."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aced_sdk.errors import ModelError
from aced_sdk.files import whole_folder
from vlm.adapters import base_of, has_adapter

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

_CARD = """---
library_name: {library}
pipeline_tag: image-text-to-text
---
A LLaVA model tuned with ACED SDK. {how}
"""
_BASE, _ADAPTER = "base", "adapter"


def save(model: Any, processor: LlavaProcessor, directory: str | Path, merge: bool = True) -> Path:
    """Write a model and its processor, whole or not at all; the model in memory stays as it is.

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


def _write(base: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path, trained: bool) -> None:
    with torch.device("meta"):  # an empty shell that lends its save_pretrained to the plain weights
        shell = type(base)(base.config)
    shell.load_state_dict(plain_state(base, trained), assign=True)
    shell.tie_weights()
    shell.generation_config = base.generation_config
    shell.save_pretrained(folder)
    processor.save_pretrained(folder)


def plain_state(base: LlavaForConditionalGeneration, trained: bool) -> dict[str, Tensor]:
    """The state dict as if peft had never touched the model.

    Args:
        base: a model, with or without adapters.
        trained: whether adapters are added into the weights and the trained projector is taken, or neither.
    """
    from peft.tuners.lora import Linear

    unwanted, wanted = (
        (".original_module.", ".modules_to_save.default.")
        if trained
        else (".modules_to_save.default.", ".original_module.")
    )
    modules = dict(base.named_modules())
    state: dict[str, Tensor] = {}
    for name, tensor in base.state_dict().items():
        if ".lora_" in name or unwanted in name:
            continue
        owner = modules[name.split(".base_layer.")[0]] if ".base_layer." in name else None
        if trained and isinstance(owner, Linear) and name.endswith(".weight"):
            tensor = tensor + sum(owner.get_delta_weight(adapter) for adapter in owner.active_adapters)
        state[name.replace(".base_layer.", ".").replace(wanted, ".")] = tensor
    return state
