# SPDX-License-Identifier: Apache-2.0
"""sentence-transformers on transformers folders."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from sentence_transformers import SentenceTransformer

from tools.clients.inside import Check


def checks(folder: Path) -> Iterator[Check]:
    """Embeddings of pictures and texts."""
    for name in ("clip", "clip-short", "siglip"):
        artefact = f"transformers/{name}"
        words = json.loads((folder / "inputs.json").read_text())
        pictures = [Image.open(path) for path in sorted((folder / "pictures").glob("own*.png"))]
        for compared, inputs in (
            ("image embeddings", pictures),
            ("text embeddings", words["texts"]),
            ("embeddings of cut texts", words["cut_texts"]),
        ):
            yield Check(artefact, compared, "SentenceTransformer", partial(encode, folder / artefact, inputs))


def encode(place: Path, inputs: list[Any]) -> Any:
    """Normalised embeddings."""
    return SentenceTransformer(str(place), device="cpu").encode(inputs, normalize_embeddings=True)
