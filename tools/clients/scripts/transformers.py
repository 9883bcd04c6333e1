# SPDX-License-Identifier: Apache-2.0
"""transformers 4 and 5: dual encoders, the zero-shot pipeline, vision towers apart, vision-language models."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from torch.nn.functional import normalize
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline

from tools.clients.inside import Check
from tools.clients.scripts.answers import answer_checks

# the image processor without torchvision, as the cards name it
PIL: dict[str, Any] = {"backend": "pil"} if int(transformers.__version__.split(".")[0]) > 4 else {"use_fast": False}

PIPELINE = "pipeline, or the card's code where it fails"


def checks(folder: Path) -> Iterator[Check]:
    """Every folder that `export.to_transformers` and `vlm.save` wrote."""
    for name in ("clip", "clip-short", "siglip"):
        artefact = f"transformers/{name}"
        yield Check(artefact, "image embeddings", "AutoModel, batch", partial(images, folder, artefact, "own"))
        yield Check(artefact, "embeddings of large pictures", "AutoModel", partial(images, folder, artefact, "large"))
        yield Check(artefact, "text embeddings", "AutoModel, batch", partial(texts, folder, artefact, "texts"))
        yield Check(artefact, "text embeddings", "AutoModel, one by one", partial(singles, folder, artefact))
        yield Check(artefact, "embeddings of cut texts", "AutoModel", partial(texts, folder, artefact, "cut_texts"))
        for way in ("image", "text"):
            yield Check(artefact, f"logits per {way}", "AutoModel", partial(logits, folder, artefact, way))
        for end, labels in (("", "labels"), (" of long labels", "long_labels")):
            yield Check(artefact, f"zero-shot scores{end}", PIPELINE, partial(scores, folder, artefact, labels))
    for name in ("clip", "siglip"):
        artefact = f"transformers/{name}-vision"
        yield Check(artefact, "image embeddings", "the class on the card", partial(vision, folder, artefact))
    fast = ("fastvlm",) if hasattr(transformers, "FastVlmForConditionalGeneration") else ()  # not in version 4
    for name in ("llava", "right", "aya", *fast):
        load = partial(open_vlm, folder / "vlm" / name)
        yield from answer_checks(folder, f"vlm/{name}", "AutoModelForImageTextToText", load)


def open_vlm(folder: Path) -> tuple[Any, Any]:
    """A model and its processor; a tensor that is not in the folder is an error."""
    model, found = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    if found["missing_keys"]:
        raise ValueError(f"missing: {sorted(found['missing_keys'])[:3]}")
    return model.eval(), AutoProcessor.from_pretrained(folder)


def words(folder: Path, name: str) -> list[str]:
    """Texts or labels."""
    return list(json.loads((folder / "inputs.json").read_text())[name])


def pictures(folder: Path, kind: str) -> list[Image.Image]:
    """The pictures of a kind."""
    return [Image.open(path) for path in sorted((folder / "pictures").glob(f"{kind}*.png"))]


def padding(model: Any) -> dict[str, Any]:
    """How the card says that texts are padded."""
    return {"padding": "max_length" if model.config.model_type == "siglip" else True, "truncation": True}


def embedding(found: Any) -> torch.Tensor:
    """The embedding that `get_image_features` or `get_text_features` gives, in transformers 4 or 5."""
    return normalize(found if isinstance(found, torch.Tensor) else found.pooler_output, dim=-1)


@torch.no_grad()
def images(folder: Path, artefact: str, kind: str) -> torch.Tensor:
    """Embeddings of pictures; those that must be resized with the card's image processor."""
    model = AutoModel.from_pretrained(folder / artefact).eval()
    options = PIL if kind == "large" else {}
    processor = AutoImageProcessor.from_pretrained(folder / artefact, **options)
    return embedding(model.get_image_features(**processor(images=pictures(folder, kind), return_tensors="pt")))


@torch.no_grad()
def texts(folder: Path, artefact: str, name: str) -> torch.Tensor:
    """Embeddings of texts."""
    model, processor = (
        AutoModel.from_pretrained(folder / artefact).eval(),
        AutoProcessor.from_pretrained(folder / artefact),
    )
    return embedding(
        model.get_text_features(**processor(text=words(folder, name), return_tensors="pt", **padding(model)))
    )


@torch.no_grad()
def singles(folder: Path, artefact: str) -> list[Any]:
    """Embeddings of texts, each in a batch of its own."""
    model, processor = (
        AutoModel.from_pretrained(folder / artefact).eval(),
        AutoProcessor.from_pretrained(folder / artefact),
    )
    found = []
    for text in words(folder, "texts"):
        found.append(
            embedding(model.get_text_features(**processor(text=[text], return_tensors="pt", **padding(model))))[0]
        )
    return found


@torch.no_grad()
def logits(folder: Path, artefact: str, way: str, prompts: list[str] | None = None) -> torch.Tensor:
    """What the whole model gives for the texts, or for others."""
    model, processor = (
        AutoModel.from_pretrained(folder / artefact).eval(),
        AutoProcessor.from_pretrained(folder / artefact),
    )
    asked = prompts or words(folder, "texts")
    inputs = processor(images=pictures(folder, "own"), text=asked, return_tensors="pt", **padding(model))
    return model(**inputs)[f"logits_per_{way}"]  # type: ignore[no-any-return]


def scores(folder: Path, artefact: str, name: str) -> Any:
    """Probabilities in the order of the labels.

    The pipeline does not cut texts, and pads SigLIP's to 64 tokens: with a shorter context it fails. Then the card must
    say so, and the model with its processor must give the scores.
    """
    labels = words(folder, name)
    classify = pipeline("zero-shot-image-classification", str(folder / artefact), device="cpu")
    try:
        found = classify(pictures(folder, "own"), candidate_labels=labels)
    except (ValueError, RuntimeError):
        if not re.search(r"\bpipeline\b", (folder / artefact / "README.md").read_text()):
            raise
        prompts = [f"This is a photo of {label}." for label in labels]
        raw = logits(folder, artefact, "image", prompts)
        return raw.sigmoid() if classify.model.config.model_type == "siglip" else raw.softmax(1)
    return [[next(one["score"] for one in row if one["label"] == label) for label in labels] for row in found]


@torch.no_grad()
def vision(folder: Path, artefact: str) -> torch.Tensor:
    """Embeddings of the vision tower apart."""
    config = json.loads((folder / artefact / "config.json").read_text())
    model = getattr(transformers, config["architectures"][0]).from_pretrained(folder / artefact).eval()
    processor = AutoImageProcessor.from_pretrained(folder / artefact)
    found = model(**processor(images=pictures(folder, "own"), return_tensors="pt"))
    return normalize(found.image_embeds if "image_embeds" in found else found.pooler_output, dim=-1)
