# SPDX-License-Identifier: Apache-2.0
"""Drawings to square PNG pictures on white, with the colour that dominates them."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from queue import SimpleQueue

import numpy as np
import numpy.typing as npt
from PIL import Image

from aced_sdk.errors import DataError, MissingPackageError

from .fetch import Progress
from .pictures import Candidate

PROCESSES = 2
_INSTALL = "pip install pyvips pyvips-binary"
_COLOURS = ("black", "white", "grey", "brown", "red", "orange", "yellow", "green", "blue", "purple", "pink", "beige")
_CLEAR_SHARE = 0.6
_SECOND_SHARE = 0.2
_FAINT = 24  # of 255: no pixel this far from white is a blank picture


@dataclass(frozen=True)
class Picture:
    """A rendered picture: PNG bytes, and its colour where one clearly dominates."""

    png: bytes
    colour: str | None


def render(data: bytes, size: int) -> Picture | None:
    """Render SVG, WebP or PNG bytes to a square of `size` pixels on white; None if it comes out blank.

    Raises:
        DataError: the drawing cannot be read.
    """
    import pyvips

    try:
        image = pyvips.Image.new_from_buffer(data, "")
        if (image.width, image.height) != (size, size):
            # Of a drawing in points without a viewBox, libvips' 72 dpi would show a part only.
            options = "[dpi=96]" if str(image.get("vips-loader")).startswith("svg") else ""
            image = pyvips.Image.thumbnail_buffer(data, size, height=size, size="both", option_string=options)
        if image.interpretation != "srgb":
            image = image.colourspace("srgb")
        if not image.hasalpha():
            image = image.addalpha()
        if (image.width, image.height) != (size, size):
            image = image.gravity("centre", size, size, extend="background", background=[255, 255, 255, 0])
        rgba: npt.NDArray[np.uint8] = image.numpy()
    except pyvips.Error as error:
        detail = str(error).strip().splitlines()
        raise DataError(
            f"a drawing cannot be rendered: {detail[-1] if detail else 'unknown reason'}", remedy="leave it out"
        ) from error
    alpha = rgba[:, :, 3:].astype(np.uint16)
    flat = ((rgba[:, :, :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    if flat.min() > 255 - _FAINT:
        return None
    out = io.BytesIO()
    Image.fromarray(flat).save(out, "PNG", compress_level=3)
    return Picture(out.getvalue(), dominant_colour(rgba))


def dominant_colour(rgba: npt.NDArray[np.uint8]) -> str | None:
    """The colour word of most drawn pixels of an image [H, W, 4], or None if no colour clearly dominates.

    Beige, which people call pink, brown or orange, is no answer.
    """
    drawn = (rgba[::2, ::2][rgba[::2, ::2, 3] > 128][:, :3] / 255).astype(np.float32)
    if len(drawn) < 50:
        return None
    shares = np.bincount(_colour_index(drawn), minlength=len(_COLOURS)) / len(drawn)
    second, first = np.argsort(shares)[-2:]
    if shares[first] < _CLEAR_SHARE or shares[second] > _SECOND_SHARE or _COLOURS[first] == "beige":
        return None
    return _COLOURS[first]


def _colour_index(rgb: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """Index into _COLOURS of each pixel [N, 3], by hue, saturation and brightness (value)."""
    value, low = rgb.max(axis=1), rgb.min(axis=1)
    spread = np.maximum(value - low, 1e-6)
    saturation = spread / np.maximum(value, 1e-6)
    red, green, blue = rgb.T
    sector = np.select(
        [value == red, value == green],
        [(green - blue) / spread % 6, (blue - red) / spread + 2],
        (red - green) / spread + 4,
    )
    hue = 60 * sector
    earthy = (hue >= 8) & (hue < 45)
    rules = [
        (value < 0.25, "black"),
        ((saturation < 0.12) & (value > 0.88), "white"),
        (saturation < 0.15, "grey"),
        (earthy & ((value < 0.7) | ((value < 0.8) & (saturation < 0.75))), "brown"),
        (earthy & (saturation < 0.55), "beige"),
        (((hue >= 330) | (hue < 8)) & (saturation < 0.55) & (value > 0.75), "pink"),
        ((hue < 15) | (hue >= 345), "red"),
        (hue < 40, "orange"),
        (hue < 68, "yellow"),
        (hue < 165, "green"),
        (hue < 255, "blue"),
        (hue < 295, "purple"),
    ]
    choices = [np.full(len(rgb), _COLOURS.index(word), dtype=np.int64) for _, word in rules]
    return np.select([rule for rule, _ in rules], choices, np.int64(_COLOURS.index("pink")))


def render_all(
    candidates: Sequence[Candidate], size: int, counts: dict[str, Counter[str]], progress: Progress | None = None
) -> dict[str, Picture]:
    """Render candidates in two processes, by key; blank and unreadable drawings are counted by source.

    Raises:
        DataError: a rendering process died.
        MissingPackageError: pyvips is not installed.
    """
    if importlib.util.find_spec("pyvips") is None:
        raise MissingPackageError("pyvips renders the pictures and is not installed", remedy=_INSTALL)
    pictures: dict[str, Picture] = {}
    with ExitStack() as stack:
        idle: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()
        for _ in range(PROCESSES):
            idle.put(stack.enter_context(_worker(size)))

        def ask(candidate: Candidate) -> Picture | str:
            worker = idle.get()
            try:
                return _ask(worker, candidate)
            finally:
                idle.put(worker)

        threads = ThreadPoolExecutor(PROCESSES)
        stack.callback(threads.shutdown, cancel_futures=True)
        for done, (candidate, result) in enumerate(zip(candidates, threads.map(ask, candidates), strict=True)):
            if isinstance(result, Picture):
                pictures[candidate.key] = result
            else:
                counts[result][candidate.source] += 1
            if progress and done % 200 == 0:
                progress("render", done, len(candidates))
    return pictures


@contextmanager
def _worker(size: int) -> Iterator[subprocess.Popen[bytes]]:
    """A rendering process that ends with the block."""
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    process = subprocess.Popen(
        [sys.executable, "-m", f"{__package__}.render_worker", str(size)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path, "VIPS_CONCURRENCY": "1"},
    )
    try:
        yield process
    finally:
        process.kill()
        with suppress(BrokenPipeError):
            process.communicate()


def _ask(worker: subprocess.Popen[bytes], candidate: Candidate) -> Picture | str:
    """The picture of one drawing, or "blank" or "unreadable"."""
    question, answer = worker.stdin, b""
    if question is not None and worker.stdout is not None:
        with suppress(BrokenPipeError):
            question.write(base64.b64encode(candidate.data) + b"\n")
            question.flush()
            answer = worker.stdout.readline()
    if not answer:
        raise DataError(
            f"the process that rendered {candidate.key} died",
            remedy="check that `python -c 'import pyvips'` works and that memory suffices, then build again",
        )
    facts = json.loads(answer)
    return str(facts["failed"]) if "failed" in facts else Picture(base64.b64decode(facts["png"]), facts["colour"])
