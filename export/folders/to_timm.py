# SPDX-License-Identifier: Apache-2.0
"""The image tower of a student as a timm folder: `timm.create_model("local-dir:FOLDER", pretrained=True)`."""

from __future__ import annotations

import copy
import json
import re
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from aced_sdk.config import Config
from aced_sdk.errors import UnsupportedError
from aced_sdk.files import save_tensors, write_json
from aced_sdk.towers import DualEncoder
from aced_sdk.towers.huggingface import is_clip_vit
from export.runtime import parity
from export.student import Source, load_student
from export.writing import ExportError, check_target, code_span, export_folder, front_matter

_SOURCE_KEY = "aced_source"
_BOUND = 1e-5  # max-abs on normalised embeddings of the same tensors, as it is
_FUSED_BOUND = 1e-4  # the same where convolutions and norms were folded into one


class TimmReport(Config):
    """The folder as timm loads it, against the student."""

    image_max_abs: float = Field(description="largest difference of normalised image embeddings, same pixel tensors")
    pixels_max_abs: float = Field(description="largest difference of normalised pixels, RGB pictures")
    reparameterized: bool = Field(description="whether training branches were folded into single convolutions")


class _Tower(NamedTuple):
    architecture: str
    arguments: dict[str, Any]
    weights: dict[str, Tensor]
    fixed_size: bool  # whether timm builds it for one size of pictures
    reparameterized: bool = False


def to_timm(student_folder: str | PathLike[str], directory: str | Path) -> TimmReport:
    """Write the image tower as a folder that timm loads by itself, checked by loading it.

    The model's output is the image embedding, not normalised. Towers of timm keep their architecture; the training
    branches of FastViT and MobileCLIP are folded first. A plain CLIP ViT becomes timm's CLIP ViT with the student's
    sizes as arguments.

    Args:
        student_folder: a saved student.
        directory: the folder to write; an older one made by this function is replaced.

    Raises:
        ModelError: if the student cannot be loaded.
        UnsupportedError: for image towers and geometries that timm cannot hold.
        ExportError: if the loaded folder differs from the student, or the directory holds something else.
    """
    target = Path(directory)
    check_target(target, "config.json", _SOURCE_KEY)
    student, source = load_student(student_folder)
    if student.preprocess_config.resize_mode == "longest":
        raise UnsupportedError(
            "timm pads after the longest side with the mean's colour, and this student was trained with another",
            remedy="take export.to_onnx, or train with resize='squash' or 'shortest'",
            field="student.resize",
        )
    tower = _clip_vit(student) if is_clip_vit(student) else _timm_tower(student)
    with export_folder(target) as folder:
        save_tensors(folder / "model.safetensors", tower.weights, {"format": "pt"})
        write_json(folder / "config.json", _config(student, tower, source))
        report = _compared(folder, student, tower.reparameterized)
        (folder / "README.md").write_text(_card(tower, report, source.license), encoding="utf-8")
    return report


def _clip_vit(student: DualEncoder) -> _Tower:
    from timm.models.vision_transformer import checkpoint_filter_fn

    cfg = student.model_cfg["vision_cfg"]
    width = int(cfg["width"])
    arguments = {
        "img_size": cfg["image_size"],
        "patch_size": cfg["patch_size"],
        "embed_dim": width,
        "depth": cfg["layers"],
        "num_heads": width // int(cfg.get("head_width", 64)),
        "mlp_ratio": cfg.get("mlp_ratio", 4.0),
    }
    name = "vit_base_patch32_clip_quickgelu_224" if student.model_cfg.get("quick_gelu") else "vit_base_patch32_clip_224"
    model = _create(name, student, arguments)
    weights = checkpoint_filter_fn(student.model.state_dict(), model)  # timm's own reading of open_clip's names
    return _Tower(name, arguments, {key: weights[key].contiguous().clone() for key in model.state_dict()}, True)


def _timm_tower(student: DualEncoder) -> _Tower:
    from open_clip.timm_model import TimmModel
    from timm.utils.model import reparameterize_model

    visual: Any = student.model.visual
    if not isinstance(visual, TimmModel) or not set(dict(visual.head.named_children())) <= {"drop", "proj"}:
        raise UnsupportedError(
            "this image tower is neither a plain CLIP ViT nor a timm model with at most a linear projection",
            remedy="take export.to_onnx, which takes other towers, or load the folder with open_clip",
            field="student_folder",
        )
    cfg = student.model_cfg["vision_cfg"]
    trunk = _with_projection(student)
    arguments = _arguments(student, trunk)
    fixed = bool(trunk.pretrained_cfg.get("fixed_input_size"))  # type: ignore[union-attr, operator]
    fused = reparameterize_model(trunk)  # a copy
    name = cfg["timm_model_name"]
    if set(fused.state_dict()) != set(trunk.state_dict()):
        inference = {**arguments, "inference_mode": True}
        try:
            if set(_create(name, student, inference).state_dict()) == set(fused.state_dict()):
                weights = {_original(key): tensor for key, tensor in _tensors(fused).items()}
                return _Tower(name, inference, weights, fixed, reparameterized=True)
        except TypeError:
            pass  # this family cannot be built folded: timm folds it after loading
    return _Tower(name, arguments, _tensors(trunk), fixed)


def _arguments(student: DualEncoder, trunk: nn.Module) -> dict[str, Any]:
    """With what timm builds this trunk.

    open_clip changes the pooling after it has built a ViT, which keeps its norm in front of the pooling; built with
    that pooling, the norm would follow it (`fc_norm`).

    Raises:
        UnsupportedError: if timm builds it with other tensors.
    """
    cfg = student.model_cfg["vision_cfg"]
    pool = {"global_pool": cfg["timm_pool"]} if cfg.get("timm_pool") else {}
    for more in ({}, {"fc_norm": False}, {"fc_norm": True}):
        try:
            built = _create(cfg["timm_model_name"], student, {**pool, **more})
        except TypeError:  # a family without this argument
            continue
        if set(built.state_dict()) == set(trunk.state_dict()):
            return {**pool, **more}
    raise UnsupportedError(
        f"timm builds {cfg['timm_model_name']} with another norm where its pooling is {cfg.get('timm_pool')!r}",
        remedy="take export.to_onnx, or load the folder with open_clip",
        field="student_folder",
    )


def _original(name: str) -> str:
    """The name in FastViT's first checkpoints: timm takes folded weights for one of those, and translates."""
    return re.sub(r"(layer_scale_\d)\.gamma$", r"\1", re.sub(r"^head\.fc\.", "head.", name))


def _with_projection(student: DualEncoder) -> nn.Module:
    """The trunk in evaluation mode, its classifier open_clip's projection where there is one."""
    trunk: Any = copy.deepcopy(student.model.visual.trunk).eval()  # type: ignore[union-attr]
    projection = getattr(student.model.visual.head, "proj", None)  # type: ignore[union-attr]
    if projection is None:
        return trunk  # type: ignore[no-any-return]
    trunk.reset_classifier(student.embedding_dim)
    classifier = trunk.get_classifier()
    if not isinstance(classifier, nn.Linear):
        raise UnsupportedError(
            f"the classifier of this timm model is a {type(classifier).__name__}, which cannot hold the projection",
            remedy="take export.to_onnx",
            field="student_folder",
        )
    with torch.no_grad():
        classifier.weight.copy_(projection.weight)
        classifier.bias.copy_(projection.bias if projection.bias is not None else torch.zeros(student.embedding_dim))
    return trunk  # type: ignore[no-any-return]


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}


def _create(name: str, student: DualEncoder, arguments: dict[str, Any]) -> nn.Module:
    import timm

    model: nn.Module = timm.create_model(name, pretrained=False, num_classes=_outputs(student), **arguments)
    return model.eval()


def _outputs(student: DualEncoder) -> int:
    """0 where the pooled state is the embedding itself."""
    return 0 if student.model_cfg["vision_cfg"].get("timm_proj") == "none" else student.embedding_dim


def _config(student: DualEncoder, tower: _Tower, source: Source) -> dict[str, Any]:
    preprocess = student.preprocess_config
    return {
        "architecture": tower.architecture,
        "num_classes": _outputs(student),
        "num_features": student.embedding_dim,
        "model_args": tower.arguments,
        "pretrained_cfg": {
            "input_size": [3, *preprocess.size],
            "fixed_input_size": tower.fixed_size,
            "interpolation": preprocess.interpolation,
            "crop_pct": 1.0,
            "crop_mode": "squash" if preprocess.resize_mode == "squash" else "center",
            "mean": list(preprocess.mean),
            "std": list(preprocess.std),
            "num_classes": _outputs(student),
        },
        _SOURCE_KEY: source.weights_sha256,
    }


@torch.no_grad()
def _compared(folder: Path, student: DualEncoder, reparameterized: bool) -> TimmReport:
    import timm

    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    images = [image for image in parity.pictures() if image.mode == "RGB"]
    pixels = torch.stack([student.preprocess(image) for image in images])
    report = TimmReport(
        image_max_abs=_distance(nn.functional.normalize(model(pixels), dim=-1), student.encode_image(pixels)),
        pixels_max_abs=_distance(torch.stack([transform(image) for image in images]), pixels),
        reparameterized=reparameterized,
    )
    if not report.image_max_abs <= (_FUSED_BOUND if reparameterized else _BOUND):  # also where it is not a number
        raise ExportError(
            f"the timm folder differs from the student by {report.image_max_abs:.1e}",
            remedy="report it with the student's config and the version of timm",
        )
    return report


def _distance(left: Tensor, right: Tensor) -> float:
    return float((left - right).abs().max())


def _card(tower: _Tower, report: TimmReport, license: str) -> str:
    folded = "Its training branches are folded into single convolutions: it is for inference. "
    return (
        front_matter(library_name="timm", license=license, pipeline_tag="image-feature-extraction")
        + "# The image tower of a dual encoder distilled with aced-sdk\n\n"
        "```python\nimport timm\n"
        'model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()\n'
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))\n```\n\n"
        f"Architecture {code_span(tower.architecture)} with {code_span(json.dumps(tower.arguments))}. "
        f"{folded if report.reparameterized else ''}"
        "Its output is the image embedding: divide it by its L2 norm.\n\n"
        f"Embeddings of the same tensors differ from the student's by at most {report.image_max_abs:.1e}, normalised "
        f"pixels of RGB pictures by at most {report.pixels_max_abs:.1e}. Lay transparent pictures on white first.\n"
    )
