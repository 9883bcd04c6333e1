# SPDX-License-Identifier: Apache-2.0
"""Example pairs of a run for its report: most drawn, never drawn, and picked or rejected in a step."""

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
from aced_sdk.curation.statistics import MAX_COUNTED
from aced_sdk.data import Pool
from aced_sdk.data.pool import UnusablePair
from aced_sdk.engine import checkpoints
from aced_sdk.engine.state import load_tensors
from aced_sdk.errors import AcedError, DataError
from aced_sdk.files import printable
from aced_sdk.processing.plain import open_picture
from aced_sdk.reporting.page import count, thumbnail_uri

_SHOWN = 12
"""Pairs per group."""

_TRIED = 4 * _SHOWN
"""Pairs that are tried per group; unusable pairs are not shown."""

_PIXELS = 1_000_000_000
"""Limit of decoded pixels for all groups; further pairs are left out."""

_CAPTION = 90
"""Characters shown of a caption."""


@dataclass(frozen=True)
class Thumb:
    """A pair: the picture as a `data:` URI, its caption, a short note, and whether it is marked as noisy."""

    picture: str
    caption: str
    note: str
    noisy: bool


@dataclass(frozen=True)
class Group:
    """Pairs with a common title."""

    title: str
    note: str
    thumbs: list[Thumb]

    @property
    def noisy(self) -> bool:
        """Whether any pair is marked as noisy."""
        return any(thumb.noisy for thumb in self.thumbs)


def gallery(folder: Path, config: DistillConfig, last: dict[str, Any] | None) -> tuple[list[Group], str]:
    """Return the groups, and a sentence about groups that cannot be shown; "" if there are none.

    Args:
        folder: the run's folder; draw counts are read from its newest checkpoint.
        config: the run's config; pairs are read from its shards.
        last: the last `selected` event with rows; None if there is none.
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
        why = "because only a sample is counted" if len(pool) > MAX_COUNTED else "before the first checkpoint"
        missing.append(f"how often pairs were drawn, {why}")
    if last is None and config.curation.candidates > config.curation.sub_batch:
        missing.append("picked and rejected pairs, because the log has no rows of super-batches this large")
    return groups, f"Not shown: {'; '.join(missing)}." if missing else ""


class _Reader:
    def __init__(self, pool: Pool, data: Data) -> None:
        self.pool = pool
        self.data = data
        self.pixels = _PIXELS

    def thumbs(self, rows: Iterable[int], counts: npt.NDArray[np.int32] | None = None) -> list[Thumb]:
        """The first usable pairs of these rows; the notes show the draw counts, if given."""
        found: list[Thumb] = []
        for row in islice(dict.fromkeys(rows), _TRIED):
            if len(found) == _SHOWN:
                break
            try:
                text = self.pool.text(row, self.data.max_caption_bytes)
                header = self.pool.header(row, min(self.data.max_pixels, self.pixels))
                self.pixels -= header.width * header.height  # count them even if decoding fails
                picture = thumbnail_uri(open_picture(header, max_pixels=self.data.max_pixels))
            except (UnusablePair, ValueError, OSError):  # ValueError: a mode that cannot be converted to RGB
                continue
            caption = text if len(text) <= _CAPTION else text[: _CAPTION - 1] + "…"
            note = "" if counts is None else f"drawn {count(int(counts[row]))} ×"
            noisy = self.pool.metadata(row).get("noisy") is True
            found.append(Thumb(picture, caption, note, noisy))
        return found


def _counts(folder: Path, pairs: int) -> npt.NDArray[np.int32] | None:
    """int32 [pairs] draw counts in the newest checkpoint; None before the first checkpoint."""
    found = checkpoints(folder)
    if not found:
        return None
    counts = load_tensors(found[-1], "loop.safetensors").get("counts")
    if counts is None or counts.dtype != torch.int32 or counts.ndim != 1 or bool((counts < 0).any()):
        raise DataError(f"{printable(found[-1])} holds no draw counts", remedy="restore the checkpoint")
    if len(counts) == MAX_COUNTED < pairs:
        return None  # counts of a sample, whose rows are not stored
    if len(counts) != pairs:
        # The counts would belong to other pairs.
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
    """Random rows with a fixed seed; more than are shown, because some are unusable."""
    some: list[int] = np.random.default_rng(0).permutation(rows)[:_TRIED].tolist()
    return some
