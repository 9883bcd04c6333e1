# SPDX-License-Identifier: Apache-2.0
"""What selection does to a pool: small pools can collapse onto a narrow subset, and noisy pairs should be avoided."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from aced_sdk.errors import CurationError

COLLAPSE_REMEDY = "lower curation.gain or the filter ratio (a smaller curation.super_batch), or enlarge the pool"
"""What to do about `DrawStatistics.collapsed`."""

_MANY = 1e6  # draws of each pair, from which on chance makes no difference


def even_pool_size(draws: int, pairs: int) -> float:
    """The effective pool size (see `DrawSummary`) to expect of draws that fall evenly on the pairs.

    It is below the number of pairs, since chance draws some more often. Counts of even draws are nearly Poisson with
    mean draws / pairs; for Poisson K, E[K log K] = mean * E[log(1 + K)], so that exp(entropy) = draws *
    exp(-E[log(1 + K)]). Good to a few parts in 1 / pairs.
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
    """Draws of a pool so far; shares are in 0..1.

    Attributes:
        draws: trained examples, repeats counted.
        unique_coverage: share of the pool drawn at least once.
        top_decile_share: share of all draws that fell on the most drawn tenth of the pool; 0.1 if all are drawn alike.
        effective_pool_size: exp of the entropy of the draws, in pairs; the pool's size if all are drawn alike.
    """

    draws: int
    unique_coverage: float
    top_decile_share: float
    effective_pool_size: float


class DrawStatistics:
    """Running draw counts of a pool, int32 [num_pairs] (4 bytes a pair).

    Args:
        num_pairs: pairs in the pool.

    Raises:
        CurationError: if the pool is empty.
    """

    def __init__(self, num_pairs: int) -> None:
        if num_pairs < 1:
            raise CurationError(f"a pool of {num_pairs} pairs", remedy="give a pool with pairs", field="num_pairs")
        self._count(np.zeros(num_pairs, dtype=np.int32))

    def _count(self, counts: npt.NDArray[np.int32]) -> None:
        self._counts = counts
        # How many pairs were drawn k times: all measures follow from it, without a pass over the pool.
        self._tally = np.bincount(counts)

    @property
    def counts(self) -> npt.NDArray[np.int32]:
        """Draws of each pair, a view that cannot be written to."""
        view = self._counts.view()
        view.flags.writeable = False
        return view

    def update(self, rows: npt.NDArray[Any] | torch.Tensor) -> None:
        """Count the trained pairs, integer [K] rows of the pool. O(K log K), whatever the pool's size.

        Raises:
            CurationError: if a row is outside the pool.
        """
        drawn = rows.detach().cpu().numpy() if isinstance(rows, torch.Tensor) else np.asarray(rows)
        if drawn.size and not (drawn.min() >= 0 and drawn.max() < len(self._counts)):
            raise CurationError(
                f"rows {drawn.min()} to {drawn.max()} were drawn from a pool of {len(self._counts)}",
                remedy="count rows of the pool, not of the super-batch",
                field="rows",
            )
        pairs, times = np.unique(drawn, return_counts=True)
        before = self._counts[pairs]
        after = before + times.astype(np.int32)
        self._counts[pairs] = after
        most = int(after.max(initial=0))
        if most >= len(self._tally):  # doubled, so that growing stays cheap
            self._tally = np.concatenate([self._tally, np.zeros(2 * most + 1 - len(self._tally), dtype=np.int64)])
        np.subtract.at(self._tally, before, 1)
        np.add.at(self._tally, after, 1)

    def summary(self) -> DrawSummary:
        """The measures of all draws so far; zeros before the first. O(draws of the most drawn pair)."""
        pairs = len(self._counts)
        times = np.flatnonzero(self._tally)[::-1]  # most drawn first
        often = self._tally[times]
        draws = int(times @ often)
        if draws == 0:
            return DrawSummary(0, 0.0, 0.0, 0.0)
        top = max(1, round(pairs / 10))
        in_top = np.diff(np.minimum(np.cumsum(often), top), prepend=0)
        return DrawSummary(
            draws=draws,
            unique_coverage=(pairs - int(self._tally[0])) / pairs,
            top_decile_share=int(times @ in_top) / draws,
            effective_pool_size=draws * math.exp(-float(often @ (times * np.log(np.maximum(times, 1)))) / draws),
        )

    def collapsed(self, below: float) -> str | None:
        """A sentence with figures if the draws fall on a narrow part of the pool; None if they do not.

        It says nothing before there are as many draws as pairs: until then few pairs could be drawn twice. The order
        offers each pair once in a pass over the pool, so that a sampler that keeps a share s of its candidates reaches
        at least s of the pool however greedy it is: the measure cannot fall below s.

        Args:
            below: share of `even_pool_size` under which the effective pool size counts as collapsed.
        """
        summary, pairs = self.summary(), len(self._counts)
        if summary.draws < pairs:
            return None
        even = even_pool_size(summary.draws, pairs)
        if summary.effective_pool_size >= below * even:
            return None
        return (
            f"the draws have collapsed onto about {summary.effective_pool_size:,.0f} of {pairs:,} pairs "
            f"(effective pool size after {summary.draws:,} draws; even draws would reach about {even:,.0f})"
        )

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps: {"counts": int32 [num_pairs]}, a copy."""
        return {"counts": torch.from_numpy(self._counts.copy())}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restore the state of a checkpoint.

        Raises:
            CurationError: if it counted another pool.
        """
        counts = state.get("counts")
        if counts is None or counts.shape != self._counts.shape:
            found = "no counts" if counts is None else f"counts of {counts.numel()} pairs"
            raise CurationError(
                f"the checkpoint holds {found}, the pool has {len(self._counts)} pairs",
                remedy="resume with the data the run began with",
                field="counts",
            )
        self._count(counts.cpu().numpy().astype(np.int32, copy=True))
