# SPDX-License-Identifier: Apache-2.0
"""Pictures into pixel tensors as open_clip does it, with Pillow and numpy alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from aced_sdk.files import printable, read_json
from aced_sdk.processing.plain import to_rgb
from aced_sdk.processing.plain.inputs import Picture, open_input
from export.runtime.errors import FolderError, InputError, folder_errors

MAX_SIDE = 2048  # of a tower's pictures
_MAX_BYTES = 2**16  # of preprocessor_config.json


@dataclass(frozen=True)
class Geometry:
    """`preprocessor_config.json`: how a picture becomes the tower's input."""

    height: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: int
    resize_mode: str
    fill_color: int

    @classmethod
    def read(cls, path: Path) -> Geometry:
        """Read the file.

        Raises:
            FolderError: if it is missing or not what an export writes.
        """
        try:
            with folder_errors():
                values: dict[str, Any] = read_json(path, _MAX_BYTES)
            geometry = cls(
                height=int(values["crop_size"]["height"]),
                width=int(values["crop_size"]["width"]),
                mean=tuple(float(value) for value in values["image_mean"]),
                std=tuple(float(value) for value in values["image_std"]),
                resample=int(values["resample"]),
                resize_mode=str(values["resize_mode"]),
                fill_color=int(values["fill_color"]),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise FolderError(
                f"{printable(path)} cannot be read: {printable(repr(error))}", remedy="export the student again"
            ) from None
        if not geometry.sensible:
            raise FolderError(f"{printable(path)} has values that no export writes", remedy="export the student again")
        return geometry

    @property
    def sensible(self) -> bool:
        """Whether every value is one that a student can have."""
        numbers = (*self.mean, *self.std)
        return (
            1 <= self.height <= MAX_SIDE
            and 1 <= self.width <= MAX_SIDE
            and len(self.mean) == len(self.std) == 3
            and all(math.isfinite(number) and abs(number) < 1000 for number in numbers)
            and min(self.std) > 1e-6
            and self.resample in (2, 3)
            and self.resize_mode in ("squash", "shortest", "longest")
            and 0 <= self.fill_color <= 255
        )

    def pixels(self, image: Image.Image) -> NDArray[np.uint8]:
        """The picture as the tower sees it, before normalisation: uint8 [H, W, 3]."""
        image = to_rgb(image)
        height, width = self.height, self.width
        if self.resize_mode == "squash":
            image = image.resize((width, height), self.resample)
        elif self.resize_mode == "shortest":
            image = _crop_or_pad(self._to_shortest(image), height, width, 0)
        else:
            image = image.resize(self._to_longest(*image.size), self.resample)
            image = _crop_or_pad(image, height, width, self.fill_color)
        return np.asarray(image, dtype=np.uint8)

    def resized_pixels(self, width: int, height: int) -> int:
        """How many pixels a picture of this size has after its resize, before the crop."""
        if self.resize_mode != "shortest":
            return self.width * self.height
        return int(width * height / min(height / self.height, width / self.width) ** 2)

    def keeps_pixels(self, width: int, height: int) -> bool:
        """Whether each side of a picture of this size keeps a pixel after its resize."""
        return self.resize_mode != "longest" or min(self._to_longest(width, height)) > 0

    def _to_longest(self, width: int, height: int) -> tuple[int, int]:
        ratio = max(height / self.height, width / self.width)
        return round(width / ratio), round(height / ratio)

    def normalise(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 [N, H, W, 3] to the graph's float32 [N, 3, H, W]."""
        scaled = pixels.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)
        mean = np.array(self.mean, np.float32).reshape(3, 1, 1)
        std = np.array(self.std, np.float32).reshape(3, 1, 1)
        return np.ascontiguousarray((scaled - mean) / std)

    def _to_shortest(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        if self.height != self.width:
            # open_clip takes bicubic here whatever the config says
            ratio = min(height / self.height, width / self.width)
            return image.resize((round(width / ratio), round(height / ratio)), Image.Resampling.BICUBIC)
        size = self.height
        if width <= height:
            return image.resize((size, int(size * height / width)), self.resample)
        return image.resize((int(size * width / height), size), self.resample)


def _crop_or_pad(image: Image.Image, height: int, width: int, fill: int) -> Image.Image:
    if image.width < width or image.height < height:
        left, top = max(width - image.width, 0) // 2, max(height - image.height, 0) // 2
        padded = Image.new("RGB", (max(width, image.width), max(height, image.height)), (fill, fill, fill))
        padded.paste(image, (left, top))
        image = padded
    top, left = round((image.height - height) / 2.0), round((image.width - width) / 2.0)
    return image.crop((left, top, left + width, top + height))


def prepare(source: Picture, place: str, geometry: Geometry, max_pixels: int) -> NDArray[np.uint8]:
    """`open_input`, then `Geometry.pixels`.

    Raises:
        InputError: naming `place`, if it cannot be read, has more than `max_pixels` pixels, or is far longer than wide.
    """
    image = open_input(source, place, max_pixels)
    most = max(max_pixels, 16 * geometry.width * geometry.height)
    # The short side of a long strip may have to grow a lot, or vanish.
    if geometry.resized_pixels(*image.size) > most or not geometry.keeps_pixels(*image.size):
        raise InputError(f"{place} is too long and thin: {image.width} x {image.height}", remedy="crop it", field=place)
    try:
        return geometry.pixels(image)
    except (ValueError, OSError, MemoryError) as error:
        raise InputError(
            f"{place} of mode {image.mode} and size {image.width} x {image.height} cannot be resized: {error}",
            remedy="make it an ordinary RGB picture",
            field=place,
        ) from error
