# SPDX-License-Identifier: Apache-2.0
"""`DualEncoder` and `OnnxEncoder` accept the same pictures and texts, and refuse the rest under the same name."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import ARCHITECTURE, exported

import aced_sdk as aced
import export
from aced_sdk import towers
from aced_sdk.config import Student
from aced_sdk.errors import InputError
from export.runtime.parity import pictures

PICTURES = [picture.convert("RGB") for picture in pictures()[:3]]
ONE = PICTURES[0]
PIXELS = np.asarray(ONE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module", params=["torch", "onnx"])
def encoder(request: pytest.FixtureRequest, folder: Path) -> Any:
    return aced.load(folder.parent / "s") if request.param == "torch" else export.OnnxEncoder(folder)


def encoded(picture: Image.Image = ONE) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


def saved(folder: Path, picture: Image.Image = ONE) -> Path:
    picture.save(folder / "picture.png")
    return folder / "picture.png"


SINGLE: dict[str, Callable[[Path], Any]] = {
    "a PIL image": lambda _: ONE,
    "bytes": lambda _: encoded(),
    "an array": lambda _: PIXELS,
    "an array with transparency": lambda _: np.dstack([PIXELS, np.full(PIXELS.shape[:2], 255, np.uint8)]),
    "a path": saved,
    "a path's name": lambda folder: str(saved(folder)),
}


@pytest.mark.parametrize("kind", SINGLE)
def test_a_picture_counts_as_a_list_of_one(encoder: Any, tmp_path: Path, kind: str) -> None:
    expected = np.asarray(encoder.encode_image([ONE]))
    assert expected.shape == (1, 8)
    given = SINGLE[kind](tmp_path)
    for images in (given, [given], (given,), iter([given])):
        np.testing.assert_array_equal(np.asarray(encoder.encode_image(images)), expected)


def test_grey_arrays_and_arrays_of_pictures(encoder: Any) -> None:
    grey = np.asarray(ONE.convert("L"))
    expected = np.asarray(encoder.encode_image([ONE.convert("L")]))
    np.testing.assert_array_equal(np.asarray(encoder.encode_image(grey)), expected)
    stacked = np.stack([PIXELS, PIXELS[::-1]])
    several = np.asarray(encoder.encode_image([*stacked]))
    np.testing.assert_array_equal(np.asarray(encoder.encode_image(stacked)), several)
    assert several.shape == (2, 8)


def test_generators_are_read_a_batch_at_a_time(encoder: Any) -> None:
    expected = np.asarray(encoder.encode_image(PICTURES))
    found = np.asarray(encoder.encode_image((picture for picture in PICTURES), batch_size=2))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    texts = np.asarray(encoder.encode_text(["a", "b", "c"]))
    np.testing.assert_allclose(np.asarray(encoder.encode_text(iter("abc"), batch_size=2)), texts, atol=1e-6)
    np.testing.assert_allclose(np.asarray(encoder.encode_text(np.array(["a", "b", "c"]))), texts, atol=1e-6)
    assert np.asarray(encoder.encode_text("abc")).shape == (1, 8)


def test_nothing_gives_no_rows(encoder: Any) -> None:
    for nothing in ([], (), iter(())):
        assert np.asarray(encoder.encode_image(nothing)).shape == (0, 8)
        assert np.asarray(encoder.encode_text(nothing)).shape == (0, 8)


REFUSED: dict[str, tuple[Any, str]] = {
    "None": (None, "images is a NoneType"),
    "a number": (3, "images is a int"),
    "a mapping": ({"a": ONE}, "images is a dict"),
    "bytearray": (bytearray(encoded()), "images is a bytearray"),
    "None in a list": ([ONE, None], r"images\[1\] is a NoneType"),
    "a list of lists": ([[ONE]], r"images\[0\] is a list"),
    "a tensor in a list": ([torch.zeros(3, 16, 16)], r"images\[0\] is a Tensor"),
    "floats": (PIXELS / 255, r"images\[0\] is an array of float64"),
    "channels first": (PIXELS.transpose(2, 0, 1), r"images\[0\] is an array of uint8"),
    "no pixels": (PIXELS[:0], r"images\[0\] is an array of uint8"),
    "one dimension": (PIXELS[0, 0], r"images\[0\] is an array of uint8"),
    "five dimensions": (PIXELS[None, None], r"images\[0\] is an array of uint8"),
    "no file": ("nowhere.png", r"images\[0\] \(nowhere.png\) cannot be decoded"),
    "no picture": (b"GIF89a", r"images\[0\] cannot be decoded"),
    "a mode without RGB": (Image.new("F", (8, 8)), r"images\[0\].*samples of 32 bits"),
    "a long strip": (Image.new("RGB", (3000, 2)), r"images\[0\].*too long and thin"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_picture_is_named(encoder: Any, kind: str) -> None:
    given, words = REFUSED[kind]
    with pytest.raises(InputError, match=words) as caught:
        encoder.encode_image(given)
    assert (caught.value.field or "").startswith("images")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (None, "texts is a NoneType"), (3, "texts is a int"), (b"a", "texts is a bytes"), ({"a": 1}, "texts is a dict"),
        (["a", None], r"texts\[1\] is a NoneType"), ([b"a"], r"texts\[0\] is a bytes"),
        ([["a"]], r"texts\[0\] is a list"),
    ],
)  # fmt: skip
def test_what_is_no_text_is_named(encoder: Any, given: Any, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        encoder.encode_text(given)
    assert (caught.value.field or "").startswith("texts")


@pytest.mark.parametrize("size", [0, -1, 1.5, "2"])
def test_batch_sizes_are_positive(encoder: Any, size: Any) -> None:
    for encode, given in ((encoder.encode_image, [ONE]), (encoder.encode_text, ["a"])):
        with pytest.raises(InputError, match="batch_size is") as caught:
            encode(given, batch_size=size)
        assert caught.value.field == "batch_size"


@pytest.mark.parametrize(
    "pixels", [torch.zeros(3, 16, 16), torch.zeros(1, 4, 16, 16), torch.zeros(1, 3, 16, 16, dtype=torch.int32)]
)
def test_tensors_are_batches_of_pixels(folder: Path, pixels: torch.Tensor) -> None:
    encoder = aced.load(folder.parent / "s")
    with pytest.raises(InputError, match="images is a tensor of") as caught:
        encoder.encode_image(pixels)
    assert caught.value.field == "images"
    raw = torch.stack([encoder.resize(picture) for picture in PICTURES])
    assert torch.equal(encoder.encode_image(raw), encoder.encode_image(PICTURES))
    assert torch.equal(encoder.encode_image(encoder.normalise(raw)), encoder.encode_image(PICTURES))


def test_a_strip_that_would_vanish_is_to_be_cropped(tmp_path: Path) -> None:
    towers.save(towers.build(Student(architecture=ARCHITECTURE, resize="longest"), 0), tmp_path / "s")
    export.to_onnx(tmp_path / "s", tmp_path / "o", precisions=("fp32",), measure=False)
    for encoder in (aced.load(tmp_path / "s"), export.OnnxEncoder(tmp_path / "o")):
        for size in ((3, 600), (600, 3)):
            with pytest.raises(InputError, match=r"images\[0\].*too long and thin") as caught:
                encoder.encode_image(Image.new("RGB", size))
            assert caught.value.remedy == "crop it"
