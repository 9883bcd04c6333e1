# SPDX-License-Identifier: Apache-2.0
"""Statistics of the draws from a pool. In small pools, selection can collapse onto a narrow subset."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from aced_sdk.data.permutation import Permutation
from aced_sdk.errors import CurationError

COLLAPSE_REMEDY = "lower curation.gain or the filter ratio (a smaller curation.super_batch), or enlarge the pool"
"""Remedy for `DrawStatistics.collapsed`."""

MAX_COUNTED = 2**22
"""Largest number of draw counts. In larger pools, a fixed random sample of so many pairs is counted."""

_SAMPLE = 0x5A3D  # key of the sample
_MANY = 1e6  # above this many draws per pair, random variation is negligible


def even_pool_size(draws: int, pairs: int) -> float:
    """The expected effective pool size (see `DrawSummary`) of uniform draws.

    It is below the number of pairs, because some pairs are drawn more often by chance. The counts are nearly Poisson
    with mean draws / pairs. For Poisson K, E[K log K] = mean * E[log(1 + K)], so exp(entropy) = draws *
    exp(-E[log(1 + K)]). The relative error is a few times 1 / pairs.
    """
    if draws == 0:
        return 0.0
    mean = draws / pairs
    if mean > _MANY:
        return float(pairs)
    reach = 12 * math.sqrt(mean)  # deviations on either side
    counts = torch.arange(max(0, math.floor(mean - reach)), math.ceil(mean + reach) + 20, dtype=torch.float64)
    chance = torch.softmax(counts * math.log(mean) - torch.lgamma(counts + 1), dim=0)
    return draws * math.exp(-float(chance @ torch.log1p(counts)))


@dataclass(frozen=True)
class DrawSummary:
    """The draws from a pool so far. Fractions are in 0..1.

    Attributes:
        draws: trained examples, including repeats.
        unique_coverage: fraction of the pool drawn at least once.
        top_decile_fraction: fraction of the draws of the most drawn 10 % of the pool; 0.1 if all counts are equal.
        effective_pool_size: exp(entropy) of the draws, in pairs; the size of the pool if all counts are equal.
    """

    draws: int
    unique_coverage: float
    top_decile_fraction: float
    effective_pool_size: float


class DrawStatistics:
    """Draw counts of a pool, or of a sample of `MAX_COUNTED` pairs of a larger one.

    Args:
        num_pairs: N, pairs in the pool.

    Raises:
        CurationError: if the pool is empty.
    """

    def __init__(self, num_pairs: int) -> None:
        if num_pairs < 1:
            raise CurationError(f"the pool has {num_pairs} pairs", remedy="use a pool with pairs", field="num_pairs")
        self.num_pairs = num_pairs
        counted = min(num_pairs, MAX_COUNTED)
        # A pair is in the sample if its place is below `counted`.
        self._place = Permutation(num_pairs, _SAMPLE) if num_pairs > counted else None
        self._draws = 0
        self._count(np.zeros(counted, dtype=np.int32))

    def _count(self, counts: npt.NDArray[np.int32]) -> None:
        self._counts = counts
        # The number of pairs drawn k times, for each k. All statistics are computed from it, without reading the pool.
        self._tally = np.bincount(counts)

    @property
    def counts(self) -> npt.NDArray[np.int32]:
        """int32 [min(N, MAX_COUNTED)]: draw counts, by row for a pool without a sample; a read-only view."""
        view = self._counts.view()
        view.flags.writeable = False
        return view

    def update(self, rows: npt.NDArray[Any] | torch.Tensor) -> None:
        """Count trained pairs, integer [K] rows of the pool. Takes O(K log K) for any pool size.

        Raises:
            CurationError: if a row is outside the pool.
        """
        drawn = rows.detach().cpu().numpy() if isinstance(rows, torch.Tensor) else np.asarray(rows)
        if drawn.size and not (drawn.min() >= 0 and drawn.max() < self.num_pairs):
            raise CurationError(
                f"rows {drawn.min()} to {drawn.max()} were drawn from a pool of {self.num_pairs}",
                remedy="count rows of the pool, not of the super-batch",
                field="rows",
            )
        self._draws += drawn.size
        if self._place is not None:
            places = self._place(drawn.astype(np.int64))
            drawn = places[places < len(self._counts)]
        pairs, times = np.unique(drawn, return_counts=True)
        before = self._counts[pairs]
        after = before + times.astype(np.int32)
        self._counts[pairs] = after
        most = int(after.max(initial=0))
        if most >= len(self._tally):  # double the size, so that it rarely grows
            self._tally = np.concatenate([self._tally, np.zeros(2 * most + 1 - len(self._tally), dtype=np.int64)])
        np.subtract.at(self._tally, before, 1)
        np.add.at(self._tally, after, 1)

    def summary(self) -> DrawSummary:
        """Summarise all draws so far; zeros before the first. Takes O(draws of the most drawn pair).

        From a sample, the effective pool size is that of the sample, scaled to the pool.
        """
        pairs = len(self._counts)
        times = np.flatnonzero(self._tally)[::-1]  # most drawn first
        often = self._tally[times]
        draws = int(times @ often)
        if draws == 0:
            return DrawSummary(self._draws, 0.0, 0.0, 0.0)
        top = max(1, round(pairs / 10))
        in_top = np.diff(np.minimum(np.cumsum(often), top), prepend=0)
        effective = draws * math.exp(-float(often @ (times * np.log(np.maximum(times, 1)))) / draws)
        return DrawSummary(
            draws=self._draws,
            unique_coverage=(pairs - int(self._tally[0])) / pairs,
            top_decile_fraction=int(times @ in_top) / draws,
            effective_pool_size=effective * self.num_pairs / pairs,
        )

    def collapsed(self, below: float) -> str | None:
        """Return a warning if the draws have collapsed onto a narrow part of the pool, else None.

        Returns None until there are as many draws as pairs, because few pairs are drawn twice before. The order offers
        each pair once per pass over the pool. A sampler that keeps a fraction s of its candidates thus reaches at
        least s of the pool. The effective pool size cannot fall below s of that of uniform draws.

        Args:
            below: threshold of the effective pool size, as a fraction of `even_pool_size`.
        """
        summary, pairs = self.summary(), self.num_pairs
        if summary.draws < pairs:
            return None
        even = even_pool_size(summary.draws, pairs)
        if summary.effective_pool_size >= below * even:
            return None
        return (
            f"the draws have collapsed onto about {summary.effective_pool_size:,.0f} of {pairs:,} pairs "
            f"(effective pool size after {summary.draws:,} draws; uniform draws would reach about {even:,.0f})"
        )

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The state for a checkpoint, a copy: {"counts": int32 [min(N, MAX_COUNTED)], "draws": int64 []}."""
        return {"counts": torch.from_numpy(self._counts.copy()), "draws": torch.tensor(self._draws)}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restore the state of a checkpoint.

        Raises:
            CurationError: if its pool has another size.
        """
        counts = state.get("counts")
        if counts is None or counts.shape != self._counts.shape:
            found = "no counts" if counts is None else f"counts of {counts.numel()} pairs"
            raise CurationError(
                f"the checkpoint holds {found}, the pool has {len(self._counts)} pairs",
                remedy="resume with the data that the run was started with",
                field="counts",
            )
        self._draws = int(state["draws"])
        self._count(counts.cpu().numpy().astype(np.int32, copy=True))
