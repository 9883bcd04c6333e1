# SPDX-License-Identifier: Apache-2.0
"""Small artefacts of every kind that this project writes, and what this project computes on them.

Towers have a few layers and random weights. `make` writes:

| path | what |
|---|---|
| students/clip, clip-short, siglip, timm | students: CLIP, CLIP with 8 tokens of context, SigLIP, a ResNet of timm |
| onnx/clip, siglip, timm | `export.to_onnx`, the graph of both towers included |
| transformers/clip, clip-short, siglip, clip-vision, siglip-vision | `export.to_transformers` |
| web/clip, siglip | the same with the graphs of `to_onnx` laid beside |
| timm/clip, timm | `export.to_timm` |
| tasks/* | evaluation tasks, see `tools.clients.tasks` |
| vlm/*, lmms | vision-language models, see `tools.clients.captioners` |
| pictures/own*.png, large*.png | pictures of the towers' size, and larger ones |
| inputs.json | texts and labels |
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

import export
from aced_sdk import towers
from aced_sdk.config import Student
from aced_sdk.towers import DualEncoder
from tools.clients import captioners, tasks
from tools.clients.expected import Expectations

SIZE, LARGE = 32, ((90, 70), (50, 120))
INPUTS: dict[str, Any] = {
    "texts": ["a red apple", "two apples on a table", "it's 12 o'clock", "a photo of a cat"],
    "cut_texts": ["a photo of a small red cat " * 12, "apple"],
    "labels": ["apple", "boat", "cat"],
    "long_labels": ["a very small red apple on a table", "a boat of wood on the shore", "a sleeping cat"],
}
PROMPT = "This is a photo of {}."  # of transformers' pipeline
_WORDS = "a an red apple apples photo of this is cat boat two on table its 12 o clock small"
_TEXT = {"context_length": 32, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
_VIT = {"image_size": SIZE, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16}


class _Work(NamedTuple):
    folder: Path
    expected: Expectations
    own: list[Image.Image]
    large: list[Image.Image]


def make(folder: Path) -> Expectations:
    """Write all artefacts into a folder.

    Returns:
        What this project computes on them.
    """
    work = _Work(folder, Expectations(), *_pictures(folder / "pictures"))
    (folder / "inputs.json").write_text(json.dumps(INPUTS), encoding="utf-8")
    for name, architecture in _architectures(folder).items():
        encoder = _varied(towers.build(Student(architecture=architecture), seed=0))
        towers.save(encoder, folder / "students" / name, license="apache-2.0")
        _embeddings(work, f"students/{name}", encoder)
        if name != "clip-short":
            _onnx(work, name, encoder)
        if name != "timm":
            _transformers(work, name, encoder)
        if name in ("clip", "timm"):
            export.to_timm(folder / "students" / name, folder / "timm" / name)
            _embeddings(work, f"timm/{name}", encoder)
    tasks.make(folder, work.expected)
    captioners.make(folder, work.expected)
    return work.expected


def _pictures(folder: Path) -> tuple[list[Image.Image], list[Image.Image]]:
    """Smooth noise: four pictures of the towers' size, and two that must be resized."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    made: dict[str, list[Image.Image]] = {"own": [], "large": []}
    for kind, size in (*(("own", (SIZE, SIZE)),) * 4, *(("large", size) for size in LARGE)):
        coarse = Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        image = coarse.resize(size, Image.Resampling.BICUBIC)
        image.save(folder / f"{kind}{len(made[kind])}.png")
        made[kind].append(image)
    return made["own"], made["large"]


# -- students -----------------------------------------------------------------------------------------------------


def _architectures(folder: Path) -> dict[str, Any]:
    """open_clip configs by name of the student."""
    clip = {"embed_dim": 16, "vision_cfg": _VIT, "text_cfg": _TEXT}
    timm = {"image_size": SIZE, "timm_model_pretrained": False}
    siglip_text = {
        "context_length": 16, "vocab_size": len(_WORDS.split()) + 3, "width": 32, "heads": 2, "layers": 2,
        "no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6},
        "act_kwargs": {"approximate": "tanh"}, "hf_tokenizer_name": str(_siglip_tokenizer(folder / "words")),
        "tokenizer_kwargs": {"clean": "canonicalize"},
    }  # fmt: skip
    return {
        "clip": clip,
        "clip-short": clip | {"text_cfg": _TEXT | {"context_length": 8}},
        "siglip": {
            "embed_dim": 32,
            "custom_text": True,
            "vision_cfg": timm | {"timm_model_name": _siglip_tower(), "timm_pool": "map", "timm_proj": "none"},
            "text_cfg": siglip_text,
        },
        "timm": clip
        | {"vision_cfg": timm | {"timm_model_name": "test_resnet", "timm_pool": "avg", "timm_proj": "linear"}},
    }


@cache
def _siglip_tower() -> str:
    """Register a small SigLIP ViT with timm, which has only large ones."""
    from timm.models import register_model
    from timm.models.vision_transformer import _create_vision_transformer

    def vit_tiny_siglip(pretrained: bool = False, **options: Any) -> Any:
        sizes = {"img_size": SIZE, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
        kind = {"class_token": False, "global_pool": "map", "act_layer": "gelu_tanh"}
        return _create_vision_transformer("vit_base_patch32_siglip_256", pretrained, **(sizes | kind | options))

    vit_tiny_siglip.__module__ = __name__
    register_model(vit_tiny_siglip)
    return "vit_tiny_siglip"


def _siglip_tokenizer(folder: Path) -> Path:
    """A tokenizer of some words that ends texts as SigLIP's does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "</s>", *_WORDS.split()])}
    raw = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    marks = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=raw, **marks).save_pretrained(folder)
    return folder


@torch.no_grad()
def _varied(encoder: DualEncoder) -> DualEncoder:
    """Larger random weights, so that embeddings of different inputs differ clearly; no bias of 0 and no norm of 1."""
    torch.manual_seed(0)
    for value in encoder.model.parameters():
        if value.ndim > 1:
            value.mul_(2)
        elif value.ndim == 1:
            value.add_(0.1 * torch.randn_like(value))
    return encoder.eval()


# -- exports ------------------------------------------------------------------------------------------------------


def _onnx(work: _Work, name: str, encoder: DualEncoder) -> None:
    source, target = work.folder / "students" / name, work.folder / "onnx" / name
    precisions = ("fp32", "fp16", "int8") if name == "clip" else ("fp32",)
    export.to_onnx(source, target, ("vision", "text", "both"), precisions, measure=False)  # type: ignore[arg-type]
    _whole(work, f"onnx/{name}", encoder)
    for precision, bound in (("fp16", 0.01), ("int8", 0.15)):  # the second: what a cosine of 0.99 allows
        _embeddings(work, f"onnx/{name}", encoder, f", {precision}", bound)


def _transformers(work: _Work, name: str, encoder: DualEncoder) -> None:
    source = work.folder / "students" / name
    export.to_transformers(source, work.folder / "transformers" / name)
    _whole(work, f"transformers/{name}", encoder)
    if name == "clip-short":
        return
    export.to_transformers(source, work.folder / "transformers" / f"{name}-vision", part="vision")
    _embeddings(work, f"transformers/{name}-vision", encoder)
    export.to_transformers(source, work.folder / "web" / name, onnx=work.folder / "onnx" / name)
    _whole(work, f"web/{name}", encoder)


# -- what is computed ---------------------------------------------------------------------------------------------


def _embeddings(work: _Work, artefact: str, encoder: DualEncoder, suffix: str = "", bound: float = 1e-5) -> None:
    for compared, value in (
        ("image embeddings", encoder.encode_image(work.own)),
        ("embeddings of large pictures", encoder.encode_image(work.large)),
        ("text embeddings", encoder.encode_text(INPUTS["texts"])),
        ("embeddings of cut texts", encoder.encode_text(INPUTS["cut_texts"])),
    ):
        work.expected.add(artefact, compared + suffix, value, bound)


def _whole(work: _Work, artefact: str, encoder: DualEncoder) -> None:
    """Embeddings, and logits and scores as CLIPModel and SiglipModel give them: the first has no bias."""
    _embeddings(work, artefact, encoder)
    siglip = bool(encoder.model_cfg["text_cfg"].get("no_causal_mask"))
    images, bias = encoder.encode_image(work.own), encoder.bias if siglip else 0.0

    def logits(texts: list[str]) -> torch.Tensor:
        return encoder.scale * images @ encoder.encode_text(texts).T + bias

    def scores(labels: list[str]) -> torch.Tensor:
        found = logits([PROMPT.format(label) for label in labels])
        return found.sigmoid() if siglip else found.softmax(1)

    work.expected.add(artefact, "logits per image", logits(INPUTS["texts"]), 1e-4)
    work.expected.add(artefact, "logits per text", logits(INPUTS["texts"]).T, 1e-4)
    work.expected.add(artefact, "zero-shot scores", scores(INPUTS["labels"]), 1e-4)
    work.expected.add(artefact, "zero-shot scores of long labels", scores(INPUTS["long_labels"]), 1e-4)
