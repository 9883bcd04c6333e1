# SPDX-License-Identifier: Apache-2.0
"""A plain CLIP ViT student as a transformers folder: `CLIPModel` and `CLIPProcessor`, the same embeddings."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from aced_sdk.config import Config
from aced_sdk.errors import ModelError, UnsupportedError
from aced_sdk.files import whole_folder, write_json
from aced_sdk.towers import DualEncoder
from aced_sdk.towers.huggingface import (
    block_weights,
    clip_image_processor,
    clip_vision_config,
    is_clip_vit,
    vision_weights,
)
from export import parity
from export.report import ExportError
from export.save import load_student

BIAS_KEY = "aced_logit_bias"
_BOUND = 1e-5  # max-abs on normalised embeddings of the same tensors
_PLAIN_TEXT = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"}


class TransformersReport(Config):
    """The folder as transformers loads it, against the student."""

    image_max_abs: float = Field(description="largest difference of normalised image embeddings, same pixel tensors")
    text_max_abs: float = Field(description="largest difference of normalised text embeddings, same texts")
    pixels_max_abs_pil: float = Field(
        description="largest difference of normalised pixels, backend='pil', RGB pictures"
    )
    pixels_max_abs_torchvision: float = Field(description="the same with transformers' default backend")


def to_transformers(student_folder: str | PathLike[str], directory: str | Path) -> TransformersReport:
    """Write a folder for `CLIPModel.from_pretrained` and `AutoProcessor.from_pretrained`, checked by loading it.

    CLIPModel has no place for a sigmoid student's bias: it is kept as `aced_logit_bias` in config.json.

    Args:
        student_folder: a saved student with plain CLIP ViT image tower, open_clip's CLIP text tower and tokenizer.
        directory: the folder to write; an older one made by this function is replaced.

    Raises:
        ModelError: if the student cannot be loaded.
        UnsupportedError: for other students.
        ExportError: if the loaded folder differs from the student, or the directory holds something else.
    """
    target = Path(directory)
    if target.exists() and not _replaceable(target):
        raise ExportError(f"{target} holds something else", remedy="name a new or an empty folder", field="directory")
    student, source = load_student(student_folder)
    _supported(student)
    with whole_folder(target) as folder:
        _model(student).save_pretrained(folder)
        _processor(student).save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        write_json(folder / "config.json", config | {BIAS_KEY: student.bias})
        report = _compared(folder, student)
        (folder / "README.md").write_text(_card(student, report, source.license), encoding="utf-8")
    return report


def _replaceable(target: Path) -> bool:
    if target.is_file():
        return False
    config = target / "config.json"
    return not any(target.iterdir()) or (config.is_file() and BIAS_KEY in config.read_text(encoding="utf-8"))


def _supported(student: DualEncoder) -> None:
    from open_clip.model import CLIP
    from open_clip.tokenizer import SimpleTokenizer

    text_cfg = student.model_cfg["text_cfg"]
    plain_text = type(student.model) is CLIP and set(text_cfg) <= _PLAIN_TEXT
    if not (is_clip_vit(student) and plain_text and isinstance(student.tokenizer, SimpleTokenizer)):
        raise UnsupportedError(
            "transformers' CLIPModel holds only a plain CLIP ViT with open_clip's own text tower and tokenizer",
            remedy="take export.to_onnx, which takes other towers, or load the folder with open_clip",
            field="student_folder",
        )
    if student.preprocess_config.resize_mode == "longest":
        raise UnsupportedError(
            "transformers' CLIPImageProcessor cannot pad after the longest side",
            remedy="take export.to_onnx, or train with resize='squash' or 'shortest'",
            field="student.resize",
        )


def _model(student: DualEncoder) -> Any:
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig

    text_cfg, tokenizer = student.model_cfg["text_cfg"], student.tokenizer
    width = int(text_cfg["width"])
    text_config = CLIPTextConfig(
        vocab_size=text_cfg["vocab_size"],
        hidden_size=width,
        intermediate_size=int(width * text_cfg.get("mlp_ratio", 4.0)),
        num_hidden_layers=text_cfg["layers"],
        num_attention_heads=text_cfg["heads"],
        max_position_embeddings=student.context_length,
        hidden_act="quick_gelu" if student.model_cfg.get("quick_gelu") else "gelu",
        layer_norm_eps=1e-5,
        projection_dim=student.embedding_dim,
        bos_token_id=tokenizer.sot_token_id,
        eos_token_id=tokenizer.eot_token_id,  # pooling takes its first place, open_clip the highest id's: the same
        pad_token_id=tokenizer.eot_token_id,
    )
    vision_config = clip_vision_config(student)
    model = CLIPModel(
        CLIPConfig(
            vision_config=vision_config.to_dict(),
            text_config=text_config.to_dict(),
            projection_dim=student.embedding_dim,
        )
    )
    missing, unexpected = model.load_state_dict(_weights(student), strict=False)
    lost = [key for key in missing if not key.endswith("position_ids")]
    if lost or unexpected:
        raise ModelError(
            f"transformers' CLIPModel has another layout than expected: {(lost + list(unexpected))[0]}",
            remedy="install a transformers version that this package was tested with",
        )
    return model.eval()


def _weights(student: DualEncoder) -> dict[str, Tensor]:
    source = student.model.state_dict()
    visual: Any = student.model.visual
    text = block_weights(source, "transformer.resblocks.", "encoder.layers.") | {
        "embeddings.token_embedding.weight": source["token_embedding.weight"],
        "embeddings.position_embedding.weight": source["positional_embedding"],
        "final_layer_norm.weight": source["ln_final.weight"],
        "final_layer_norm.bias": source["ln_final.bias"],
    }
    weights = {f"text_model.{key}": tensor for key, tensor in text.items()}
    weights |= {f"vision_model.{key}": tensor for key, tensor in vision_weights(visual).items()}
    return weights | {
        "visual_projection.weight": source["visual.proj"].T.contiguous(),
        "text_projection.weight": source["text_projection"].T.contiguous(),
        "logit_scale": source["logit_scale"],
    }


def _processor(student: DualEncoder) -> Any:
    from transformers import CLIPProcessor, CLIPTokenizer

    simple = student.tokenizer
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}  # CLIPTokenizer splits by these
    tokenizer = CLIPTokenizer(
        vocab={names.get(token, token): number for token, number in simple.encoder.items()},
        merges=list(simple.bpe_ranks),
        model_max_length=student.context_length,
    )
    return CLIPProcessor(image_processor=clip_image_processor(student), tokenizer=tokenizer)


@torch.no_grad()
def _compared(folder: Path, student: DualEncoder) -> TransformersReport:
    from transformers import AutoModel, AutoProcessor

    model = AutoModel.from_pretrained(folder).eval()
    images = [image for image in parity.pictures() if image.mode == "RGB"]
    pixels = torch.stack([student.preprocess(image) for image in images])
    # Plain texts: CLIPTokenizer has no counterpart to open_clip's cleaning with ftfy and its HTML unescaping.
    texts = [text for text in parity.TEXTS if text.isascii() and "&" not in text and "<" not in text]
    processors = {kind: AutoProcessor.from_pretrained(folder, backend=kind) for kind in ("pil", "torchvision")}
    tokens = processors["pil"](text=texts, return_tensors="pt", padding=True, truncation=True)
    out = model(pixel_values=pixels, **tokens)
    report = TransformersReport(
        image_max_abs=_distance(out.image_embeds, student.encode_image(pixels)),
        text_max_abs=_distance(out.text_embeds, student.encode_text(texts)),
        **{
            f"pixels_max_abs_{kind}": _distance(processor(images=images, return_tensors="pt")["pixel_values"], pixels)
            for kind, processor in processors.items()
        },
    )
    if max(report.image_max_abs, report.text_max_abs) > _BOUND:
        raise ExportError(
            f"the transformers folder differs from the student by {max(report.image_max_abs, report.text_max_abs):.1e}",
            remedy="report it with the student's config and the version of transformers",
        )
    return report


def _distance(left: Tensor, right: Tensor) -> float:
    return float((left - right).abs().max())


def _card(student: DualEncoder, report: TransformersReport, license: str) -> str:
    bias = ""
    if student.bias:
        bias = (
            f"The student was trained with a sigmoid loss and a bias of {student.bias:.4f}, for which CLIPModel has no "
            f"place: config.json keeps it as `{BIAS_KEY}`. Add it to the logits before a sigmoid; "
            "rankings do not need it.\n\n"
        )
    largest = max(report.image_max_abs, report.text_max_abs)
    return (
        f"---\nlibrary_name: transformers\nlicense: {license}\npipeline_tag: zero-shot-image-classification\n---\n\n"
        "# A dual encoder distilled with aced-sdk\n\n"
        "```python\nfrom transformers import AutoProcessor, CLIPModel\n"
        'model = CLIPModel.from_pretrained("FOLDER")\n'
        'processor = AutoProcessor.from_pretrained("FOLDER", backend="pil")\n```\n\n'
        f"{bias}"
        f'`backend="pil"` gives the pixels of training (largest difference {report.pixels_max_abs_pil:.1e}). '
        "By default transformers resizes with torchvision (normalised pixels differ by "
        f"{report.pixels_max_abs_torchvision:.1e} on smooth pictures, by more on fine textures). The processor neither "
        "lays transparency on white nor cleans text as open_clip does (ftfy, HTML entities): give it RGB pictures and "
        "plain text.\n\n"
        f"Embeddings of the same tensors differ by at most {largest:.1e}.\n"
    )
