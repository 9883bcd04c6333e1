# SPDX-License-Identifier: Apache-2.0
"""Dual encoders in and out of folders: open_clip's layout, with a typed manifest beside it."""

from __future__ import annotations

import copy
import json
import os
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from aced_sdk.config import Config, Student
from aced_sdk.errors import ConfigError, ModelError, UnsupportedError
from aced_sdk.files import save_tensors, sha256, whole_folder, write_json
from aced_sdk.towers.dual_encoder import DualEncoder
from aced_sdk.towers.transforms import Preprocess

WEIGHTS = "open_clip_model.safetensors"
CONFIG = "open_clip_config.json"
MANIFEST = "aced.json"


class Manifest(Config):
    """`aced.json`: what the folder is, in words that code can rely on."""

    format: Literal[1] = 1
    kind: Literal["dual_encoder"] = "dual_encoder"
    weights_sha256: str
    license: str = "unknown"
    facts: dict[str, Any] = Field(default_factory=dict)


def build(student: Student, seed: int) -> DualEncoder:
    """A dual encoder with new weights, or the folder that `student.architecture` names, ready to train.

    Raises:
        ModelError: if the architecture is unknown or cannot be built.
    """
    import torch

    if isinstance(student.architecture, str) and student.architecture.startswith("local-dir:"):
        return load(student.architecture)
    model_cfg = _model_cfg(student)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = instantiate(model_cfg, field="student.architecture")
    preprocess = Preprocess(
        size=model.visual.image_size, mean=student.mean, std=student.std, resize_mode=student.resize
    )
    return DualEncoder(model, model_cfg, preprocess, tokenizer_of(model_cfg))


def _model_cfg(student: Student) -> dict[str, Any]:
    import math

    import open_clip

    if isinstance(student.architecture, str):
        named = open_clip.get_model_config(student.architecture)
        if named is None:
            raise ModelError(
                f"open_clip knows no architecture '{student.architecture}'",
                remedy="take a name of open_clip.list_models(), `local-dir:FOLDER`, or a model_cfg mapping",
                field="student.architecture",
            )
    else:
        named = student.architecture
    model_cfg: dict[str, Any] = copy.deepcopy(named)
    model_cfg["init_logit_scale"] = math.log(student.init_scale)
    model_cfg["init_logit_bias"] = student.init_bias
    return model_cfg


def instantiate(model_cfg: dict[str, Any], field: str | None = None) -> Any:
    """An open_clip model of this `model_cfg` with new weights; never downloads any.

    Raises:
        ModelError: if open_clip cannot build it.
    """
    from open_clip.model import CLIP, CustomTextCLIP

    cfg = copy.deepcopy(model_cfg)
    if "multimodal_cfg" in cfg:
        raise UnsupportedError("CoCa models cannot be distilled or cached", remedy="take a dual encoder", field=field)
    try:
        custom = cfg.pop("custom_text", False) or "hf_model_name" in cfg["text_cfg"]
        if "timm_model_name" in cfg["vision_cfg"]:
            cfg["vision_cfg"]["timm_model_pretrained"] = False
        if "hf_model_name" in cfg["text_cfg"]:
            cfg["text_cfg"]["hf_model_pretrained"] = False
        return (CustomTextCLIP if custom else CLIP)(**cfg, output_dict=True)
    except (TypeError, KeyError, ValueError, RuntimeError, OSError, AssertionError) as error:
        raise ModelError(
            f"open_clip cannot build this architecture: {type(error).__name__}: {error}",
            remedy="compare the mapping with a model_cfg of open_clip's own configs",
            field=field,
        ) from error


def tokenizer_of(model_cfg: dict[str, Any]) -> Any:
    """The tokenizer that `model_cfg` names: open_clip's BPE, or a Hugging Face one."""
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    text_cfg = model_cfg["text_cfg"]
    context_length = text_cfg.get("context_length", 77)
    if name := text_cfg.get("hf_tokenizer_name"):
        kwargs = text_cfg.get("tokenizer_kwargs") or {}
        try:
            return HFTokenizer(
                name, context_length=context_length, tokenizer_mode=text_cfg.get("tokenizer_mode"), **kwargs
            )
        except (OSError, ValueError) as error:
            raise ModelError(
                f"the tokenizer '{name}' cannot be loaded: {error}",
                remedy="put the tokenizer's files into the model's folder, or make its hub reachable",
            ) from error
    tokenizer = SimpleTokenizer(context_length=context_length)
    if tokenizer.vocab_size > text_cfg.get("vocab_size", 49408):
        raise ModelError(
            f"the text tower has {text_cfg.get('vocab_size')} token rows, "
            f"open_clip's tokenizer has {tokenizer.vocab_size}",
            remedy="set text_cfg.vocab_size to 49408, or name the tokenizer in text_cfg.hf_tokenizer_name",
        )
    return tokenizer


def save(
    encoder: DualEncoder, folder: str | Path, *, license: str = "unknown", facts: dict[str, Any] | None = None
) -> Path:
    """Write open_clip's `local-dir:` layout and the manifest, whole or not at all.

    Args:
        encoder: what to save.
        folder: its place; a folder that is there is replaced.
        license: SPDX name of the weights' licence.
        facts: how it was made (steps, seed, config hash ...), kept in the manifest and the model card.

    Raises:
        ModelError: if the folder cannot be written.
    """
    folder = Path(folder)
    try:
        _write(encoder, folder, license, facts or {})
    except OSError as error:
        raise ModelError(
            f"the encoder cannot be saved to {folder}: {error}", remedy="free disk space or check permissions"
        ) from error
    encoder.folder = folder
    return folder


def _write(encoder: DualEncoder, folder: Path, license: str, facts: dict[str, Any]) -> None:
    # Clones, since ZeRO keeps the weights as views of one flat buffer, and safetensors stores no views.
    weights = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in encoder.model.state_dict().items()}
    with whole_folder(folder) as temporary:
        save_tensors(temporary / WEIGHTS, weights, {"format": "pt"})
        for name in _inner_names(encoder.model_cfg):
            if encoder.folder is None:
                raise ModelError(
                    f"{name} is inside the model's folder, and it has none", remedy="load the model from a folder"
                )
            shutil.copytree(encoder.folder / name, temporary / name, dirs_exist_ok=True)
        preprocess = encoder.preprocess_config.model_dump(mode="json")
        write_json(temporary / CONFIG, {"model_cfg": encoder.model_cfg, "preprocess_cfg": preprocess})
        manifest = Manifest(weights_sha256=sha256(temporary / WEIGHTS), license=license, facts=facts)
        write_json(temporary / MANIFEST, manifest.model_dump(mode="json"))
        (temporary / "README.md").write_text(_card(encoder, manifest), encoding="utf-8")


def _card(encoder: DualEncoder, manifest: Manifest) -> str:
    profile = encoder.profile()
    facts = "".join(f"| {name} | {value} |\n" for name, value in manifest.facts.items())
    return (
        f"---\nlibrary_name: open_clip\nlicense: {manifest.license}\n"
        "pipeline_tag: zero-shot-image-classification\n---\n\n"
        "# A dual encoder distilled with aced-sdk\n\n"
        "```python\nimport open_clip\n"
        'model, _, preprocess = open_clip.create_model_and_transforms("local-dir:FOLDER")\n'
        'tokenizer = open_clip.get_tokenizer("local-dir:FOLDER")\n```\n\n'
        "| fact | value |\n|---|---|\n"
        f"| MACs, one picture | {profile.image_macs:,} |\n| MACs, one text | {profile.text_macs:,} |\n"
        f"| parameters | {profile.parameters:,} |\n| open_clip | {version('open_clip_torch')} |\n{facts}"
    )


def load(name: str | os.PathLike[str]) -> DualEncoder:
    """Load a dual encoder: a folder in open_clip's layout, `local-dir:FOLDER` or `hf-hub:ORG/REPO`.

    Raises:
        ModelError: if the folder is missing, incomplete, altered, or holds no safetensors weights.
    """
    text = os.fspath(name)
    if text.startswith("hf-hub:"):
        return _load_hub(text)
    return _load_folder(Path(text.removeprefix("local-dir:")))


def _load_folder(folder: Path) -> DualEncoder:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config = read_config(folder)
    model_cfg = config["model_cfg"]
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise ModelError(
            f"{folder} holds no {WEIGHTS}",
            remedy="save the weights as safetensors; pickled weights are not loaded",
        )
    if (folder / MANIFEST).is_file():
        expected = read_manifest(folder).weights_sha256
        if sha256(weights) != expected:
            raise ModelError(f"{weights} is not the file that was saved", remedy="restore or re-save the folder")
    resolved = resolve(model_cfg, folder)
    model = instantiate(resolved)
    try:
        missing, unexpected = model.load_state_dict(load_file(weights), strict=False)
    except (SafetensorError, RuntimeError) as error:
        raise ModelError(
            f"{weights} does not fit its config: {error}", remedy="restore or re-save the folder"
        ) from error
    if missing or unexpected:
        raise ModelError(
            f"{weights} lacks {len(missing)} tensors and has {len(unexpected)} unknown ones "
            f"({(missing + unexpected)[0]} first)",
            remedy="restore or re-save the folder",
        )
    preprocess = Preprocess(**{"size": model.visual.image_size} | config.get("preprocess_cfg", {}))
    return DualEncoder(model, model_cfg, preprocess, tokenizer_of(resolved), folder).eval()


def _inner_names(model_cfg: dict[str, Any]) -> list[str]:
    names = (model_cfg["text_cfg"].get(key) for key in ("hf_model_name", "hf_tokenizer_name"))
    return sorted({name for name in names if isinstance(name, str) and name.startswith("./")})


def resolve(model_cfg: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Names that begin with `./` lie inside the folder, so that the folder can be moved."""
    cfg = copy.deepcopy(model_cfg)
    for key in ("hf_model_name", "hf_tokenizer_name"):
        if cfg["text_cfg"].get(key) in _inner_names(model_cfg):
            cfg["text_cfg"][key] = str((folder / cfg["text_cfg"][key]).resolve())
    return cfg


def _load_hub(name: str) -> DualEncoder:
    import open_clip
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        model, _, _ = open_clip.create_model_and_transforms(name, output_dict=True)
        tokenizer = open_clip.get_tokenizer(name)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, RuntimeError, ValueError) as error:
        raise ModelError(
            f"{name} cannot be loaded: {error}", remedy="check the name and the network, or name a local folder"
        ) from error
    config = open_clip.factory._get_hf_config(name.removeprefix("hf-hub:"))
    preprocess = open_clip.get_model_preprocess_cfg(model)
    return DualEncoder(model, config["model_cfg"], Preprocess(**preprocess), tokenizer).eval()


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's open_clip_config.json.

    Raises:
        ModelError: if the folder or the file is missing or is not what it should be.
    """
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except OSError:
        raise ModelError(
            f"{folder} is no model folder: it has no {CONFIG}", remedy="name a saved student folder"
        ) from None
    except ValueError as error:
        raise ModelError(f"{folder / CONFIG} is not JSON: {error}", remedy="restore the file") from None
    model_cfg = config.get("model_cfg") if isinstance(config, dict) else None
    if not isinstance(model_cfg, dict) or not all(
        isinstance(model_cfg.get(tower), dict) for tower in ("vision_cfg", "text_cfg")
    ):
        raise ModelError(f"{folder / CONFIG} has no model_cfg with vision_cfg and text_cfg", remedy="restore the file")
    return config


def read_manifest(folder: Path) -> Manifest:
    """The folder's aced.json.

    Raises:
        ModelError: if it is missing or not a manifest.
    """
    try:
        return Manifest(**json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
    except (OSError, json.JSONDecodeError, ConfigError, TypeError) as error:
        raise ModelError(
            f"{folder / MANIFEST} cannot be read: {error}", remedy="restore or re-save the folder"
        ) from None
