# SPDX-License-Identifier: Apache-2.0
"""The joint sampler (JEST, arXiv 2406.17711, Algorithm 1) in a streaming form, and its independent baseline.

A chunk is drawn without replacement from softmax(gain * log-weights) by the Gumbel-top-k trick. Besides the
embeddings, memory holds the noise [num_chunks, N] and a block of bounded size, but no N x N matrix. The logit of each
pair is computed once.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from aced_sdk.config import Score, SelectionLoss
from aced_sdk.curation.scores import Weights, doubts, weights_of
from aced_sdk.errors import CurationError, CurationWarning
from aced_sdk.towers.embeddings import Embeddings


def select_joint(
    student: Embeddings | None,
    reference: Embeddings | None,
    *,
    size: int,
    num_chunks: int = 16,
    score: Score = "learnability",
    loss: SelectionLoss = "auto",
    gain: float = 1.0,
    generator: torch.Generator | None = None,
    gumbel: Tensor | None = None,
) -> Tensor:
    """Draw a sub-batch jointly (ACED, section 3; JEST, Algorithm 1).

    Args:
        student: the student's embeddings of the N candidates; None for `easy_reference`.
        reference: the reference's embeddings of the same candidates; None for `hard_learner`.
        size: b, number of items to draw; a multiple of `num_chunks`.
        num_chunks: n. Each chunk of b/n items is drawn conditioned on all earlier chunks.
        score: learnability (H-ACID), easy_reference (I-ACID) or hard_learner.
        loss: loss of the scores: sigmoid, softmax or auto. Auto is sigmoid if all scored models were trained with the
            sigmoid loss (`Embeddings.trained_with`), else softmax.
        gain: factor on the log-weights; larger is greedier.
        generator: source of the noise, drawn on its device; None: torch's default CPU generator.
        gumbel: [num_chunks, N] noise to replay a draw. Chunk c is the top b/n of gain * log-weights + gumbel[c] among
            the items not picked yet.

    Returns:
        int64 [size], distinct, in draw order, on the device of the embeddings. Computed in float32, or in float64 if
        an embedding is float64; autocast is ignored.

    Raises:
        CurationError: if sizes do not fit, a needed model is missing, shapes differ or values are not finite. Also if
            embeddings are not L2-normalised, or a scale is not positive or looks like a logarithm.

    Warns:
        CurationWarning: if the draw is close to random: a softmax-trained model is scored by the sigmoid loss, or the
            scores of a model hardly differ between candidates.
    """
    if num_chunks < 1 or size < 1 or size % num_chunks:
        raise CurationError(
            f"a sub-batch of {size} does not divide into {num_chunks} chunks",
            remedy="make size a positive multiple of num_chunks",
            field="num_chunks",
        )
    with _full_precision(), torch.no_grad():
        weights = _weights(student, reference, size, score, loss, gain)
        noise = _noise(weights.current(), num_chunks, generator, gumbel)
        return _draw(weights, noise, size, gain)


def select_independent(
    student: Embeddings | None,
    reference: Embeddings | None,
    *,
    size: int,
    score: Score = "learnability",
    loss: SelectionLoss = "auto",
    gain: float = 1.0,
    generator: torch.Generator | None = None,
    gumbel: Tensor | None = None,
) -> Tensor:
    """Draw a sub-batch by independent pair scores: the baseline of `select_joint` (JEST, section 3).

    Arguments, result and errors are those of `select_joint`; `gumbel` is [N] or [1, N].
    """
    if size < 1:
        raise CurationError(f"size is {size}", remedy="make size positive", field="size")
    if gumbel is not None and gumbel.ndim == 1:
        gumbel = gumbel[None]
    with _full_precision(), torch.no_grad():
        weights = _weights(student, reference, size, score, loss, gain)
        noise = _noise(weights.current(), 1, generator, gumbel)
        return _draw(weights, noise, size, gain)


def gumbel_noise(num_chunks: int, num_items: int, generator: torch.Generator | None = None) -> Tensor:
    """Standard Gumbel noise, float64 [num_chunks, num_items], on the generator's device (CPU by default).

    In float32 the largest values, which decide a draw, would be coarse and tie. The noise is computed from uniform
    numbers, so that a seed gives the same noise on every CPU.
    """
    device = generator.device if generator is not None else torch.device("cpu")
    uniform = torch.rand(num_chunks, num_items, dtype=torch.float64, generator=generator, device=device)
    return -(-uniform.clamp_min_(2.0**-54).log_()).log_()


def _weights(
    student: Embeddings | None,
    reference: Embeddings | None,
    size: int,
    score: Score,
    loss: SelectionLoss,
    gain: float,
) -> Weights:
    if not (math.isfinite(gain) and gain > 0):
        raise CurationError(f"gain is {gain}", remedy="make gain positive and finite", field="gain")
    weights = weights_of(student, reference, score, loss)
    candidates = len(weights.current())
    if size > candidates:
        raise CurationError(
            f"cannot draw a sub-batch of {size} from {candidates} candidates",
            remedy="score a larger super-batch or draw fewer",
            field="size",
        )
    if size < candidates and (doubt := doubts(weights, gain)):
        warnings.warn(f"{doubt[0]}. Remedy: {doubt[1]}", CurationWarning, stacklevel=4)
    return weights


def _noise(like: Tensor, num_chunks: int, generator: torch.Generator | None, gumbel: Tensor | None) -> Tensor:
    if gumbel is None:
        gumbel = gumbel_noise(num_chunks, len(like), generator)
    elif gumbel.shape != (num_chunks, len(like)):
        raise CurationError(
            f"the gumbel noise has shape {list(gumbel.shape)}",
            remedy=f"pass [{num_chunks}, {len(like)}]: a row per chunk, a column per candidate",
            field="gumbel",
        )
    return gumbel.to(like.device, like.dtype)


def _draw(weights: Weights, noise: Tensor, size: int, gain: float) -> Tensor:
    """int64 [size]: for each chunk, the top of gain * weights + noise among the items not picked yet."""
    picked = torch.zeros_like(weights.current(), dtype=torch.bool)
    chunks: list[Tensor] = []
    worst: list[Tensor] = []
    for row in noise:
        if chunks:
            weights.add(chunks[-1])
        keys = (gain * weights.current() + row).masked_fill_(picked, -math.inf)
        best, rows = keys.topk(size // len(noise))
        picked[rows] = True
        chunks.append(rows)
        # The minimum shows any nan or -inf of the chunk. Checking all minima at the end synchronises the device once.
        worst.append(best.min())
    if not bool((torch.stack(worst) > -math.inf).all()):
        raise CurationError(
            "an item of the draw has a non-finite weight",
            remedy="check the gumbel noise, and the models' scales: a log-weight overflowed",
            field="gumbel",
        )
    return torch.cat(chunks)


@contextmanager
def _full_precision() -> Iterator[None]:
    """Disable autocast and TF32 or bfloat16 matrix products: a score is a difference of large sums."""
    on_cpu = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # missing in the type stubs
    switches = (torch.backends.cuda.matmul, on_cpu)
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value
