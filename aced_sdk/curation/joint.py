# SPDX-License-Identifier: Apache-2.0
"""The joint sampler (JEST, arXiv 2406.17711, Algorithm 1) in a streaming form, and its independent baseline.

A chunk is drawn without replacement from softmax(gain * log-weights) by the Gumbel-top-k trick. Beyond the embeddings,
memory is the noise [num_chunks, N] and a block of bounded size, never N x N; each pair's logit is computed once.
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
    """Draw a sub-batch whose items are chosen together (ACED, section 3; JEST, Algorithm 1).

    Args:
        student: embeddings of the N candidates by the model in training; None for `easy_reference`.
        reference: embeddings of the same candidates by the frozen reference; None for `hard_learner`.
        size: b, items to draw; a multiple of `num_chunks`.
        num_chunks: n; chunks after the first are drawn given everything picked before them.
        score: learnability (H-ACID), easy_reference (I-ACID) or hard_learner.
        loss: form of the loss in the scores: sigmoid, softmax, or auto, which is sigmoid if every model that is scored
            was trained with the sigmoid loss (`Embeddings.trained_with`), else softmax.
        gain: factor on the log-weights; larger is greedier.
        generator: source of the noise, drawn on its own device; None: torch's default CPU generator.
        gumbel: [num_chunks, N] noise to replay a draw: chunk c takes the top b/n of gain * logits + gumbel[c] among
            items not yet picked.

    Returns:
        int64 [size], distinct, in the order drawn, on the device of the embeddings. Arithmetic is float32 whatever the
        input and autocast say, float64 if an embedding is float64.

    Raises:
        CurationError: if sizes do not fit, a needed model is missing, shapes differ, a value is not finite, embeddings
            are not L2-normalised, or a scale is not positive or evidently a logarithm.

    Warns:
        CurationWarning: if the draw is close to random: a softmax-trained model is scored by the sigmoid loss, or a
            model's scores hardly differ between candidates.
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
    """Draw a sub-batch by each item's own pair loss alone: the baseline of `select_joint` (JEST, section 3).

    Arguments, result and errors as in `select_joint`; `gumbel` is [N] or [1, N].
    """
    if size < 1:
        raise CurationError(f"a sub-batch of {size}", remedy="make size positive", field="size")
    if gumbel is not None and gumbel.ndim == 1:
        gumbel = gumbel[None]
    with _full_precision(), torch.no_grad():
        weights = _weights(student, reference, size, score, loss, gain)
        noise = _noise(weights.current(), 1, generator, gumbel)
        return _draw(weights, noise, size, gain)


def gumbel_noise(num_chunks: int, num_items: int, generator: torch.Generator | None = None) -> Tensor:
    """Standard Gumbel noise, float64 [num_chunks, num_items], on the generator's device (CPU by default).

    It is drawn in float64 so that the largest values, which decide a draw, do not fall on a coarse grid and tie, and
    from uniforms so that a seed gives the same noise on every CPU.
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
        raise CurationError(f"a gain of {gain}", remedy="make gain positive and finite", field="gain")
    weights = weights_of(student, reference, score, loss)
    candidates = len(weights.current())
    if size > candidates:
        raise CurationError(
            f"a sub-batch of {size} was asked of {candidates} candidates",
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
            remedy=f"give [{num_chunks}, {len(like)}]: a row for each chunk, a column for each candidate",
            field="gumbel",
        )
    return gumbel.to(like.device, like.dtype)


def _draw(weights: Weights, noise: Tensor, size: int, gain: float) -> Tensor:
    """int64 [size]: chunk by chunk the top of gain * weights + noise among the items not yet picked."""
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
        # Ascending nan or -inf anywhere in the chunk shows in its minimum, and one look at the end waits for the
        # device once instead of once a chunk.
        worst.append(best.min())
    if not bool((torch.stack(worst) > -math.inf).all()):
        raise CurationError(
            "the draw met an item without a finite weight",
            remedy="check the noise given as gumbel, and the models' scales: a log-weight overflowed",
            field="gumbel",
        )
    return torch.cat(chunks)


@contextmanager
def _full_precision() -> Iterator[None]:
    """No autocast and no TF32 or bfloat16 matrix products: a score is a difference of large sums."""
    on_cpu = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # set at run time, unknown to the stubs
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
