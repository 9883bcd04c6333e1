# SPDX-License-Identifier: Apache-2.0
"""One pair through a model that was just loaded: settings that fit the weights can still not work together."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from aced_sdk.errors import AcedError, ModelError
from aced_sdk.files import printable
from aced_sdk.towers.dual_encoder import DualEncoder
from aced_sdk.towers.weights import is_finite


@torch.no_grad()
def check_embeds(encoder: DualEncoder, folder: Path) -> None:
    """Embed one picture, a text of the full length, and a short one. The encoder is left as it was.

    Args:
        encoder: in evaluation mode.
        folder: where it was loaded from, for the message.

    Raises:
        ModelError: if an embedding has another shape than [1, embedding_dim], is not finite, or cannot be made.
    """
    try:
        pixels = encoder.resize(Image.linear_gradient("L"))[None]
        made = encoder(pixels, encoder.tokenize("a " * encoder.context_length))
        found = {"image": made.image, "text": made.text, "short text": encoder.encode_text("a")}
        for kind, embedding in found.items():
            if embedding.shape != (1, encoder.embedding_dim):
                raise ValueError(f"{kind} embeddings have the shape {[*embedding.shape]}")
            if not is_finite(embedding):
                raise ValueError(f"{kind} embeddings are not finite")
    except Exception as error:  # of four libraries, over settings and weights that somebody else wrote
        cause = error.cause if isinstance(error, AcedError) else f"{type(error).__name__}: {error}"
        raise ModelError(
            f"the model in {printable(folder)} cannot embed a picture and a text: {printable(cause, 500)}",
            remedy="compare its config with the config of the model's first publisher, or do not use this folder",
        ) from error
