# SPDX-License-Identifier: Apache-2.0
"""A ViT student as a transformers folder: `CLIPModel` or `SiglipModel`, whole or the vision tower apart."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from pydantic import Field
from torch import Tensor, nn

from aced_sdk.config import Config
from aced_sdk.errors import ConfigError, UnsupportedError
from aced_sdk.files import read_json, write_json
from aced_sdk.towers import DualEncoder
from aced_sdk.towers.huggingface import activation, clip_image_processor, is_clip_vit, is_siglip_vit
from aced_sdk.towers.trust import without_bars
from export.folders.transformers_js import lay_beside
from export.folders.transformers_models import processor, vision_model, whole_model
from export.runtime import parity
from export.student import load_student
from export.writing import ExportError, check_target, export_folder, front_matter

Tower = Literal["both", "vision"]
BIAS_KEY = "aced_logit_bias"
_SOURCE_KEY = "aced_source"
_BOUND = 1e-5  # max-abs on normalised embeddings of the same tensors
_MODALITIES = ("text", "image")  # as sentence-transformers names them
_PIPELINE_LENGTH = 64  # to which transformers' zero-shot pipeline pads texts of every SigLIP model
_PLAIN_TEXT = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"}
_SIGLIP_TEXT = _PLAIN_TEXT | {
    "no_causal_mask", "pool_type", "proj_type", "proj_bias", "norm_kwargs", "act_kwargs",
    "hf_tokenizer_name", "tokenizer_kwargs",
}  # fmt: skip


class TransformersReport(Config):
    """The folder as transformers loads it, against the student."""

    image_max_abs: float = Field(description="largest difference of normalised image embeddings, same pixel tensors")
    text_max_abs: float | None = Field(
        description="largest difference of normalised text embeddings, same texts; None for the vision tower apart"
    )
    pixels_max_abs_pil: float = Field(
        description="largest difference of normalised pixels, backend='pil', RGB pictures"
    )
    pixels_max_abs_torchvision: float = Field(description="the same with transformers' default backend")


def to_transformers(
    student_folder: str | PathLike[str],
    directory: str | Path,
    part: Tower = "both",
    onnx: str | Path | None = None,
) -> TransformersReport:
    """Write a folder that transformers loads by itself, checked by loading it.

    A plain CLIP ViT with open_clip's CLIP text tower becomes a `CLIPModel`, a SigLIP ViT of timm with a text tower that
    reads both ways and pools its last token a `SiglipModel`; `AutoModel` and `AutoProcessor` open both. CLIPModel has
    no place for a sigmoid student's bias: it is kept as `aced_logit_bias` in config.json.

    Args:
        student_folder: a saved student.
        directory: the folder to write; an older one made by this function is replaced.
        part: "vision" writes the image tower and its image processor alone, as `CLIPVisionModelWithProjection` or
            `SiglipVisionModel`; then the text tower may be any.
        onnx: a folder that `to_onnx` made of the same student; its graphs are laid beside, for transformers.js.

    Raises:
        ModelError: if the student cannot be loaded.
        ConfigError: for an unknown part.
        UnsupportedError: for students that transformers cannot hold exactly.
        ExportError: if the loaded folder differs from the student, the directory holds something else, or the ONNX
            folder is another student's.
    """
    if part not in get_args(Tower):
        raise ConfigError(f"part is {part!r}", remedy=f"give one of {', '.join(get_args(Tower))}", field="part")
    target = Path(directory)
    check_target(target, "config.json", '"aced_')
    student, source = load_student(student_folder)
    siglip = _supported(student, part)
    with without_bars(), export_folder(target) as folder:
        if onnx is not None:
            lay_beside(Path(onnx), source, folder)
        model = vision_model(student, siglip) if part == "vision" else whole_model(student, siglip)
        _save(model, folder)
        (clip_image_processor(student) if part == "vision" else processor(student, siglip)).save_pretrained(folder)
        _classic_json(folder)
        if siglip and part == "both":
            _sentence_transformers(folder)
        keys = {_SOURCE_KEY: source.weights_sha256} | ({} if siglip else {BIAS_KEY: student.bias})
        write_json(folder / "config.json", _read(folder / "config.json") | keys)
        report = _compared(folder, type(model), student, part)
        card = _card(student, report, source.license, type(model).__name__)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return report


def _supported(student: DualEncoder, part: Tower) -> bool:
    """Whether the student is SigLIP-shaped; the other one that transformers holds is CLIP's."""
    from open_clip.model import CLIP
    from open_clip.tokenizer import SimpleTokenizer

    siglip = is_siglip_vit(student)
    if not (siglip or is_clip_vit(student)):
        raise UnsupportedError(
            "transformers holds only a plain CLIP ViT or a SigLIP ViT, and this image tower is neither",
            remedy="take export.to_timm for a tower of timm, export.to_onnx for any, or load the folder with open_clip",
            field="student_folder",
        )
    text_cfg = student.model_cfg["text_cfg"]
    if siglip:
        fits = _is_siglip_text(student)
    else:
        plain = type(student.model) is CLIP and set(text_cfg) <= _PLAIN_TEXT
        fits = plain and isinstance(student.tokenizer, SimpleTokenizer)
    if part == "both" and not fits:
        raise UnsupportedError(
            "transformers' CLIPModel holds a plain CLIP ViT with open_clip's own text tower and tokenizer, its "
            "SiglipModel a SigLIP ViT with a text tower that reads both ways and pools its last token; this student "
            "pairs other ones",
            remedy="take part='vision' for the image tower alone, export.to_onnx, which takes other towers, or load "
            "the folder with open_clip",
            field="student_folder",
        )
    if student.preprocess_config.resize_mode == "longest":
        raise UnsupportedError(
            "transformers' CLIPImageProcessor cannot pad after the longest side",
            remedy="take export.to_onnx, or train with resize='squash' or 'shortest'",
            field="student.resize",
        )
    return siglip


def _is_siglip_text(student: DualEncoder) -> bool:
    from open_clip.tokenizer import HFTokenizer
    from open_clip.transformer import TextTransformer

    text, cfg = getattr(student.model, "text", None), student.model_cfg["text_cfg"]
    return (
        isinstance(text, TextTransformer)
        and set(cfg) <= _SIGLIP_TEXT
        and bool(cfg.get("no_causal_mask"))
        and text.pool_type == "last"
        and text.text_projection is not None
        and activation(text.transformer.resblocks[0].mlp.gelu) is not None
        and isinstance(student.tokenizer, HFTokenizer)
    )


# -- files --------------------------------------------------------------------------------------------------------


def _save(model: Any, folder: Path) -> None:
    state = model.state_dict()
    if type(model).__name__ == "SiglipVisionModel":  # version 5 writes bare names, which version 4 does not know
        state = {f"vision_model.{key.removeprefix('vision_model.')}": tensor for key, tensor in state.items()}
        model.save_pretrained(folder, state_dict=state, save_original_format=False)
    else:
        model.save_pretrained(folder)


def _classic_json(folder: Path) -> None:
    """Add what transformers 4 and transformers.js look for."""
    if (folder / "processor_config.json").is_file():
        parts = _read(folder / "processor_config.json")
        write_json(folder / "preprocessor_config.json", parts.pop("image_processor"))
        write_json(folder / "processor_config.json", parts)
    if (folder / "tokenizer_config.json").is_file():
        tokenizer = _read(folder / "tokenizer_config.json")
        if tokenizer.get("tokenizer_class") == "TokenizersBackend":  # version 5's name for the same class
            tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
            write_json(folder / "tokenizer_config.json", tokenizer)


def _sentence_transformers(folder: Path) -> None:
    """Let sentence-transformers pad texts to the whole context: by itself it pads to the longest of a batch."""
    kind = "sentence_transformers.base.modules.transformer.Transformer"
    write_json(folder / "modules.json", [{"idx": 0, "name": "0", "path": "", "type": kind}])
    gives = {name: {"method": f"get_{name}_features", "method_output_name": "pooler_output"} for name in _MODALITIES}
    config = {
        "transformer_task": "feature-extraction",
        "modality_config": gives,
        "module_output_name": "sentence_embedding",
        "processing_kwargs": {"text": {"padding": "max_length", "truncation": True}},
    }
    write_json(folder / "sentence_bert_config.json", config)


def _read(path: Path) -> dict[str, Any]:
    return dict(read_json(path))


# -- the check ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def _compared(folder: Path, kind: Any, student: DualEncoder, part: Tower) -> TransformersReport:
    from transformers import AutoImageProcessor, AutoProcessor

    model = kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False, use_safetensors=True).eval()
    images = [image for image in parity.pictures() if image.mode == "RGB"]
    pixels = torch.stack([student.preprocess(image) for image in images])
    text_max_abs = None
    if part == "vision":
        out = model(pixel_values=pixels)
        embeds = out.image_embeds if "image_embeds" in out else out.pooler_output
    else:
        # Plain texts: transformers has no counterpart to open_clip's cleaning with ftfy and its HTML unescaping.
        texts = [text for text in parity.TEXTS if text.isascii() and "&" not in text and "<" not in text]
        tokens = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)(
            text=texts, return_tensors="pt", padding="max_length", truncation=True
        )
        out = model(pixel_values=pixels, **tokens)
        embeds = out.image_embeds
        text_max_abs = _distance(out.text_embeds, student.encode_text(texts))
    pixels_of = {
        kind: AutoImageProcessor.from_pretrained(folder, backend=kind, local_files_only=True, trust_remote_code=False)
        for kind in ("pil", "torchvision")
    }
    report = TransformersReport(
        image_max_abs=_distance(nn.functional.normalize(embeds, dim=-1), student.encode_image(pixels)),
        text_max_abs=text_max_abs,
        **{
            f"pixels_max_abs_{kind}": _distance(prepare(images=images, return_tensors="pt")["pixel_values"], pixels)
            for kind, prepare in pixels_of.items()
        },
    )
    largest = max(report.image_max_abs, report.text_max_abs or 0.0)
    if not largest <= _BOUND:  # also where a value is not a number
        raise ExportError(
            f"the transformers folder differs from the student by {largest:.1e}",
            remedy="report it with the student's config and the version of transformers",
        )
    return report


def _distance(left: Tensor, right: Tensor) -> float:
    return float((left - right).abs().max())


def _card(student: DualEncoder, report: TransformersReport, license: str, kind: str) -> str:
    whole = report.text_max_abs is not None
    auto = "AutoProcessor" if whole else "AutoImageProcessor"
    task = "zero-shot-image-classification" if whole else "image-feature-extraction"
    notes = _notes(student, kind)
    largest = max(report.image_max_abs, report.text_max_abs or 0.0)
    return (
        front_matter(library_name="transformers", license=license, pipeline_tag=task)
        + "# A dual encoder distilled with aced-sdk\n\n"
        f"```python\nfrom transformers import {auto}, {kind}\n"
        f'model = {kind}.from_pretrained("FOLDER")\n'
        f'processor = {auto}.from_pretrained("FOLDER", backend="pil")\n```\n\n'
        f"{notes}"
        f'`backend="pil"` gives the pixels of training (largest difference {report.pixels_max_abs_pil:.1e}). '
        "By default transformers resizes with torchvision (normalised pixels differ by "
        f"{report.pixels_max_abs_torchvision:.1e} on smooth pictures, by more on fine textures). The processor neither "
        "lays transparency on white nor cleans text as open_clip does (ftfy, HTML entities): give it RGB pictures and "
        "plain text.\n\n"
        f"Embeddings of the same tensors differ by at most {largest:.1e}.\n"
    )


def _notes(student: DualEncoder, kind: str) -> str:
    """What a user of this class must know."""
    length = student.context_length
    notes = ""
    if kind == "CLIPModel" and student.bias:
        notes = (
            f"The student was trained with a sigmoid loss and a bias of {student.bias:.4f}, for which CLIPModel has no "
            f"place: config.json keeps it as `{BIAS_KEY}`. Add it to the logits before a sigmoid; "
            "rankings do not need it.\n\n"
        )
    if kind == "CLIPModel":
        notes += _without_pipeline(
            "transformers' zero-shot pipeline does not cut texts: it fails if a label in its template has more than "
            f"{length} tokens. Then use model and processor",
            "padding=True",
            "softmax(-1)",
        )
    if kind == "SiglipModel":
        notes = 'Give texts `padding="max_length"`: the text tower reads its padding.\n\n'
        if length != _PIPELINE_LENGTH:
            effect = "it fails" if length < _PIPELINE_LENGTH else "its scores are wrong"
            notes += _without_pipeline(
                f"transformers' zero-shot pipeline pads texts to {_PIPELINE_LENGTH} tokens, and this model reads "
                f"{length}: {effect}. Use model and processor",
                'padding="max_length"',
                "sigmoid()",
            )
    if kind == "SiglipVisionModel":
        notes = "The embedding is `pooler_output`.\n\n"
    return notes


def _without_pipeline(why: str, padding: str, last: str) -> str:
    return (
        f"{why}:\n\n```python\n"
        'texts = [f"This is a photo of {label}." for label in labels]\n'
        f'inputs = processor(images=images, text=texts, {padding}, truncation=True, return_tensors="pt")\n'
        f"scores = model(**inputs).logits_per_image.{last}\n```\n\n"
    )
