# SPDX-License-Identifier: Apache-2.0
"""Models in and out of folders that transformers and peft open without this package, and on to the hub."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor

from aced_sdk.errors import ModelError
from aced_sdk.files import whole_folder, write_json
from vlm.adapters import base_of, has_adapter
from vlm.pictures import check_fit

if TYPE_CHECKING:
    from transformers import LlavaProcessor, PreTrainedModel

    from vlm.scoring import Scores

_CARD = """---
{facts}---
# {name}

A vision-language model made with ACED SDK.{about}

| part | what it is |
|---|---|
| vision tower | `{tower}`, {tower_size:.1f} M parameters{tokens} |
| language model | `{language}`, {layers} layers of width {hidden} |
| licence | {license} |

## How to load it

```python
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
{opening}
messages = [{{"role": "user", "content": [{{"type": "image"}}, {{"type": "text", "text": "What is this?"}}]}}]
text = processor.apply_chat_template(messages, add_generation_prompt=True)
inputs = processor(images=[Image.open("picture.png")], text=[text], return_tensors="pt")
out = model.generate(**inputs, max_new_tokens=24, do_sample=False)
print(processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

## Scores

{scores}
"""
_MERGED = """
folder = "{name}"  # or the name of its repository on the hub
model = AutoModelForImageTextToText.from_pretrained(folder)
processor = AutoProcessor.from_pretrained(folder)
"""
_APART = """from peft import PeftModel

folder = "{name}"  # from the hub: folder = huggingface_hub.snapshot_download(REPOSITORY)
model = AutoModelForImageTextToText.from_pretrained(f"{{folder}}/base")
model = PeftModel.from_pretrained(model, f"{{folder}}/adapter")
processor = AutoProcessor.from_pretrained(f"{{folder}}/base")
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
    """Write a model, its processor and a model card, whole or not at all; the model in memory stays as it is.

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
        card = _card(base, target.name, merge, scores, license, about)
        (folder / "README.md").write_text(card, encoding="utf-8")
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

    Raises:
        ModelError: if the folder is neither, or not whole: nothing is ever filled up with new weights.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = Path(directory)
    apart = (folder / _ADAPTER).is_dir()
    where: dict[str, Any] = {
        "pretrained_model_name_or_path": folder / _BASE if apart else folder,
        "local_files_only": True,
    }
    try:
        model, found = AutoModelForImageTextToText.from_pretrained(**where, output_loading_info=True)
        processor = AutoProcessor.from_pretrained(**where)
        # LLaVA reads no pooling head of a tower, and some checkpoints have none
        lost = {name for name in found["missing_keys"] if ".head." not in name and ".pooler." not in name}
        base = base_of(model)
        check_fit(base, processor)
        if apart:
            model, more = _with_adapter(model, folder / _ADAPTER)
            lost |= more
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"{folder} holds no model that is whole: {error}",
            remedy="name a folder that vlm.save wrote",
            field="directory",
        ) from error
    if lost:
        raise ModelError(
            f"{folder} lacks {len(lost)} of the model's tensors, {min(lost)} first",
            remedy="copy or save the model again",
            field="directory",
        )
    return model.eval(), processor


def _with_adapter(model: Any, folder: Path) -> tuple[Any, set[str]]:
    """The model with the adapter of this folder, and the names of the tensors that its file should have and has not."""
    from peft import PeftModel, get_peft_model_state_dict

    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        held = set(file.keys())
    adapted: Any = PeftModel.from_pretrained(model, str(folder))
    return adapted, get_peft_model_state_dict(adapted, save_embedding_layers=False).keys() - held


def push_to_hub(folder: str | Path, repo_id: str, private: bool = True) -> str:
    """Upload what `save` wrote to a repository on the Hugging Face hub, which is made if there is none.

    Weights and JSON files of an earlier upload that are not in the folder are removed, since loaders would take them.

    Args:
        folder: what `save` wrote, merged or apart.
        repo_id: `user/name` or `organisation/name`.
        private: whether a new repository is seen by its owners alone; one that is there stays as it is.

    Returns:
        The repository's address.

    Raises:
        ModelError: if the folder holds no model, or the hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError, LocalTokenNotFoundError

    path = Path(folder)
    if not any((path / part / "config.json").is_file() for part in (".", _BASE)):
        raise ModelError(f"{path} holds no model", remedy="name a folder that vlm.save wrote", field="folder")
    hub = HfApi()
    try:
        address = hub.create_repo(repo_id, private=private, exist_ok=True)
        hub.upload_folder(
            repo_id=address.repo_id,
            folder_path=path,
            commit_message="Upload with ACED SDK",
            delete_patterns=["*.safetensors", "*.json"],
        )
    except (HTTPError, OSError, ValueError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, LocalTokenNotFoundError) or status in (401, 403):
            remedy = f"log in with `hf auth login`, or set HF_TOKEN, with a token that may write to {repo_id}"
        elif status is not None or isinstance(error, ValueError):
            remedy = "change what the message names; a repository is called user/name"
        else:
            remedy = "check the network, and that HF_HUB_OFFLINE is not set; the folder stays as it is"
        raise ModelError(f"{path} was not uploaded to {repo_id}: {error}", remedy=remedy, field="repo_id") from error
    return str(address)


def _card(base: Any, name: str, merged: bool, scores: Scores | None, license: str | None, about: str | None) -> str:
    facts = {"library_name": "transformers" if merged else "peft", "pipeline_tag": "image-text-to-text"}
    tower, text = base.config.vision_config, base.config.text_config
    tokens = getattr(base.config, "image_seq_length", None)  # Aya Vision's own folders do not say
    return _CARD.format(
        facts=yaml.safe_dump(facts | ({"license": license} if license else {}), sort_keys=False),
        name=name,
        about=f"\n\n{about.strip()}" if about else "",
        tower=getattr(tower, "architecture", None) or tower.model_type,  # timm's towers have their name there
        tower_size=base.model.vision_tower.num_parameters() / 1e6,
        tokens=f"; a picture becomes {tokens} tokens" if tokens else "",
        language=text.model_type,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        license=license or "not stated; those of the vision tower and of the language model hold in any case",
        opening=(_MERGED if merged else _APART).format(name=name),
        scores=_table(scores) if scores else "None were given.",
    )


def _table(scores: Scores) -> str:
    """Shares of right answers and what `metric` added, per kind of question, each beside its blind one."""
    names = list(scores.total.metrics)
    lines = [["questions", "number", "right", *names], ["---"] * (3 + len(names))]
    for kind, one in [*scores.kinds.items(), ("all", scores.total)]:
        blind = one.blind_metrics or {}
        values = [_beside(one.accuracy, one.blind), *(_beside(one.metrics[key], blind.get(key)) for key in names)]
        lines.append([kind.replace("|", "/") or "-", str(one.count), *values])
    rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"In brackets: the same with another sample's picture, which is what the words alone give away.\n\n{rows}"


def _beside(value: float, blind: float | None) -> str:
    return f"{value:.3f}" if blind is None else f"{value:.3f} ({blind:.3f})"


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
