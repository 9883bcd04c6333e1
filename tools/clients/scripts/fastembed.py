# SPDX-License-Identifier: Apache-2.0
"""fastembed on folders with ONNX graphs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from fastembed import ImageEmbedding, TextEmbedding
from fastembed.common.model_description import ModelSource, PoolingType
from numpy.typing import NDArray

from tools.clients.inside import Check

# fastembed takes own pictures' models only under the name of one that it knows; this one has onnx/vision_model.onnx
KNOWN = "jinaai/jina-clip-v1"


def checks(folder: Path) -> Iterator[Check]:
    """Embeddings of both towers, from what `to_onnx` and `to_transformers` wrote."""
    TextEmbedding.add_custom_model(
        "own/text",
        PoolingType.DISABLED,
        normalization=True,
        sources=ModelSource(hf="own/text"),
        dim=16,
        model_file="onnx/text_model.onnx",
    )
    for artefact in ("onnx/clip", "onnx/timm", "web/clip"):
        for compared, kind in (("image embeddings", "own"), ("embeddings of large pictures", "large")):
            yield Check(artefact, compared, "ImageEmbedding", partial(images, folder, artefact, kind))
        for compared, kind in (("text embeddings", "texts"), ("embeddings of cut texts", "cut_texts")):
            yield Check(artefact, compared, "TextEmbedding", partial(texts, folder, artefact, kind))


def images(folder: Path, artefact: str, kind: str) -> list[NDArray[np.float32]]:
    """Embeddings of pictures."""
    model = ImageEmbedding(KNOWN, specific_model_path=str(folder / artefact))
    return list(model.embed(sorted((folder / "pictures").glob(f"{kind}*.png"))))


def texts(folder: Path, artefact: str, kind: str) -> list[NDArray[np.float32]]:
    """Embeddings of texts."""
    model = TextEmbedding("own/text", specific_model_path=str(folder / artefact))
    return list(model.embed(json.loads((folder / "inputs.json").read_text())[kind]))
