# SPDX-License-Identifier: Apache-2.0
"""open_clip on students."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import open_clip
import torch
from PIL import Image

from tools.clients.inside import Check


def checks(folder: Path) -> Iterator[Check]:
    """Embeddings; the small SigLIP is no architecture that open_clip has by itself."""
    for name in ("clip", "clip-short", "timm"):
        artefact = f"students/{name}"
        for compared, kind in (("image embeddings", "own"), ("embeddings of large pictures", "large")):
            yield Check(artefact, compared, "create_model_and_transforms", partial(images, folder, artefact, kind))
        for compared, kind in (("text embeddings", "texts"), ("embeddings of cut texts", "cut_texts")):
            yield Check(artefact, compared, "create_model_and_transforms", partial(texts, folder, artefact, kind))


@torch.no_grad()
def images(folder: Path, artefact: str, kind: str) -> torch.Tensor:
    """Embeddings of pictures."""
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder / artefact}")
    paths = sorted((folder / "pictures").glob(f"{kind}*.png"))
    return model.eval().encode_image(torch.stack([transform(Image.open(path)) for path in paths]), normalize=True)  # type: ignore[no-any-return]


@torch.no_grad()
def texts(folder: Path, artefact: str, kind: str) -> torch.Tensor:
    """Embeddings of texts."""
    name = f"local-dir:{folder / artefact}"
    model, tokenizer = open_clip.create_model(name).eval(), open_clip.get_tokenizer(name)
    return model.encode_text(tokenizer(json.loads((folder / "inputs.json").read_text())[kind]), normalize=True)  # type: ignore[no-any-return]
