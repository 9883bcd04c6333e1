# SPDX-License-Identifier: Apache-2.0
"""What selection does to a pool: small pools can collapse onto a narrow subset, and noisy pairs should be avoided."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from aced_sdk.errors import CurationError


@dataclass(frozen=True)
class DrawSummary:
    """Draws of a pool so far; shares are in 0..1.

    Attributes:
        draws: trained examples, repeats counted.
        unique_coverage: share of the pool drawn at least once.
        top_decile_share: share of all draws that fell on the most drawn tenth of the pool; 0.1 if all are drawn alike.
        effective_pool_size: exp of the entropy of the draws, in pairs; the pool's size if all are drawn alike.
        noisy_drawn: share of known-noisy pairs among the draws; None if it is not known which pairs are noisy.
        noisy_pool: their share of the pool.
    """

    draws: int
    unique_coverage: float
    top_decile_share: float
    effective_pool_size: float
    noisy_drawn: float | None
    noisy_pool: float | None


class DrawStatistics:
    """Running draw counts of a pool, int32 [num_pairs] (4 bytes a pair).

    Args:
        num_pairs: pairs in the pool.
        noisy: bool [num_pairs], where it is known which pairs are noisy.

    Raises:
        CurationError: if the sizes do not fit.
    """

    def __init__(self, num_pairs: int, *, noisy: npt.NDArray[np.bool_] | None = None) -> None:
        if num_pairs < 1:
            raise CurationError(f"a pool of {num_pairs} pairs", remedy="give a pool with pairs", field="num_pairs")
        if noisy is not None and noisy.shape != (num_pairs,):
            raise CurationError(
                f"noise marks of shape {list(noisy.shape)} for {num_pairs} pairs",
                remedy="give one bool for each pair of the pool",
                field="noisy",
            )
        self._counts = np.zeros(num_pairs, dtype=np.int32)
        self._noisy = noisy

    @property
    def counts(self) -> npt.NDArray[np.int32]:
        """Draws of each pair, a view that cannot be written to."""
        view = self._counts.view()
        view.flags.writeable = False
        return view

    def update(self, rows: npt.NDArray[Any] | torch.Tensor) -> None:
        """Count the trained pairs, integer [K] rows of the pool.

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
        np.add.at(self._counts, drawn, 1)

    def summary(self) -> DrawSummary:
        """The measures of all draws so far; zeros before the first."""
        counts = self._counts
        draws = int(counts.sum(dtype=np.int64))
        noisy_pool = None if self._noisy is None else float(self._noisy.mean())
        if draws == 0:
            return DrawSummary(0, 0.0, 0.0, 0.0, None, noisy_pool)
        top = max(1, round(len(counts) / 10))
        most = np.partition(counts, len(counts) - top)[-top:]
        seen = counts[counts > 0]
        share = seen / draws
        return DrawSummary(
            draws=draws,
            unique_coverage=len(seen) / len(counts),
            top_decile_share=int(most.sum(dtype=np.int64)) / draws,
            effective_pool_size=float(np.exp(-(share * np.log(share)).sum())),
            noisy_drawn=None if self._noisy is None else int(counts[self._noisy].sum(dtype=np.int64)) / draws,
            noisy_pool=noisy_pool,
        )

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps: {"counts": int32 [num_pairs]}, a copy."""
        return {"counts": torch.from_numpy(self._counts.copy())}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from a checkpoint.

        Raises:
            CurationError: if it counted another pool.
        """
        counts = state.get("counts")
        if counts is None or counts.shape != self._counts.shape:
            found = "no counts" if counts is None else f"counts of {len(counts)} pairs"
            raise CurationError(
                f"the checkpoint holds {found}, the pool has {len(self._counts)} pairs",
                remedy="resume with the data the run began with",
                field="counts",
            )
        self._counts = counts.cpu().numpy().astype(np.int32, copy=True)
