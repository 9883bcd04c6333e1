# SPDX-License-Identifier: Apache-2.0
"""The selectors of the curation configs, random selection and the static filter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aced_sdk.config import Joint, SelectionLoss, StaticFilter
from aced_sdk.config.curation import Scored
from aced_sdk.curation.joint import select_independent, select_joint
from aced_sdk.curation.scores import ROWS_AT_ONCE, check, doubts, loss_form, number, softplus, weights_of
from aced_sdk.errors import CurationError
from aced_sdk.towers.embeddings import Embeddings

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
"""The quantiles returned by `Selector.quantiles`."""

_ALL_SCORED, _FOR_QUANTILES = 4096, 512  # above 4096 pairs, 512 are scored for quantiles


class Selector:
    """Select the sub-batch of each step. This base class trains on all drawn candidates (`Iid`).

    Selectors are built by `config.build()`.

    Args:
        config: the curation's config.
    """

    def __init__(self, config: Any) -> None:
        self.config = config

    @property
    def keep_fraction(self) -> float:
        """Fraction of the pool that may be drawn, chosen once before training by `pool_scores`; 1: all."""
        return 1.0

    def pool_scores(self, reference: Embeddings) -> Tensor:
        """Score pairs of the pool for `keep_fraction`; higher scores are kept.

        Args:
            reference: the reference's embeddings of K pairs.

        Returns:
            float32 [K].
        """
        return torch.zeros(len(reference))

    def select(
        self,
        student: Embeddings | None,
        reference: Embeddings | None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Select the sub-batch of a super-batch.

        Args:
            student: the student's embeddings of the candidates; None unless `config.needs_student`.
            reference: the reference's embeddings; None unless `config.needs_reference`.
            generator: source of the noise.

        Returns:
            int64 [config.sub_batch], distinct indices of candidates, in draw order.

        Raises:
            CurationError: as `select_joint`.
        """
        return torch.arange(self.config.sub_batch)

    def doubts(self, student: Embeddings | None, reference: Embeddings | None) -> tuple[str, str] | None:
        """Return cause and remedy if the selection is close to random; see `aced_sdk.curation.scores.doubts`.

        Raises:
            CurationError: as `select`.
        """
        return None

    def quantiles(
        self, student: Embeddings | None, reference: Embeddings | None, picked: Tensor
    ) -> dict[str, tuple[float, ...]]:
        """Quantiles of the scores of all candidates and of the picked pairs, for the log.

        The score of a pair is its log-weight before the first pick, without the gain: the diagonal of the joint score
        (JEST, arXiv 2406.17711, section 3). Of more than 4096 pairs, 512 are scored.

        Args:
            student: as for `select`.
            reference: as for `select`.
            picked: int64 [b], indices of candidates.

        Returns:
            `QUANTILES` of "candidates" and "picked"; empty if the candidates are not scored.

        Raises:
            CurationError: as `select`.
        """
        return {}


class StaticSelector(Selector):
    """Draw only from the top fraction of the pool by the reference's pair score."""

    config: StaticFilter

    @property
    def keep_fraction(self) -> float:
        return self.config.keep_fraction

    def pool_scores(self, reference: Embeddings) -> Tensor:
        return pair_scores(reference, self.config.loss)


class IndependentSelector(Selector):
    """Score each pair independently by its own loss."""

    config: Scored

    @property
    def _settings(self) -> dict[str, Any]:
        config = self.config
        return {"size": config.sub_batch, "score": config.score, "loss": config.loss, "gain": config.gain}

    def select(
        self,
        student: Embeddings | None,
        reference: Embeddings | None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        return select_independent(student, reference, **self._settings, generator=generator)

    @torch.no_grad()
    def doubts(self, student: Embeddings | None, reference: Embeddings | None) -> tuple[str, str] | None:
        return doubts(weights_of(student, reference, self.config.score, self.config.loss), self.config.gain)

    @torch.no_grad()
    def quantiles(
        self, student: Embeddings | None, reference: Embeddings | None, picked: Tensor
    ) -> dict[str, tuple[float, ...]]:
        pairs = len(student if student is not None else reference if reference is not None else picked)
        levels = []
        for places in (_spread(torch.arange(pairs)), _spread(picked.cpu())):
            own, known = (m if m is None else m[places.to(m.image.device)] for m in (student, reference))
            scores = weights_of(own, known, self.config.score, self.config.loss).current()
            levels.append(torch.quantile(scores, scores.new_tensor(QUANTILES)))
        candidates, chosen = torch.stack(levels).tolist()  # synchronise the device once
        return {"candidates": tuple(candidates), "picked": tuple(chosen)}


class JointSelector(IndependentSelector):
    """Draw the sub-batch in chunks by the joint score (JEST, Algorithm 1)."""

    config: Joint

    def select(
        self,
        student: Embeddings | None,
        reference: Embeddings | None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        chunks = self.config.num_chunks
        return select_joint(student, reference, **self._settings, num_chunks=chunks, generator=generator)


def _spread(places: Tensor) -> Tensor:
    """These places, or `_FOR_QUANTILES` of them, evenly spread."""
    if len(places) <= _ALL_SCORED:
        return places
    return places[torch.linspace(0, len(places) - 1, _FOR_QUANTILES).long()]


def select_random(size: int, of: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw `size` of `of` items uniformly without replacement: int64 [size], on the generator's device (default: CPU).

    Raises:
        CurationError: if size is not in 1..of.
    """
    if not 0 < size <= of:
        raise CurationError(f"cannot draw {size} of {of} items", remedy=f"make size 1 to {of}", field="size")
    device = generator.device if generator is not None else torch.device("cpu")
    return torch.randperm(of, generator=generator, device=device)[:size]


def pair_scores(reference: Embeddings, loss: SelectionLoss = "auto") -> Tensor:
    """Score each pair by how easy it is for the reference: minus its diagonal pair loss.

    Sigmoid: -softplus(-(t s_ii + bias)). Softmax: t s_ii, the part of the loss that does not depend on other pairs.
    Both give the same order. Computed in blocks of rows, so memory-mapped embeddings of a pool can be used.

    Returns:
        float32 [N] (float64 for float64 embeddings), on the device of the embeddings.

    Raises:
        CurationError: if the embeddings have a wrong shape, are not finite or not L2-normalised, or the scale is not
            positive or looks like a logarithm.
    """
    form = loss_form(loss, reference)
    check("reference", reference, form)
    scale, bias = number(reference.scale), number(reference.bias)
    dtype = torch.float64 if reference.image.dtype == torch.float64 else torch.float32
    scores = reference.image.new_empty(len(reference), dtype=dtype)
    with torch.no_grad():
        for start in range(0, len(reference), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            similarity = scale * (reference.image[rows].to(dtype) * reference.text[rows].to(dtype)).sum(dim=1)
            scores[rows] = -softplus(-(similarity + bias)) if form == "sigmoid" else similarity
    return scores


def static_filter(reference: Embeddings, keep_fraction: float, loss: SelectionLoss = "auto") -> Tensor:
    """Filter a pool offline: keep the top fraction by the reference's pair score.

    Args:
        reference: embeddings of the whole pool.
        keep_fraction: fraction to keep, in (0, 1]; round(keep_fraction * N) pairs, at least one.
        loss: loss of the pair score.

    Returns:
        int64 [kept], best first; equal scores are in pool order.

    Raises:
        CurationError: if the fraction is out of range, or as `pair_scores`.
    """
    if not 0 < keep_fraction <= 1:
        raise CurationError(
            f"keep_fraction is {keep_fraction}", remedy="use a fraction above 0 and at most 1", field="keep_fraction"
        )
    scores = pair_scores(reference, loss)
    kept = max(1, round(keep_fraction * len(scores)))
    return torch.sort(scores, descending=True, stable=True).indices[:kept]
