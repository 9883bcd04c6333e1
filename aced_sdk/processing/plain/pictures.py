# SPDX-License-Identifier: Apache-2.0
"""The one reader of pictures: few formats, and bounds that are checked before anything is decoded."""

from __future__ import annotations

import io
import re
import struct
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, TiffImagePlugin

from aced_sdk.files.reading import MIB, ReadError, read_bytes

# Pillow opens 40 formats. Some start other programs (EPS), some decode before their size can be checked (ICO, ICNS).
# JPEG includes MPO, the format of some phones.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
Order = Literal["little", "big"]
MAX_PIXELS = 100_000_000
MAX_BYTES = 256 * MIB
_STRIP = 2**20  # pixels
# Bounds on what takes a decoder long; pictures of cameras and programs stay far below.
_MAX_TILES = 2**16  # of a TIFF
_MAX_SCANS = 64  # of a JPEG; the decoder goes over the whole picture for each
_MAX_EXIF = 2**20  # bytes of a JPEG's EXIF segments; Pillow copies what it has for each
_MAX_CHUNKS = 2**17  # of a PNG; blocks before the first picture of a GIF
_MAX_PROFILES = 8  # iCCP chunks of a PNG, each of which becomes 1 MB; one is allowed
_MAX_TAGS = 2**16  # of a TIFF
_MAX_VALUES = 2**19  # of all tags, which become Python numbers; a palette has 196,608
_PLACES, _LENGTHS = (273, 279, 324, 325), (279, 325)  # tags of strips and tiles
_DIRECTORIES = (34665, 34853, 40965)  # tags that name further directories, which Pillow reads
_PLAIN = (1, 2, 7)  # types of tags that stay bytes
_UNITS = {1: 1, 3: 2, 4: 4, 6: 1, 8: 2, 9: 4, 13: 4, 16: 8, 17: 8, 18: 8}  # bytes of the types that are integers
_SHARED = 4  # times the file's size, which the strips of a TIFF may have together
_MAX_RLE = 2**22  # pixels of a run-length coded BMP, which Pillow decodes in Python
_MAX_RUNS = 2**24  # bytes of one
_MARKER = re.compile(rb"\xff+([^\x00\xd0-\xd7\xff])", re.DOTALL)  # of a JPEG, but for restarts
_SOF0, _SOI, _END, _SCAN, _APP1 = 0xC0, 0xD8, 0xD9, 0xDA, 0xE1
MAX_ASPECT = 200  # long side over short side: resizing the short side of a longer strip would blow it up


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
    """The decoded picture, in its own mode. Of an animation it is the first frame. EXIF orientation is
    applied to TIFF alone, where Pillow does so itself, as in open_clip.

    Args:
        source: encoded bytes, a file, or a PIL picture.
        max_pixels: larger pictures are refused before they are decoded.
        max_aspect: longer and thinner pictures are refused.

    Raises:
        PictureError: if it is unreadable, in a format that is not in `FORMATS`, too large, or too long and thin.
    """
    image = read_header(source, max_pixels=max_pixels, max_aspect=max_aspect)
    try:
        image.load()
    except MemoryError:
        raise PictureError("unreadable picture", "not enough memory") from None
    except Exception as error:  # broken files make Pillow's decoders raise many kinds of errors
        raise PictureError("unreadable picture", str(error)) from error
    return image


def read_header(
    source: bytes | str | Path | Image.Image, *, max_pixels: int = MAX_PIXELS, max_aspect: int = MAX_ASPECT
) -> Image.Image:
    """As `open_picture`, without decoding the pixels: for callers that need the size first."""
    image = source if isinstance(source, Image.Image) else _opened(source, max_pixels)
    if isinstance(image, ImageFile.ImageFile) and image.tile and image.format not in (*FORMATS, "MPO"):
        raise PictureError("picture format is not allowed", f"{image.format}; allowed are {', '.join(FORMATS)}")
    if isinstance(image, ImageFile.ImageFile) and len(image.tile) > _MAX_TILES:
        raise PictureError("unreadable picture", f"{len(image.tile):,} tiles")
    slow = isinstance(image, ImageFile.ImageFile) and any(tile[0] == "bmp_rle" for tile in image.tile)
    _check_size(*image.size, min(max_pixels, _MAX_RLE) if slow else max_pixels, max_aspect)
    if isinstance(image, TiffImagePlugin.TiffImageFile) and image.tile:
        sides = [image.tag_v2.get(tag, 1) for tag in (TiffImagePlugin.TILEWIDTH, TiffImagePlugin.TILELENGTH)]
        if not all(isinstance(side, int) for side in sides) or sides[0] * sides[1] > max_pixels:
            raise PictureError("too many pixels", f"in a tile of {sides}")  # the decoder reserves a whole tile
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture as RGB of 8 bits; transparent parts become white.

    16-bit grey keeps its upper 8 bits, as Pillow does for 16-bit colour. (Pillow's own conversion cuts off at 255.)

    Raises:
        PictureError: if the samples have 32 bits, or the mode has no RGB form.
    """
    if image.mode in ("I", "F"):
        raise PictureError("samples of 32 bits", "scale them to 8 bits by the range that matters")
    try:
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.mode in ("P", "PA", "LA", "La", "RGBA", "RGBa"):
            return _on_white(image)
        image = image.convert("RGB")
        image.info.pop("transparency", None)  # a colour that PNG calls clear: it is drawn, here and by every client
        return image
    except (ValueError, OSError, MemoryError) as error:
        raise PictureError("unreadable picture", f"mode {image.mode}: {error}") from error


def _on_white(image: Image.Image) -> Image.Image:
    """RGB of a picture with transparency or a palette, a strip at a time: each step has a copy of what it works on."""
    (width, height), rgb = image.size, Image.new("RGB", image.size)
    rows = max(1, _STRIP // width)
    for top in range(0, height, rows):
        strip = image.crop((0, top, width, min(top + rows, height)))
        strip = strip.convert("LA") if strip.mode == "La" else strip  # which alone La can be converted to
        white = Image.new("RGBA", strip.size, (255, 255, 255, 255))
        rgb.paste(Image.alpha_composite(white, strip.convert("RGBA")).convert("RGB"), (0, top))
    return rgb


def _opened(source: bytes | str | Path, max_pixels: int) -> Image.Image:
    if isinstance(source, str | Path):
        try:
            source = read_bytes(source, MAX_BYTES)
        except ReadError as error:
            raise PictureError("unreadable picture", error.cause) from None
    if len(source) > MAX_BYTES:
        raise PictureError("too many bytes", f"{len(source):,}, the bound is {MAX_BYTES:,}")
    if size := webp_size(source):  # Pillow reserves the canvas when it opens a WebP, several times for an animation
        animated = source[12:16] == b"VP8X" and source[20] & 2
        _check_size(*size, max_pixels // 4 if animated else max_pixels, max(size))
    if source[:2] == b"\xff\xd8":
        _check_jpeg(source)
    elif source[:8] == b"\x89PNG\r\n\x1a\n":
        _check_png(source)
    elif source[:4] == b"GIF8":
        _check_gif(source)
    elif source[:2] in (b"II", b"MM"):
        _check_tiff(source)
    elif source[:2] == b"BM" and source[30:34] in (b"\1\0\0\0", b"\2\0\0\0") and len(source) > _MAX_RUNS:
        raise PictureError("too many bytes", f"{len(source):,} of a run-length encoded BMP")
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


def _check_jpeg(content: bytes) -> None:
    """Count scans and EXIF data up to the end mark."""
    scans = exif = at = 0
    while found := _MARKER.search(content, at):
        at, kind = found.end(), found[1][0]
        if kind == _END:
            break
        # libjpeg continues right after a marker below SOF0, whatever length follows
        length = 0 if kind < _SOF0 or kind == _SOI else int.from_bytes(content[at : at + 2], "big")
        scans += kind == _SCAN
        exif += length if kind == _APP1 and content[at + 2 : at + 6] == b"Exif" else 0
        if scans > _MAX_SCANS or exif > _MAX_EXIF:
            raise PictureError("too many scans or too much EXIF data")
        at += length


def _check_png(content: bytes) -> None:
    """Count chunks, and colour profiles among them."""
    at, profiles = 8, 0
    for _ in range(_MAX_CHUNKS):
        if at >= len(content):
            return
        profiles += content[at + 4 : at + 8] == b"iCCP"
        if profiles > _MAX_PROFILES:
            raise PictureError("too many chunks", "colour profiles of a PNG")
        at += 12 + int.from_bytes(content[at : at + 4], "big")
    raise PictureError("too many chunks", f"a PNG has at most {_MAX_CHUNKS:,}")


def _check_gif(content: bytes) -> None:
    """Count what is before the first picture: blocks of extensions, and bytes between them, which are skipped."""
    at = 13 + (3 << (content[10] & 7) + 1 if content[10:11] and content[10] & 128 else 0)
    for _ in range(_MAX_CHUNKS):
        kind = content[at : at + 1]
        if kind in (b"", b",", b";"):
            return
        at += 1
        if kind == b"!":
            at = _after_blocks(content, at + 1)
    raise PictureError("too many chunks", f"a GIF has at most {_MAX_CHUNKS:,} blocks")


def _after_blocks(content: bytes, at: int) -> int:
    """Where the blocks of a GIF's extension end."""
    for _ in range(_MAX_CHUNKS):
        if at >= len(content) or not content[at]:
            return at + 1
        at += 1 + content[at]
    raise PictureError("too many chunks", f"an extension of a GIF has at most {_MAX_CHUNKS:,} blocks")


def _check_tiff(content: bytes) -> None:
    """Bound the values of the tags that Pillow reads, and the bytes that libtiff reads for strips or tiles."""
    order: Order = "little" if content[:2] == b"II" else "big"
    wide = content[2:3] == b"+"  # as Pillow tells a BigTIFF
    start, size, entry, slot = (8, 8, 20, 8) if wide else (4, 2, 12, 4)
    pending, seen = [int.from_bytes(content[start : start + slot], order)], set[int]()
    tags = values = strips = 0
    while pending:
        at = pending.pop()
        if at in seen:
            continue
        seen.add(at)
        count = int.from_bytes(content[at : at + size], order)
        tags += count
        if tags > _MAX_TAGS:
            raise PictureError("unreadable picture", f"{tags:,} tags")
        for place in range(at + size, min(at + size + count * entry, len(content)), entry):
            tag, kind = (int.from_bytes(content[place + k : place + k + 2], order) for k in (0, 2))
            number = int.from_bytes(content[place + 4 : place + 4 + slot], order)
            values += number if kind not in _PLAIN or tag in (*_PLACES, *_DIRECTORIES) else 0
            if values > _MAX_VALUES:
                raise PictureError("unreadable picture", f"{values:,} values in its tags")
            if tag in _DIRECTORIES or tag in _LENGTHS:
                found = _integers(content, place + 4 + slot, number, kind, slot, order)
                pending += found.tolist() if tag in _DIRECTORIES else ()
                strips += int(np.minimum(found, len(content)).sum()) if tag in _LENGTHS else 0
    if strips > _SHARED * len(content) + MIB:
        raise PictureError("unreadable picture", f"strips of {strips:,} bytes in a file of {len(content):,}")


def _integers(content: bytes, at: int, number: int, kind: int, slot: int, order: Order) -> NDArray[np.uint64]:
    """The values of a TIFF's tag, if they are integers, as far as the file has them; `at` has them or their place."""
    unit = _UNITS.get(kind, 0)
    if number * unit > slot:
        at = int.from_bytes(content[at : at + slot], order)
    found = content[at : at + number * unit]
    mark = "<" if order == "little" else ">"
    return np.frombuffer(found[: len(found) // unit * unit] if unit else b"", f"{mark}u{unit or 1}").astype(np.uint64)


def webp_size(content: bytes) -> tuple[int, int] | None:
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
