# SPDX-License-Identifier: Apache-2.0
"""Every mode of a picture as RGB of 8 bits."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from aced_sdk.processing.plain import PictureError, open_picture, to_rgb

RAMP = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_keeps_its_range(kind: str) -> None:
    found = np.asarray(to_rgb(open_picture(encoded(Image.fromarray(RAMP), kind))))
    np.testing.assert_array_equal(found, np.repeat((RAMP >> 8)[..., None], 3, axis=2))
    np.testing.assert_array_equal(np.asarray(to_rgb(Image.fromarray(RAMP.astype(">u2")))), found)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_32_bit_samples_are_refused_by_name(dtype: type) -> None:
    with pytest.raises(PictureError, match="32 bits") as caught:
        to_rgb(Image.fromarray(RAMP.astype(dtype)))
    assert caught.value.reason == "samples of 32 bits"


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"]
)
def test_every_other_mode_has_an_rgb_form(mode: str) -> None:
    image = Image.new("RGB", (4, 3), (200, 30, 60))
    image = (
        image.convert("RGBA").convert(mode)
        if mode in ("RGBa", "PA")
        else image.convert("LA").convert(mode)
        if mode == "La"
        else image.convert(mode)
    )
    found = to_rgb(image)
    assert (found.mode, found.size) == ("RGB", (4, 3))


def test_transparent_parts_are_white_and_a_clear_colour_is_drawn() -> None:
    clear = Image.new("RGBA", (2, 2), (9, 9, 9, 0))
    assert to_rgb(clear).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(clear.convert("RGBa")).getpixel((0, 0)) == (255, 255, 255)
    key = Image.new("RGB", (2, 2), (9, 9, 9))
    key.info["transparency"] = (9, 9, 9)
    found = to_rgb(key)
    assert found.getpixel((0, 0)) == (9, 9, 9)
    assert "transparency" not in found.info
