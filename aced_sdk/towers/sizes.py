# SPDX-License-Identifier: Apache-2.0
"""Whether a student can score at a smaller size, found out before training."""

from __future__ import annotations

import torch

from aced_sdk.errors import ConfigError
from aced_sdk.towers.dual_encoder import DualEncoder
from aced_sdk.towers.resolution import patch_of


def check_size(encoder: DualEncoder, size: int, field: str | None = None) -> None:
    """Find out before training whether the image tower takes size x size pictures; costs one forward pass.

    Args:
        encoder: the student.
        size: side in pixels at which it shall score, such as `curation.scoring_size`.
        field: the config field to name in the error.

    Raises:
        ConfigError: if the size exceeds the tower's own, is no multiple of its patch, or the tower cannot take it.
    """
    height, width = encoder.preprocess_config.size
    if height != width or size > height:
        raise ConfigError(
            f"the student sees pictures of {height} x {width}, and shall score them at {size} x {size}",
            remedy="take a smaller side; it is for square towers alone",
            field=field,
        )
    patch = patch_of(encoder.model.visual)  # type: ignore[arg-type]
    if size % patch:
        raise ConfigError(
            f"the side of {size} pixels is no multiple of the student's patch of {patch}",
            remedy=f"take {max(patch, size // patch * patch)}",
            field=field,
        )
    try:
        encoder.encode_image(torch.zeros(1, 3, size, size, dtype=torch.uint8))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ConfigError(
            f"the student's image tower takes pictures of {height} x {width} alone ({error})",
            remedy="leave the scoring size out, or take a plain ViT or a convolutional tower",
            field=field,
        ) from error
