# SPDX-License-Identifier: Apache-2.0
"""timm on image towers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import timm
import torch
from PIL import Image
from torch.nn.functional import normalize

from tools.clients.inside import Check


def checks(folder: Path) -> Iterator[Check]:
    """Embeddings of pictures; the small SigLIP is no architecture that timm has by itself."""
    for name in ("clip", "timm"):
        artefact = f"timm/{name}"
        for compared, kind in (("image embeddings", "own"), ("embeddings of large pictures", "large")):
            yield Check(artefact, compared, "create_model", partial(images, folder, artefact, kind))


@torch.no_grad()
def images(folder: Path, artefact: str, kind: str) -> torch.Tensor:
    """Embeddings of pictures."""
    model = timm.create_model(f"local-dir:{folder / artefact}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    paths = sorted((folder / "pictures").glob(f"{kind}*.png"))
    return normalize(model(torch.stack([transform(Image.open(path)) for path in paths])), dim=-1)
