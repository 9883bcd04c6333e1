# SPDX-License-Identifier: Apache-2.0
"""Selection by config, and the selectors that need no joint score."""

from __future__ import annotations

import torch
from torch import Tensor

from aced_sdk.config import Curation, Independent, Joint, SelectionLoss
from aced_sdk.curation.joint import select_independent, select_joint
from aced_sdk.curation.scores import ROWS_AT_ONCE, check, loss_form, number, softplus
from aced_sdk.errors import CurationError
from aced_sdk.towers.embeddings import Embeddings


def select(
    config: Curation,
    student: Embeddings | None,
    reference: Embeddings | None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The sub-batch of a super-batch, as a config says.

    Args:
        config: a curation config; with `Iid` and `StaticFilter` the drawn candidates are already the sub-batch.
        student: embeddings of the candidates, where the config needs them (`config.needs_student`).
        reference: likewise (`config.needs_reference`).
        generator: source of the noise.

    Returns:
        int64 [config.sub_batch], distinct, in the order drawn.

    Raises:
        CurationError: as `select_joint`.
    """
    if isinstance(config, Joint):
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
    if isinstance(config, Independent):
        return select_independent(
            student,
            reference,
            size=config.sub_batch,
            score=config.score,
            loss=config.loss,
            gain=config.gain,
            generator=generator,
        )
    return torch.arange(config.sub_batch)


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
