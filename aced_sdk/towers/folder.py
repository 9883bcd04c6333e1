# SPDX-License-Identifier: Apache-2.0
"""Dual encoders in and out of folders: open_clip's layout, with a typed manifest beside it.

A folder may come from somebody else. Its config is compared with an allow-list, its weights with the config, and every
file that decides a result with the manifest's digests, before a model is built.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self, TypeGuard

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticSerializationError

from aced_sdk.config import Config, LossForm, Student
from aced_sdk.errors import ConfigError, ModelError
from aced_sdk.files import (
    ReadError,
    check_digests,
    check_links,
    expand,
    file_digests,
    inside,
    printable,
    read_json,
    save_tensors,
    sha256,
    whole_folder,
    write_json,
)
from aced_sdk.processing.transforms import Preprocess
from aced_sdk.towers.architecture import check, construct, instantiate, outline, resolve
from aced_sdk.towers.card import card
from aced_sdk.towers.dual_encoder import DualEncoder
from aced_sdk.towers.text_files import PLACES, copy_text_files, fetch, tokenizer_of
from aced_sdk.towers.trial import check_embeds
from aced_sdk.towers.weights import check_fit, read_weights

WEIGHTS = "open_clip_model.safetensors"
_PYTORCH = "open_clip_pytorch_model"  # open_clip's second name
CONFIG = "open_clip_config.json"
MANIFEST = "aced.json"
_HUB_FILES = [WEIGHTS, "*.json", "*.txt", "*.model"]
_MAX_OTHERS = 2**30  # bytes of a folder's files beside its weights


class StudentManifest(Config):
    """`aced.json`: what the folder is, for programs.

    Attributes:
        format: 2 has digests of every file that decides a result; 1, of earlier versions, of the weights alone.
        weights_sha256: digest of the weights.
        files: sha256 of each file, by its relative name.
        license: SPDX name of the weights' licence.
        trained_with: loss that scale and bias were trained with; None, of earlier versions: a bias means sigmoid.
        facts: how the encoder was made.
    """

    format: Literal[1, 2] = 2
    kind: Literal["dual_encoder"] = "dual_encoder"
    weights_sha256: str
    files: dict[str, str] = Field(default_factory=dict)
    license: str = Field(default="unknown", max_length=200)
    trained_with: LossForm | None = None
    facts: dict[str, Any] = Field(default_factory=dict)

    @field_validator("license")
    @classmethod
    def _printable(cls, value: str) -> str:
        if not value.isprintable():
            raise ConfigError("the licence has characters that cannot be printed", remedy="give its SPDX name")
        return value

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.format == 2 and (self.files.get(WEIGHTS) != self.weights_sha256 or CONFIG not in self.files):
            raise ConfigError(f"it lacks the digests of {WEIGHTS} or {CONFIG}", remedy="restore it", field="files")
        return self


@contextmanager
def _model_errors() -> Iterator[None]:
    try:
        yield
    except ReadError as error:
        raise ModelError(error.cause, remedy=error.remedy, field=error.field) from None


@_model_errors()
def build(student: Student, seed: int) -> DualEncoder:
    """A dual encoder ready to train: with the weights that `student.architecture` names, else with new ones.

    Raises:
        UnsupportedError: for a CoCa model.
        ModelError: if the architecture is unknown, out of bounds, or cannot be built, or the weights cannot be loaded.
    """
    import torch

    if names_weights(student.architecture):
        return load(student.architecture)
    model_cfg = _model_cfg(student)
    resolved = resolve(model_cfg, None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = instantiate(resolved, field="student.architecture")
    preprocess = Preprocess(
        size=model.visual.image_size, mean=student.mean, std=student.std, resize_mode=student.resize
    )
    return DualEncoder(model, model_cfg, preprocess, tokenizer_of(resolved))


def names_weights(architecture: str | dict[str, Any]) -> TypeGuard[str]:
    """Whether it is the name of a folder or repository with trained weights, not of an architecture alone."""
    if not isinstance(architecture, str):
        return False
    return architecture.startswith(("local-dir:", "hf-hub:")) or os.path.isdir(expand(architecture))


def _model_cfg(student: Student) -> dict[str, Any]:
    import open_clip

    if isinstance(student.architecture, str):
        # Names with a scheme would make open_clip read a folder or download.
        named = None if ":" in student.architecture else open_clip.get_model_config(student.architecture)
        if named is None:
            raise ModelError(
                f"open_clip knows no architecture '{printable(student.architecture)}'",
                remedy="use a name of open_clip.list_models(), a folder, `hf-hub:ORG/REPO`, or a model_cfg mapping",
                field="student.architecture",
            )
    else:
        named = student.architecture
    logits = {"init_logit_scale": math.log(student.init_scale), "init_logit_bias": student.init_bias}
    check(named | logits, field="student.architecture")
    model_cfg: dict[str, Any] = copy.deepcopy(named | logits)
    for key in PLACES:
        if (name := model_cfg["text_cfg"].get(key)) and os.path.isdir(expand(name)):
            model_cfg["text_cfg"][key] = str(expand(name).absolute())
    return model_cfg


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
        ModelError: if the folder cannot be written, or a file of the text tower or tokenizer cannot be copied.
        ConfigError: if the licence is too long or not printable, or JSON cannot hold the facts.
    """
    with _model_errors():
        folder = expand(folder)
        try:
            _write(encoder, folder, license, facts or {})
        except PydanticSerializationError as error:
            raise ConfigError(
                f"JSON cannot hold the facts: {printable(error)}", remedy="give texts, numbers and lists", field="facts"
            ) from None
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
        model_cfg = copy_text_files(encoder.model_cfg, encoder.folder, temporary)
        preprocess = encoder.preprocess_config.model_dump(mode="json")
        write_json(temporary / CONFIG, {"model_cfg": model_cfg, "preprocess_cfg": preprocess})
        files = file_digests(temporary)
        manifest = StudentManifest(
            weights_sha256=files[WEIGHTS],
            files=files,
            license=license,
            trained_with=encoder.trained_with,
            facts=facts,
        )
        write_json(temporary / MANIFEST, manifest.model_dump(mode="json"))
        (temporary / "README.md").write_text(card(encoder.profile(), license, facts), encoding="utf-8")


@_model_errors()
def load(name: str | os.PathLike[str]) -> DualEncoder:
    """Load a dual encoder: a folder in open_clip's layout, `local-dir:FOLDER` or `hf-hub:ORG/REPO`.

    Only safetensors and text files are read, and no code from the folder or the hub runs.

    Raises:
        UnsupportedError: for a CoCa model.
        ModelError: if the folder is missing, incomplete, altered or out of bounds, holds no safetensors weights, or
            cannot embed a picture and a text.
    """
    text = os.fspath(name)
    if text.startswith("hf-hub:"):
        return _load_folder(fetch(text.removeprefix("hf-hub:"), _HUB_FILES))
    return _load_folder(expand(text.removeprefix("local-dir:")))


def _load_folder(folder: Path) -> DualEncoder:
    config = read_config(folder)
    check_links(folder)
    weights = weights_of(folder)
    model_cfg = config["model_cfg"]
    foreign = not os.path.lexists(folder / MANIFEST)
    resolved = resolve(model_cfg, folder)
    check_fit(outline(resolved), weights, foreign)
    manifest = None if foreign else _check_files(folder)
    model = construct(resolved)
    read_weights(model, weights, foreign)
    preprocess = _preprocess(config, model.visual.image_size, folder)
    encoder = DualEncoder(model, model_cfg, preprocess, tokenizer_of(resolved), folder).eval()
    if manifest and manifest.trained_with:
        encoder.trained_with = manifest.trained_with
    check_embeds(encoder, folder)
    return encoder


def weights_of(folder: Path) -> Path:
    """The folder's weights: the safetensors file that open_clip would take, which goes by names.

    Raises:
        ModelError: if there is none, or open_clip would take a pickled file before it.
    """
    if os.path.lexists(folder / WEIGHTS) or os.path.lexists(folder / MANIFEST):
        found = [folder / WEIGHTS]
    else:
        pickled = any(os.path.lexists(folder / f"{_PYTORCH}{ending}") for ending in (".bin", ".pth"))
        names = [f"{_PYTORCH}.safetensors", *([] if pickled else ["model.safetensors"])]
        found = [folder / name for name in names] + ([] if pickled else sorted(folder.glob("*.safetensors")))
    weights = next((path for path in found if path.is_file()), None)
    if weights is None:
        raise ModelError(
            f"{printable(folder)} holds no {WEIGHTS}, nor another safetensors file that open_clip would take",
            remedy="save the weights as safetensors; pickled weights are not loaded",
        )
    return weights


def _check_files(folder: Path) -> StudentManifest:
    """Compare the folder's files with the digests of its manifest, and return it."""
    manifest = read_manifest(folder)
    sizes = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    if sum(sizes.values()) - sizes[folder / WEIGHTS] > _MAX_OTHERS:
        raise ModelError(
            f"{printable(folder)} holds more than {_MAX_OTHERS:,} bytes beside its weights",
            remedy="keep other files in another folder",
        )
    if manifest.format == 2:
        check_digests(folder, manifest.files, leave_out=[MANIFEST])
    elif sha256(folder / WEIGHTS) != manifest.weights_sha256:
        raise ModelError(
            f"{printable(folder / WEIGHTS)} is not the file that was saved", remedy="restore or re-save the folder"
        )
    return manifest


def _preprocess(config: dict[str, Any], size: tuple[int, int], folder: Path) -> Preprocess:
    """The folder's `preprocess_cfg` over open_clip's defaults, at the image tower's own size, as open_clip reads it."""
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    try:
        given = merge_preprocess_dict(PreprocessCfg(), {"size": size} | (config.get("preprocess_cfg") or {}))
        if given["interpolation"] == "random":  # in training; open_clip's validation transform is bicubic then
            given["interpolation"] = "bicubic"
        return Preprocess(**given).replace(size=size)
    except (ConfigError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{printable(folder / CONFIG)} has a wrong preprocess_cfg: {printable(error)}", remedy="restore the file"
        ) from None


@_model_errors()
def read_config(folder: Path) -> dict[str, Any]:
    """The folder's open_clip_config.json.

    Raises:
        ModelError: if the folder or the file is missing or is not what it should be.
    """
    if not os.path.lexists(folder):
        raise ModelError(
            f"there is no folder {printable(folder)}",
            remedy="name a saved student (a run's is DIRECTORY/student), or `hf-hub:ORG/REPO` for a hub's model",
        )
    if not os.path.lexists(folder / CONFIG):
        raise ModelError(
            f"{printable(folder)} is no model folder: it has no {CONFIG}", remedy="name a saved student folder"
        )
    config = read_json(inside(folder, CONFIG))
    model_cfg = config.get("model_cfg") if isinstance(config, dict) else None
    if not isinstance(model_cfg, dict) or not all(
        isinstance(model_cfg.get(tower), dict) for tower in ("vision_cfg", "text_cfg")
    ):
        raise ModelError(
            f"{printable(folder / CONFIG)} has no model_cfg with vision_cfg and text_cfg", remedy="restore the file"
        )
    values: dict[str, Any] = config
    return values


def read_manifest(folder: Path) -> StudentManifest:
    """The folder's aced.json.

    Raises:
        ModelError: if it is missing, not a manifest, or lacks digests.
    """
    try:
        return StudentManifest(**read_json(inside(folder, MANIFEST)))
    except (ReadError, ConfigError, TypeError) as error:
        raise ModelError(
            f"{printable(folder / MANIFEST)} cannot be read: {printable(error)}",
            remedy="restore or re-save the folder",
        ) from None
