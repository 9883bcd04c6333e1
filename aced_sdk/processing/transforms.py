# SPDX-License-Identifier: Apache-2.0
"""Preprocessing: open_clip's validation transform, cut in two so that the uint8 half can be cached and exchanged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field, field_validator
from torch import Tensor

from aced_sdk.config import Config
from aced_sdk.processing.plain import PictureError, to_rgb
from aced_sdk.processing.plain.pictures import MAX_PIXELS

MAX_SIDE = 2_048  # pixels; the largest towers of open_clip and timm take 1,024

_Side = Annotated[int, Field(ge=1, le=MAX_SIDE)]
_Channel = Annotated[float, Field(ge=-1_000, le=1_000)]
_Deviation = Annotated[float, Field(gt=1e-6, le=1_000)]  # below, pixels overflow; the ONNX runtime has the same bound


class Preprocess(Config):
    """The `preprocess_cfg` of open_clip_config.json."""

    size: tuple[_Side, _Side]
    mode: Literal["RGB"] = "RGB"
    mean: tuple[_Channel, _Channel, _Channel]
    std: tuple[_Deviation, _Deviation, _Deviation]
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    resize_mode: Literal["squash", "shortest", "longest"] = "shortest"
    fill_color: int = Field(0, ge=0, le=255)

    @field_validator("size", mode="before")
    @classmethod
    def _square(cls, size: Any) -> Any:
        return (size, size) if isinstance(size, int) else size

    def _has_pixels(self, width: int, height: int) -> bool:
        """Whether a picture keeps a pixel on each side when its longest side is made to fit."""
        ratio = max(height / self.size[0], width / self.size[1])
        return round(width / ratio) > 0 and round(height / ratio) > 0

    def _resized_pixels(self, width: int, height: int) -> float:
        """How many pixels a picture of this size has after its resize, before the crop."""
        if self.resize_mode != "shortest":
            return self.size[0] * self.size[1]
        return width * height / min(height / self.size[0], width / self.size[1]) ** 2

    def resizer(self) -> Callable[[Image.Image], Tensor]:
        """A function from a picture to uint8 [3, H, W]: the geometry, before scaling to 0..1 and normalisation."""
        from open_clip.transform import image_transform

        size = self.size[0] if self.size[0] == self.size[1] else self.size
        whole = image_transform(
            size,
            is_train=False,
            mean=self.mean,
            std=self.std,
            resize_mode=self.resize_mode,
            interpolation=self.interpolation,
            fill_color=self.fill_color,
        )
        geometry = whole.transforms[:-2]  # the last two are ToTensor and Normalize, done on the device later

        def resize(image: Image.Image) -> Tensor:
            # Resizing the short side of a long strip would enlarge it a lot.
            too_large = self._resized_pixels(*image.size) > MAX_PIXELS
            if too_large or (self.resize_mode == "longest" and not self._has_pixels(*image.size)):
                raise PictureError("too long and thin", f"{image.width} x {image.height}")
            image = to_rgb(image)
            for step in geometry:
                image = step(image)
            return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).contiguous()

        return resize
