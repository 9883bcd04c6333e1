# SPDX-License-Identifier: Apache-2.0
"""Which rows of the pool may be drawn: usable ones, and of them the best by the reference's pair score."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray

from aced_sdk.cache import EmbeddingCache
from aced_sdk.curation import Selector
from aced_sdk.data import RowSet, Source
from aced_sdk.data.rowset import blocks
from aced_sdk.errors import CurationError
from aced_sdk.files import home, printable, reserve

_BINS = 2**16
_AT_ONCE = 2**16  # rows whose embeddings are in memory

Scores = NDArray[np.float32]


def usable_rows(pairs: int, source: Source, caches: Sequence[EmbeddingCache]) -> RowSet:
    """The rows that are usable in the source and in every cache."""

    def usable(block: slice) -> NDArray[np.bool_]:
        held = source.usable(block)
        for cache in caches:
            held = held & np.asarray(cache.usable[block])
        return held

    return RowSet.of(pairs, usable)


def best_rows(usable: RowSet, reference: EmbeddingCache, selector: Selector) -> RowSet:
    """The usable rows with the highest scores; `selector.keep_fraction` of them, rounded, at least one.

    Of equal scores, the rows that come first are kept. Scores are kept in a temporary file, 4 bytes per pair.
    """
    kept = max(1, round(selector.keep_fraction * len(usable)))
    with _temporary(usable.pairs) as scores:
        for block, embeddings in reference.blocks(_AT_ONCE):
            rows = np.arange(block.start, block.stop)
            inside = usable(rows)
            found = selector.pool_scores(embeddings[torch.from_numpy(inside)])
            if found.shape != (inside.sum(),) or not bool(found.isfinite().all()):
                raise CurationError(
                    f"the scores of {inside.sum()} pairs have the shape {list(found.shape)} or are not finite",
                    remedy="return one finite score for each pair from pool_scores",
                    field="curation",
                )
            scores[rows[inside]] = found.cpu().numpy()
        threshold, ties = _threshold(scores, usable, kept)
        left = ties

        def best(block: slice) -> NDArray[np.bool_]:
            nonlocal left
            values = _sortable(scores[block])
            inside = usable(np.arange(block.start, block.stop))
            equal = np.flatnonzero(inside & (values == threshold))[:left]
            left -= len(equal)
            held = inside & (values > threshold)
            held[equal] = True
            return held

        return RowSet.of(usable.pairs, best)


@contextmanager
def _temporary(pairs: int) -> Iterator[Scores]:
    try:
        home().mkdir(parents=True, exist_ok=True)
        file = tempfile.TemporaryFile(dir=home())  # noqa: SIM115, it is closed below
        reserve(file.fileno(), 4 * pairs, mapped=True)
    except OSError as error:
        raise CurationError(
            f"scores of {pairs:,} pairs cannot be stored in {printable(home())}: {error.strerror or error}",
            remedy="free disk space there, or set ACED_HOME to another folder",
        ) from error
    with file:
        yield np.memmap(file, np.float32, "r+", shape=(pairs,))


def _sortable(scores: Scores) -> NDArray[np.uint32]:
    """Unsigned integers in the order of the scores; 0.0 and -0.0 are equal."""
    bits = (scores + np.float32(0)).view(np.uint32)
    return np.where(bits >> 31, ~bits, bits | np.uint32(2**31))


def _threshold(scores: Scores, usable: RowSet, kept: int) -> tuple[np.uint32, int]:
    """The lowest kept score, as `_sortable`, and how many rows with just that score are kept."""
    high = _histogram(scores, usable, None)
    top, above = _bin(high, kept)
    low = _histogram(scores, usable, top)
    bottom, more = _bin(low, kept - above)
    return np.uint32(top << 16 | bottom), kept - above - more


def _histogram(scores: Scores, usable: RowSet, top: int | None) -> NDArray[np.int64]:
    """Counts by the upper 16 bits; with `top`, by the lower 16 bits of scores with these upper bits."""
    counts = np.zeros(_BINS, dtype=np.int64)
    for block in blocks(usable.pairs):
        values = _sortable(scores[block])[usable(np.arange(block.start, block.stop))]
        chosen = values >> 16 if top is None else values[values >> 16 == top] & np.uint32(0xFFFF)
        counts += np.bincount(chosen, minlength=_BINS)
    return counts


def _bin(counts: NDArray[np.int64], kept: int) -> tuple[int, int]:
    """The bin that the kept-th highest falls into, and how many are above it."""
    from_top = counts[::-1].cumsum()
    place = int(np.searchsorted(from_top, kept))
    return _BINS - 1 - place, int(from_top[place] - counts[::-1][place])
