# SPDX-License-Identifier: Apache-2.0
"""Pictures into pixel tensors as open_clip does it, with Pillow and numpy alone."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from export.errors import FolderError, InputError

Picture = Image.Image | str | Path | bytes | NDArray[np.uint8]


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
            values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            geometry = cls(
                height=int(values["crop_size"]["height"]),
                width=int(values["crop_size"]["width"]),
                mean=tuple(float(value) for value in values["image_mean"]),
                std=tuple(float(value) for value in values["image_std"]),
                resample=int(values["resample"]),
                resize_mode=str(values["resize_mode"]),
                fill_color=int(values["fill_color"]),
            )
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise FolderError(f"{path} cannot be read: {error!r}", remedy="export the student again") from None
        if geometry.resize_mode not in ("squash", "shortest", "longest"):
            raise FolderError(
                f"{path} has an unknown resize_mode: {geometry.resize_mode}", remedy="update this package"
            )
        return geometry

    def pixels(self, image: Image.Image) -> NDArray[np.uint8]:
        """The picture as the tower sees it, before normalisation: uint8 [H, W, 3]."""
        image = _rgb(image)
        height, width = self.height, self.width
        if self.resize_mode == "squash":
            image = image.resize((width, height), self.resample)
        elif self.resize_mode == "shortest":
            image = _crop_or_pad(self._to_shortest(image), height, width, 0)
        else:
            ratio = max(image.height / height, image.width / width)
            image = image.resize((round(image.width / ratio), round(image.height / ratio)), self.resample)
            image = _crop_or_pad(image, height, width, self.fill_color)
        return np.asarray(image, dtype=np.uint8)

    def resized_pixels(self, width: int, height: int) -> int:
        """How many pixels a picture of this size has after its resize, before the crop."""
        if self.resize_mode != "shortest":
            return self.width * self.height
        return int(width * height / min(height / self.height, width / self.width) ** 2)

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


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("P", "LA", "PA"):
        image = image.convert("RGBA")  # resampling palette indices would be meaningless
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("RGB")


def _crop_or_pad(image: Image.Image, height: int, width: int, fill: int) -> Image.Image:
    if image.width < width or image.height < height:
        left, top = max(width - image.width, 0) // 2, max(height - image.height, 0) // 2
        padded = Image.new("RGB", (max(width, image.width), max(height, image.height)), (fill, fill, fill))
        padded.paste(image, (left, top))
        image = padded
    top, left = round((image.height - height) / 2.0), round((image.width - width) / 2.0)
    return image.crop((left, top, left + width, top + height))


def prepare(source: Picture, place: str, geometry: Geometry, max_pixels: int) -> NDArray[np.uint8]:
    """`open_picture`, then `Geometry.pixels`.

    Raises:
        InputError: naming `place`, if it cannot be read, has more than `max_pixels` pixels, or is far longer than wide.
    """
    image = open_picture(source, place, max_pixels)
    most = max(max_pixels, 16 * geometry.width * geometry.height)
    if geometry.resized_pixels(*image.size) > most:  # the short side of a long strip may have to grow a lot
        raise InputError(
            f"{place} is too long and narrow: {image.width} x {image.height}", remedy="cut it to pieces", field=place
        )
    try:
        return geometry.pixels(image)
    except (ValueError, OSError, MemoryError) as error:
        raise InputError(
            f"{place} of mode {image.mode} and size {image.width} x {image.height} cannot be resized: {error}",
            remedy="make it an ordinary RGB picture",
            field=place,
        ) from error


def open_picture(source: Picture, place: str, max_pixels: int) -> Image.Image:
    """A decoded picture from a PIL image, a path, encoded bytes, or a uint8 array [H, W], [H, W, 3] or [H, W, 4].

    Raises:
        InputError: naming `place`, if it cannot be read or has more than `max_pixels` pixels.
    """
    if isinstance(source, (str, Path)):
        place = f"{place} ({source})"
    try:
        image = _opened(source, place)
        if image.width * image.height > max_pixels:
            raise InputError(
                f"{place} has {image.width} x {image.height} pixels, the bound is {max_pixels}",
                remedy="make it smaller, or give OnnxEncoder a larger max_pixels",
                field=place,
            )
        if image.width == 0 or image.height == 0:
            raise InputError(f"{place} has no pixels", remedy="leave it out", field=place)
        if image.format == "EPS":
            raise InputError(f"{place} is a PostScript program", remedy="give a picture", field=place)
        image.load()
    except InputError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever broken and hostile files make them stumble over
        raise InputError(
            f"{place} cannot be decoded: {error}", remedy="give a whole picture in a format Pillow reads", field=place
        ) from error
    return image


def _opened(source: Picture, place: str) -> Image.Image:
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, bytes):
        return Image.open(io.BytesIO(source))
    if isinstance(source, (str, Path)):
        return Image.open(source)
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or not (source.ndim == 2 or (source.ndim == 3 and source.shape[2] in (3, 4))):
            raise InputError(
                f"{place} is an array of {source.dtype} {list(source.shape)}",
                remedy="give uint8 [H, W], [H, W, 3] or [H, W, 4]",
                field=place,
            )
        return Image.fromarray(source)
    raise InputError(
        f"{place} is a {type(source).__name__}", remedy="give PIL images, paths, bytes or uint8 arrays", field=place
    )
