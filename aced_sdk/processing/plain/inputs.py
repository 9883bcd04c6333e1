# SPDX-License-Identifier: Apache-2.0
"""What an encoder accepts as pictures and texts; the same for `DualEncoder` and `OnnxEncoder`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from os import PathLike, fspath
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from aced_sdk.errors import InputError
from aced_sdk.files import printable
from aced_sdk.processing.plain import pictures

Picture = Image.Image | str | PathLike[str] | bytes | NDArray[np.uint8]
Item = TypeVar("Item")

MAX_CHARACTERS = 10_000  # of one text: a tower reads some hundred, and cleaning takes time that grows with the square
_KINDS = "PIL images, paths, encoded bytes, or uint8 arrays [H, W], [H, W, 3] or [H, W, 4]"
_REMEDIES = {
    "too many pixels": "make it smaller, or raise max_pixels",
    "too long and thin": "crop it",
    "samples of 32 bits": "make it an ordinary RGB picture",
}


def remedy_of(error: pictures.PictureError) -> str:
    """The remedy for a picture that cannot be read or resized."""
    return _REMEDIES.get(error.reason, f"give a whole picture in one of {', '.join(pictures.FORMATS)}")


def at_least_one(**values: int) -> None:
    """Refuse counts that are no positive integers; the first wrong one is named."""
    for name, value in values.items():
        if not isinstance(value, int | np.integer) or value < 1:
            raise InputError(f"{name} is {value!r}", remedy="give an integer of at least 1", field=name)


def picture_batches(images: Picture | Iterable[Picture], size: int) -> Iterator[tuple[int, list[Picture]]]:
    """Pictures `size` by `size`, each batch with the number of its first. One picture counts as a list of one.

    Raises:
        InputError: if it is neither a picture nor an iterable of pictures.
    """
    if isinstance(images, str | bytes | PathLike | Image.Image) or (isinstance(images, np.ndarray) and images.ndim < 4):
        images = [images]
    return _batches(images, size, "images", _KINDS)


def text_batches(texts: str | Iterable[str], size: int) -> Iterator[tuple[int, list[str]]]:
    """As `picture_batches`, for strings.

    Raises:
        InputError: if something is no string.
    """
    for first, batch in _batches([texts] if isinstance(texts, str) else texts, size, "texts", "strings"):
        for n, text in enumerate(batch):
            if not isinstance(text, str):
                place = f"texts[{first + n}]"
                raise InputError(f"{place} is a {type(text).__name__}", remedy="give strings", field=place)
        yield first, batch


def check_lengths(texts: Sequence[str], most: int, first: int = 0, remedy: str = "shorten it") -> None:
    """Refuse texts of more than `most` characters; `first` is the number of the first one in messages.

    Raises:
        InputError: naming the text.
    """
    for n, text in enumerate(texts):
        if len(text) > most:
            place = f"texts[{first + n}]"
            raise InputError(f"{place} has {len(text)} characters, the bound is {most}", remedy=remedy, field=place)


def _batches(items: Iterable[Item], size: int, field: str, kinds: str) -> Iterator[tuple[int, list[Item]]]:
    if not isinstance(items, Iterable) or isinstance(items, Mapping | bytes | bytearray):
        raise InputError(f"{field} is a {type(items).__name__}", remedy=f"give a list of {kinds}", field=field)
    left, first = iter(items), 0
    while batch := list(islice(left, size)):
        yield first, batch
        first += len(batch)


def open_input(source: Picture, place: str, max_pixels: int = pictures.MAX_PIXELS) -> Image.Image:
    """The decoded picture.

    Args:
        source: a PIL image, a path, encoded bytes, or a uint8 array [H, W], [H, W, 3] or [H, W, 4].
        place: such as `images[3]`, for messages.
        max_pixels: larger pictures are refused before they are decoded.

    Raises:
        InputError: naming `place`, as `read_input_header`, or if it cannot be decoded.
    """
    header = read_input_header(source, place, max_pixels)
    with _input_errors(place, source):
        return pictures.open_picture(header, max_pixels=max_pixels)


def read_input_header(source: Picture, place: str, max_pixels: int = pictures.MAX_PIXELS) -> Image.Image:
    """As `open_input`; its pixels are decoded when they are needed.

    Raises:
        InputError: naming `place`, if it is something else, unreadable, in a format that is not in `FORMATS`, larger
            than `max_pixels`, or far longer than wide.
    """
    opened: Any = fspath(source) if isinstance(source, PathLike) else source
    if isinstance(opened, np.ndarray):
        opened = _from_array(opened, place)
    if not isinstance(opened, Image.Image | bytes | str):
        raise InputError(f"{place} is a {type(source).__name__}", remedy=f"give {_KINDS}", field=place)
    with _input_errors(place, source):
        return pictures.read_header(opened, max_pixels=max_pixels)


@contextmanager
def _input_errors(place: str, source: Picture) -> Iterator[None]:
    try:
        yield
    except pictures.PictureError as error:
        where = f"{place} ({printable(source)})" if isinstance(source, str | PathLike) else place
        raise InputError(
            f"{where} cannot be decoded: {printable(error)}",
            remedy=remedy_of(error),
            field=place,
        ) from error


def _from_array(pixels: NDArray[Any], place: str) -> Image.Image:
    known = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (3, 4))
    if pixels.dtype != np.uint8 or not known or pixels.size == 0:
        raise InputError(
            f"{place} is an array of {pixels.dtype} {list(pixels.shape)}",
            remedy="give uint8 [H, W], [H, W, 3] or [H, W, 4]",
            field=place,
        )
    return Image.fromarray(pixels)
