# SPDX-License-Identifier: Apache-2.0
"""The selectors that curation configs build, and selections that need no joint score."""

from __future__ import annotations

from collections.abc import Callable
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
"""The quantiles that `Selector.quantiles` gives."""


class Selector:
    """Selects the sub-batch of each step. This base selects nothing: the drawn candidates are the sub-batch (`Iid`).

    A curation config builds one (`config.build()`).

    Args:
        config: the curation's config.
    """

    def __init__(self, config: Any) -> None:
        self.config = config

    def keep(self, reference: Callable[[], Embeddings], pairs: int) -> Tensor:
        """Choose once, before training, which pairs of the pool may be drawn.

        Args:
            reference: reads the reference's embeddings of all pairs.
            pairs: how many there are.

        Returns:
            int64 [K], places among the pairs, in ascending order.
        """
        return torch.arange(pairs)

    def select(
        self,
        student: Embeddings | None,
        reference: Embeddings | None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Select the sub-batch of a super-batch.

        Args:
            student: embeddings of the candidates, if the config needs them (`config.needs_student`).
            reference: likewise (`config.needs_reference`).
            generator: source of the noise.

        Returns:
            int64 [config.sub_batch], distinct, in the order drawn.

        Raises:
            CurationError: as `select_joint`.
        """
        return torch.arange(self.config.sub_batch)

    def doubts(self, student: Embeddings | None, reference: Embeddings | None) -> tuple[str, str] | None:
        """Cause and remedy if selection is close to random; see `aced_sdk.curation.scores.doubts`.

        Raises:
            CurationError: as `select`.
        """
        return None

    def quantiles(
        self, student: Embeddings | None, reference: Embeddings | None, picked: Tensor
    ) -> dict[str, tuple[float, ...]]:
        """Quantiles of the scores of a super-batch, and of the pairs picked from it, for the log.

        A pair's score is its own log-weight before anything is picked, without the gain: the diagonal of the joint
        score (JEST, arXiv 2406.17711, section 3). O(N D) for N candidates.

        Args:
            student: as for `select`.
            reference: as for `select`.
            picked: int64 [b], places among the candidates.

        Returns:
            `QUANTILES` of "candidates" and of "picked"; nothing if no candidates are scored.

        Raises:
            CurationError: as `select`.
        """
        return {}


class StaticSelector(Selector):
    """Draws only from the top share of the pool by the reference's own pair score."""

    config: StaticFilter

    def keep(self, reference: Callable[[], Embeddings], pairs: int) -> Tensor:
        kept = static_filter(reference(), self.config.share, self.config.loss)
        return kept.cpu().sort().values


class IndependentSelector(Selector):
    """Scores each pair by its own loss alone."""

    config: Scored

    def select(
        self,
        student: Embeddings | None,
        reference: Embeddings | None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        config = self.config
        return select_independent(
            student,
            reference,
            size=config.sub_batch,
            score=config.score,
            loss=config.loss,
            gain=config.gain,
            generator=generator,
        )

    @torch.no_grad()
    def doubts(self, student: Embeddings | None, reference: Embeddings | None) -> tuple[str, str] | None:
        return doubts(weights_of(student, reference, self.config.score, self.config.loss), self.config.gain)

    @torch.no_grad()
    def quantiles(
        self, student: Embeddings | None, reference: Embeddings | None, picked: Tensor
    ) -> dict[str, tuple[float, ...]]:
        scores = weights_of(student, reference, self.config.score, self.config.loss).current()
        at = scores.new_tensor(QUANTILES)
        both = torch.stack([torch.quantile(part, at) for part in (scores, scores[picked.to(scores.device)])])
        candidates, chosen = both.tolist()  # one wait for the device
        return {"candidates": tuple(candidates), "picked": tuple(chosen)}


class JointSelector(IndependentSelector):
    """Draws the sub-batch in chunks by the joint score (JEST, Algorithm 1)."""

    config: Joint

    def select(
        self,
        student: Embeddings | None,
        reference: Embeddings | None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        config = self.config
        return select_joint(
            student,
            reference,
            size=config.sub_batch,
            num_chunks=config.num_chunks,
            score=config.score,
            loss=config.loss,
            gain=config.gain,
            generator=generator,
        )


def select_random(size: int, of: int, generator: torch.Generator | None = None) -> Tensor:
    """int64 [size], distinct, uniformly from `of` items, on the generator's device (CPU by default).

    Raises:
        CurationError: if size is not in 1..of.
    """
    if not 0 < size <= of:
        raise CurationError(f"{size} items were asked of {of}", remedy="ask for 1 to all of them", field="size")
    device = generator.device if generator is not None else torch.device("cpu")
    return torch.randperm(of, generator=generator, device=device)[:size]


def pair_scores(reference: Embeddings, loss: SelectionLoss = "auto") -> Tensor:
    """How easy each pair alone is for the reference: minus its diagonal pair loss.

    Sigmoid: -softplus(-(t s_ii + bias)); softmax: t s_ii, the part of its loss that does not depend on batch mates.
    Both order the pairs alike. Computed a block of rows at a time, so that memory-mapped embeddings of a pool will do.

    Returns:
        float32 [N] (float64 for float64 embeddings), on the device of the embeddings.

    Raises:
        CurationError: if the embeddings are misshapen, not finite or not L2-normalised, or the scale is not positive or
            evidently a logarithm.
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


def static_filter(reference: Embeddings, share: float, loss: SelectionLoss = "auto") -> Tensor:
    """The top share of a pool by the reference's own pair score, an offline filter.

    Args:
        reference: embeddings of the whole pool.
        share: in (0, 1]; round(share * N) pairs are kept, at least one.
        loss: form of the pair score.

    Returns:
        int64 [kept], best first, equal scores in pool order.

    Raises:
        CurationError: if the share is out of range; further as `pair_scores`.
    """
    if not 0 < share <= 1:
        raise CurationError(f"a share of {share}", remedy="give a share above 0 and at most 1", field="share")
    scores = pair_scores(reference, loss)
    kept = max(1, round(share * len(scores)))
    return torch.sort(scores, descending=True, stable=True).indices[:kept]
