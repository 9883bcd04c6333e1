# SPDX-License-Identifier: Apache-2.0
"""optimum-onnx, with the transformers that it allows, on folders with ONNX graphs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from optimum.onnxruntime import ORTModelForCustomTasks, ORTModelForZeroShotImageClassification
from PIL import Image
from torch.nn.functional import normalize
from transformers import AutoImageProcessor, AutoTokenizer, pipeline

from tools.clients.inside import Check


def checks(folder: Path) -> Iterator[Check]:
    """Towers apart, both towers together, and the zero-shot pipeline, which pads SigLIP's texts to 64 tokens."""
    for artefact in ("onnx/clip", "onnx/siglip", "onnx/timm", "web/clip"):
        for compared, kind in (
            ("image embeddings", "own"),
            ("text embeddings", "texts"),
            ("embeddings of cut texts", "cut_texts"),
        ):
            yield Check(artefact, compared, "ORTModelForCustomTasks", partial(tower, folder, artefact, kind))
        for way in ("image", "text"):
            name = "ORTModelForZeroShotImageClassification"
            yield Check(artefact, f"logits per {way}", name, partial(logits, folder, artefact, way))
        if artefact != "onnx/siglip":
            yield Check(artefact, "zero-shot scores", "pipeline", partial(scores, folder, artefact))


def inputs(folder: Path, artefact: str, kind: str) -> dict[str, Any]:
    """Pictures or texts, as the folder's own processors prepare them."""
    place = folder / artefact
    if kind == "own":
        images = [Image.open(path) for path in sorted((folder / "pictures").glob("own*.png"))]
        return dict(AutoImageProcessor.from_pretrained(place)(images=images, return_tensors="pt"))
    texts = json.loads((folder / "inputs.json").read_text())[kind]
    found = AutoTokenizer.from_pretrained(place)(texts, padding=True, truncation=True, return_tensors="pt")
    return {"input_ids": found["input_ids"]}


def tower(folder: Path, artefact: str, kind: str) -> torch.Tensor:
    """Embeddings of one tower."""
    file = "vision_model.onnx" if kind == "own" else "text_model.onnx"
    model = ORTModelForCustomTasks.from_pretrained(folder / artefact, subfolder="onnx", file_name=file)
    return normalize(next(iter(model(**inputs(folder, artefact, kind)).values())), dim=-1)


def whole(place: Path) -> Any:
    """The graph of both towers."""
    return ORTModelForZeroShotImageClassification.from_pretrained(place, subfolder="onnx", file_name="model.onnx")


def logits(folder: Path, artefact: str, way: str) -> torch.Tensor:
    """An output of the graph of both towers."""
    model = whole(folder / artefact)
    return model(**inputs(folder, artefact, "own"), **inputs(folder, artefact, "texts"))[f"logits_per_{way}"]  # type: ignore[no-any-return]


def scores(folder: Path, artefact: str) -> list[list[float]]:
    """Probabilities in the order of the labels."""
    place = folder / artefact
    processors = {
        "tokenizer": AutoTokenizer.from_pretrained(place),
        "image_processor": AutoImageProcessor.from_pretrained(place),
    }
    classify = pipeline("zero-shot-image-classification", model=whole(place), **processors)
    labels = json.loads((folder / "inputs.json").read_text())["labels"]
    images = [Image.open(path) for path in sorted((folder / "pictures").glob("own*.png"))]
    found = classify(images, candidate_labels=labels)
    return [[next(one["score"] for one in row if one["label"] == label) for label in labels] for row in found]
