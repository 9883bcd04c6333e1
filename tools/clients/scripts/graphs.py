# SPDX-License-Identifier: Apache-2.0
"""The graphs of `export.to_onnx` with the inputs that its files describe, shared by onnxruntime and OpenVINO."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer

from tools.clients.inside import Check

Floats = NDArray[np.float32]
Inputs = dict[str, NDArray[Any]]
Run = Callable[[Path, Inputs], dict[str, Floats]]


def graph_checks(folder: Path, how: str, run: Run) -> Iterator[Check]:
    """Embeddings of each tower in each precision, texts with padding and without, and the graph of both towers.

    Args:
        folder: the artefacts.
        how: the interface that `run` uses.
        run: gives a graph's outputs by name.
    """
    for name in ("clip", "siglip", "timm"):
        artefact = f"onnx/{name}"
        place = folder / artefact
        for precision in ("fp32", "fp16", "int8") if name == "clip" else ("fp32",):
            suffix = "" if precision == "fp32" else f"_{precision}"
            end = "" if precision == "fp32" else f", {precision}"
            vision, text = place / f"onnx/vision_model{suffix}.onnx", place / f"onnx/text_model{suffix}.onnx"
            for compared, path, compute in (
                ("image embeddings", vision, partial(pixels, folder, place, "own")),
                ("embeddings of large pictures", vision, partial(pixels, folder, place, "large")),
                ("text embeddings", text, partial(ids, folder, place, "texts")),
                ("embeddings of cut texts", text, partial(ids, folder, place, "cut_texts")),
            ):
                yield Check(artefact, compared + end, how, partial(embeddings, run, path, compute))
            unpadded = partial(singles, folder, place, run, text)
            yield Check(artefact, f"text embeddings{end}", f"{how}, one by one without padding", unpadded)
        for output in ("logits_per_image", "logits_per_text"):
            yield Check(artefact, output.replace("_", " "), how, partial(both, folder, place, run, output))


def embeddings(run: Run, path: Path, inputs: Callable[[], Inputs]) -> Floats:
    """The normalised first output."""
    values: Floats = next(iter(run(path, inputs()).values())).astype(np.float32)
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    return values


def singles(folder: Path, place: Path, run: Run, path: Path) -> list[Floats]:
    """Embeddings of texts as they are, each in a batch of its own."""
    tokenizer = Tokenizer.from_file(str(place / "tokenizer.json"))
    tokenizer.no_padding()
    texts = json.loads((folder / "inputs.json").read_text())["texts"]
    rows = [{"input_ids": np.array([tokenizer.encode(text).ids], np.int64)} for text in texts]
    return [embeddings(run, path, partial(dict, row))[0] for row in rows]


def both(folder: Path, place: Path, run: Run, output: str) -> Floats:
    """An output of the graph of both towers."""
    return run(place / "onnx/model.onnx", pixels(folder, place, "own") | ids(folder, place, "texts"))[output]


def pixels(folder: Path, place: Path, kind: str) -> Inputs:
    """Pictures as preprocessor_config.json says."""
    config = json.loads((place / "preprocessor_config.json").read_text())
    mean, std = (np.array(config[name], np.float32)[:, None, None] for name in ("image_mean", "image_std"))
    size = (config["size"]["width"], config["size"]["height"])
    images = [Image.open(path) for path in sorted((folder / "pictures").glob(f"{kind}*.png"))]
    resized = [np.asarray(image.resize(size, Image.Resampling(config["resample"])), np.float32) for image in images]
    return {"pixel_values": (np.stack(resized).transpose(0, 3, 1, 2) / 255 - mean) / std}


def ids(folder: Path, place: Path, name: str) -> Inputs:
    """Texts as tokenizer.json pads and cuts them."""
    texts = json.loads((folder / "inputs.json").read_text())[name]
    encoded = Tokenizer.from_file(str(place / "tokenizer.json")).encode_batch(texts)
    return {"input_ids": np.array([one.ids for one in encoded], np.int64)}
