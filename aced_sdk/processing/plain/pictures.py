# SPDX-License-Identifier: Apache-2.0
"""The one reader of pictures: few formats, and bounds that are checked before anything is decoded."""

from __future__ import annotations

import io
import re
import struct
from pathlib import Path

from PIL import Image, ImageFile

from aced_sdk.files.reading import MIB, ReadError, read_bytes

# Pillow opens 40 formats. Some start other programs (EPS), some decode before their size can be checked (ICO, ICNS).
# JPEG includes MPO, the format of some phones.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 100_000_000
MAX_BYTES = 256 * MIB
MAX_SCANS = 64  # of a JPEG; cameras and encoders write up to about 20, and each is a pass over all pixels
MAX_SEGMENTS = 5000
MAX_ASPECT = 200  # long side over short side: resizing the short side of a longer strip would blow it up


_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd8\xff]", re.DOTALL)  # one with a length, or the end


class PictureError(ValueError):
    """A picture that cannot be used.

    Attributes:
        reason: a few words, the same for all pictures with this fault; skipped pictures are counted by it.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        self.reason = reason
        super().__init__(f"{reason}: {detail}" if detail else reason)


def open_picture(
    source: bytes | str | Path | Image.Image, *, max_pixels: int = MAX_PIXELS, max_aspect: int = MAX_ASPECT
) -> Image.Image:
    """The decoded picture, in its own mode. Of an animation it is the first frame. EXIF orientation is not applied.

    Args:
        source: encoded bytes, a file, or a PIL picture.
        max_pixels: larger pictures are refused before they are decoded.
        max_aspect: longer and thinner pictures are refused.

    Raises:
        PictureError: if it is unreadable, in a format that is not in `FORMATS`, too large, or too long and thin.
    """
    image = source if isinstance(source, Image.Image) else _opened(source, max_pixels)
    if isinstance(image, ImageFile.ImageFile) and image.tile and image.format not in (*FORMATS, "MPO"):
        raise PictureError("picture format is not allowed", f"{image.format}; allowed are {', '.join(FORMATS)}")
    _check_size(*image.size, max_pixels, max_aspect)
    try:
        image.load()
    except MemoryError:
        raise PictureError("unreadable picture", "not enough memory") from None
    except Exception as error:  # broken files make Pillow's decoders raise many kinds of errors
        raise PictureError("unreadable picture", str(error)) from error
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture as RGB; transparent parts become white.

    Raises:
        PictureError: if the mode has no RGB form.
    """
    try:
        if image.mode in ("P", "LA", "PA"):
            image = image.convert("RGBA")  # resampling palette indices would be meaningless
        if image.mode == "RGBA":
            image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
        return image.convert("RGB")
    except (ValueError, OSError, MemoryError) as error:
        raise PictureError("unreadable picture", f"mode {image.mode}: {error}") from error


def _opened(source: bytes | str | Path, max_pixels: int) -> Image.Image:
    if isinstance(source, str | Path):
        try:
            source = read_bytes(source, MAX_BYTES)
        except ReadError as error:
            raise PictureError("unreadable picture", error.cause) from None
    if len(source) > MAX_BYTES:
        raise PictureError("too many bytes", f"{len(source):,}, the bound is {MAX_BYTES:,}")
    if size := _webp_size(source):  # Pillow reserves the canvas when it opens a WebP
        _check_size(*size, max_pixels, max(size))
    _check_jpeg(source)
    try:
        return Image.open(io.BytesIO(source), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise PictureError("too many pixels", str(error)) from None
    except Exception as error:  # as in open_picture
        raise PictureError("unreadable picture", f"not a whole {', '.join(FORMATS)} file") from error


def _check_size(width: int, height: int, max_pixels: int, max_aspect: int) -> None:
    if width < 1 or height < 1:
        raise PictureError("picture has no pixels")
    if width * height > max_pixels:
        raise PictureError("too many pixels", f"{width} x {height}, the bound is {max_pixels:,}")
    if max(width, height) > max_aspect * min(width, height):
        raise PictureError("too long and thin", f"{width} x {height}")


def _webp_size(content: bytes) -> tuple[int, int] | None:
    """Width and height in a WebP's header; None for other formats and broken headers."""
    if content[:4] != b"RIFF" or content[8:12] != b"WEBP" or len(content) < 30:
        return None
    kind = content[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(content[24:27], "little"), 1 + int.from_bytes(content[27:30], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(content[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    width, height = struct.unpack("<HH", content[26:30])
    return width & 0x3FFF, height & 0x3FFF


def _check_jpeg(content: bytes) -> None:
    """Refuse a JPEG of very many scans or segments, before its end; pass other formats."""
    scans, segments, at = 0, 0, 2
    while content[:2] == b"\xff\xd8" and (found := _MARKER.search(content, at)) and found[0] != b"\xff\xd9":
        scans, segments = scans + (found[0] == b"\xff\xda"), segments + 1
        if scans > MAX_SCANS or segments > MAX_SEGMENTS:
            raise PictureError("too many scans or segments")
        at = found.end() + int.from_bytes(content[found.end() : found.end() + 2], "big")
