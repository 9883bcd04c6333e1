# SPDX-License-Identifier: Apache-2.0
"""Pairs of a run's pool to look at: the most drawn, the never drawn, the picked and the rejected of a step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from aced_sdk.config import Data, DistillConfig
from aced_sdk.data import Pool
from aced_sdk.data.pool import UnusablePair
from aced_sdk.engine import checkpoints
from aced_sdk.engine.state import load_tensors
from aced_sdk.errors import AcedError, DataError
from aced_sdk.files import printable
from aced_sdk.processing.plain import open_picture
from aced_sdk.reporting.page import count, thumbnail_uri

_SHOWN = 12
"""Pairs that a group shows."""

_TRIED = 4 * _SHOWN
"""Pairs that are read for a group: some are unusable, and a log may name one of those over and over."""

_PIXELS = 1_000_000_000
"""Pixels that are decoded for all groups together; what follows is left out."""

_CAPTION = 90
"""Characters of a caption that are shown."""


@dataclass(frozen=True)
class Thumb:
    """One pair: the picture as a `data:` address, its caption, a few words, whether it is marked as noisy."""

    picture: str
    caption: str
    note: str
    noisy: bool


@dataclass(frozen=True)
class Group:
    """Pairs under one title."""

    title: str
    note: str
    thumbs: list[Thumb]

    @property
    def noisy(self) -> bool:
        """Whether any of them is marked as noisy."""
        return any(thumb.noisy for thumb in self.thumbs)


def gallery(folder: Path, config: DistillConfig, last: dict[str, Any] | None) -> tuple[list[Group], str]:
    """The groups that can be shown, and a sentence about what cannot; "" if all can.

    Args:
        folder: the run's folder; draw counts are in its newest checkpoint.
        config: names the shards.
        last: the last `selected` event that holds rows; None if there is none.
    """
    groups: list[Group] = []
    try:
        pool = Pool(config.data.shards, caption_lines=config.data.caption_lines)
        counts = _counts(folder, len(pool))
        shown = _Reader(pool, config.data)
        if counts is not None:
            groups += _by_draws(shown, counts)
        if last is not None:
            groups += _of_step(shown, last)
    except (AcedError, OSError) as error:
        return [], f"The gallery is left out: {printable(error.cause if isinstance(error, AcedError) else error)}."
    missing = []
    if counts is None:
        missing.append("how often pairs were drawn, before the first checkpoint")
    if last is None and config.curation.candidates > config.curation.sub_batch:
        missing.append("picked and rejected pairs, for the log holds no rows of super-batches this large")
    return groups, f"Not shown: {'; '.join(missing)}." if missing else ""


class _Reader:
    def __init__(self, pool: Pool, data: Data) -> None:
        self.pool = pool
        self.data = data
        self.pixels = _PIXELS

    def thumbs(self, rows: Iterable[int], counts: npt.NDArray[np.int32] | None = None) -> list[Thumb]:
        """The first usable pairs among these rows; with counts, how often each was drawn."""
        found: list[Thumb] = []
        for row in islice(dict.fromkeys(rows), _TRIED):
            if len(found) == _SHOWN:
                break
            try:
                text = self.pool.text(row, self.data.max_caption_bytes)
                header = self.pool.header(row, min(self.data.max_pixels, self.pixels))
                self.pixels -= header.width * header.height  # also of a picture that turns out to be broken
                picture = thumbnail_uri(open_picture(header, max_pixels=self.data.max_pixels))
            except (UnusablePair, ValueError, OSError):  # the latter: a mode without an RGB form
                continue
            caption = text if len(text) <= _CAPTION else text[: _CAPTION - 1] + "…"
            note = "" if counts is None else f"drawn {count(int(counts[row]))} ×"
            noisy = self.pool.metadata(row).get("noisy") is True
            found.append(Thumb(picture, caption, note, noisy))
        return found


def _counts(folder: Path, pairs: int) -> npt.NDArray[np.int32] | None:
    """int32 [pairs] draws up to the newest checkpoint; None before the first."""
    found = checkpoints(folder)
    if not found:
        return None
    counts = load_tensors(found[-1], "loop.safetensors").get("counts")
    if counts is None or counts.dtype != torch.int32 or counts.ndim != 1 or bool((counts < 0).any()):
        raise DataError(f"{printable(found[-1])} holds no draw counts", remedy="restore the checkpoint")
    if len(counts) != pairs:
        # Rows would name other pairs than those that were drawn.
        cause = f"the shards hold {pairs:,} pairs now, and the run drew from {len(counts):,}"
        raise DataError(cause, remedy="restore the shards")
    array: npt.NDArray[np.int32] = counts.numpy()
    return array


def _by_draws(shown: _Reader, counts: npt.NDArray[np.int32]) -> list[Group]:
    often = np.argsort(-counts, kind="stable")[:_TRIED]
    never = np.flatnonzero(counts == 0)
    draws, of = int(counts.sum(dtype=np.int64)), len(counts)
    mean = f"Up to the newest checkpoint; a pair was drawn {draws / of:.3g} times on average."
    groups = [Group("Most drawn", mean, shown.thumbs(often, counts))]
    if len(never):
        note = f"Some of {count(len(never))} among {count(of)} pairs."
        groups.append(Group("Never drawn", note, shown.thumbs(_some(never))))
    return groups


def _of_step(shown: _Reader, last: dict[str, Any]) -> list[Group]:
    picked = last["picked"]
    rejected = np.setdiff1d(last["candidates"], picked)
    if max(max(last["candidates"]), max(picked)) >= len(shown.pool):
        raise DataError("the log names rows that the shards do not hold", remedy="restore the shards")
    step = count(last["step"])
    first = f"The first of {count(len(picked))}, in the order drawn."
    rest = f"Some of {count(len(rejected))}."
    return [
        Group(f"Picked in step {step}", first, shown.thumbs(picked)),
        Group(f"Rejected in step {step}", rest, shown.thumbs(_some(rejected))),
    ]


def _some(rows: npt.NDArray[np.int64]) -> list[int]:
    """A few rows from all over the pool, the same ones whenever a page is made; more than shown: some are unusable."""
    some: list[int] = np.random.default_rng(0).permutation(rows)[:_TRIED].tolist()
    return some
