# SPDX-License-Identifier: Apache-2.0
"""Loss and gradient of a step, for the whole batch or in micro-batches (GradCache, arXiv 2101.06983).

Contrastive and distillation losses depend on all pairs of a batch, so the gradients of micro-batches cannot simply be
added. With `engine.micro_batch` the exact gradient is computed in three steps:

1. Embed all pairs without gradient, one micro-batch at a time.
2. Compute the objective on these embeddings, and the gradients of embeddings, scale and bias.
3. Embed each micro-batch again, with gradient and the same dropout noise. Backpropagate the inner product of its
   embeddings and their gradients.

This costs one more forward pass. If the selection has scored the same pairs with the same weights, step 1 is skipped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from aced_sdk.config import DistillConfig
from aced_sdk.data import SuperBatch
from aced_sdk.engine import TrainingEngine
from aced_sdk.errors import ConfigError
from aced_sdk.objectives import LossTerms, WeightedLosses
from aced_sdk.towers import Embeddings
from aced_sdk.training.progress import noise_state, set_noise_state
from aced_sdk.training.scoring import cheap_places, shrunk

_Out = tuple[Tensor, Tensor, Tensor, Tensor]  # image [m, D], text [m, D], scale [], bias []
_Pieces = list[tuple[Tensor, int | None]]  # indices in the batch (int64 [m]) and picture size; None: the student's


@dataclass(frozen=True, eq=False)
class Gradient:
    """The loss of a step whose gradient is in the engine.

    Attributes:
        loss: the total loss.
        parts: the unweighted loss of each term by name.
        student: the student's embeddings of the pairs, without gradient.
    """

    loss: float
    parts: dict[str, float]
    student: Embeddings


def learn(
    config: DistillConfig,
    engine: TrainingEngine,
    objective: WeightedLosses,
    batch: SuperBatch,
    teachers: Sequence[Embeddings],
    known: Embeddings | None = None,
) -> Gradient:
    """Compute the loss and add its gradient to the engine; a non-finite loss adds none.

    Args:
        config: batch sizes and picture sizes.
        engine: embeds pairs with its module.
        objective: the loss.
        batch: the b pairs of the sub-batch, then b of the second batch if terms use one.
        teachers: the teachers' embeddings of the same pairs, by index.
        known: the student's embeddings of the same pairs at the current weights; replaces the first pass over
            micro-batches.
    """
    pieces = _pieces(config, len(batch))
    if config.engine.micro_batch is None:
        student = _joined([_embed(engine, batch, *piece) for piece in pieces], pieces)
        terms = _terms(config, objective, batch, student, teachers)
        if math.isfinite(loss := float(terms.total.detach())):
            engine.backward(terms.total)
    else:
        noise: list[dict[str, Tensor]] = []
        if known is None:
            known, noise = _first_pass(engine, batch, pieces)
        leaves = _leaves(known)
        image, text, scale_leaf, bias_leaf = leaves
        student = Embeddings(image, text, scale_leaf, bias_leaf)
        terms = _terms(config, objective, batch, student, teachers)
        if math.isfinite(loss := float(terms.total.detach())):
            gradients = torch.autograd.grad(terms.total, leaves, materialize_grads=True)
            _second_pass(engine, batch, pieces, noise, gradients)
    parts = {name: float(value) for name, value in terms.parts.items()}
    scale, bias = (float(torch.as_tensor(value).detach()) for value in (student.scale, student.bias))
    return Gradient(loss, parts, Embeddings(student.image.detach(), student.text.detach(), scale, bias))


def can_accumulate(config: DistillConfig, module: nn.Module) -> None:
    """Check that micro-batches give the gradient of the whole batch.

    Raises:
        ConfigError: if micro-batches are set and the module has batch norm, whose statistics depend on the batch.
    """
    kinds = [type(part).__name__ for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    if config.engine.micro_batch is not None and kinds:
        raise ConfigError(
            f"the student has {len(kinds)} batch norms ({kinds[0]} first), whose statistics in training are those of a "
            "micro-batch: the gradient would not be that of the sub-batch",
            remedy="leave micro_batch out, or use a student without batch norm",
            field="engine.micro_batch",
        )


@torch.no_grad()
def is_quiet(engine: TrainingEngine, batch: SuperBatch) -> bool:
    """Whether training mode is deterministic (no dropout or stochastic depth): run two pairs, compare generators."""
    before = noise_state(engine.device)
    engine.forward(batch.images[:2].to(engine.device), batch.tokens[:2].to(engine.device))
    after = noise_state(engine.device)
    set_noise_state(before, engine.device)
    return all(torch.equal(state, after[name]) for name, state in before.items())


def _pieces(config: DistillConfig, pairs: int) -> _Pieces:
    """Split a batch into forward passes: pairs of one picture size, at most a micro-batch."""
    places, cheap = torch.arange(pairs), cheap_places(config.curation, pairs)
    by_size = ((places[~cheap], None), (places[cheap], config.curation.scoring_side))
    step = config.engine.micro_batch or pairs
    return [(piece, size) for of_size, size in by_size for piece in torch.split(of_size, step) if len(piece)]


@torch.no_grad()
def _first_pass(
    engine: TrainingEngine, batch: SuperBatch, pieces: _Pieces
) -> tuple[Embeddings, list[dict[str, Tensor]]]:
    """Embed all pairs; also return the state of the generators before each piece."""
    outs, noise = [], []
    for piece in pieces:
        noise.append(noise_state(engine.device))
        outs.append(_embed(engine, batch, *piece))
    return _joined(outs, pieces), noise


def _second_pass(
    engine: TrainingEngine,
    batch: SuperBatch,
    pieces: _Pieces,
    noise: Sequence[dict[str, Tensor]],
    gradients: Sequence[Tensor],
) -> None:
    """Backpropagate the gradients of embeddings, scale and bias to the weights, one piece at a time."""
    for number, (places, size) in enumerate(pieces):
        if noise:
            set_noise_state(noise[number], engine.device)
        out, last = _embed(engine, batch, places, size), number == len(pieces) - 1
        at = places.to(engine.device)
        inner = [(out[side] * gradients[side][at]).sum() for side in (0, 1)]
        # Scale and bias go into the first backward: ZeRO stage 3 clears its gradient buffers there and adds later ones.
        inner += [out[side] * gradients[side] for side in (2, 3) if number == 0]
        engine.backward(torch.stack([part.reshape(()) for part in inner]).sum(), last=last)


def _leaves(known: Embeddings) -> list[Tensor]:
    """Image, text, scale and bias as leaf tensors with `requires_grad`."""
    values, like = (known.image, known.text, known.scale, known.bias), known.image
    tensors = [torch.as_tensor(value, dtype=like.dtype, device=like.device) for value in values]
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def _embed(engine: TrainingEngine, batch: SuperBatch, places: Tensor, size: int | None) -> _Out:
    images, tokens = batch.images[places].to(engine.device), batch.tokens[places].to(engine.device)
    out: _Out = engine.forward(shrunk(images, size), tokens)
    return out


def _joined(outs: Sequence[_Out], pieces: _Pieces) -> Embeddings:
    """Concatenate the embeddings of the pieces in batch order."""
    image, text, scale, bias = outs[0]
    if len(outs) > 1:
        order = torch.cat([places for places, _ in pieces]).argsort().to(image.device)
        image, text = (torch.cat([out[side] for out in outs])[order] for side in (0, 1))
    return Embeddings(image, text, scale, bias)


def _terms(
    config: DistillConfig,
    objective: WeightedLosses,
    batch: SuperBatch,
    student: Embeddings,
    teachers: Sequence[Embeddings],
) -> LossTerms:
    """Compute all terms: those of the sub-batch on the first b pairs, those of the second batch on the next b."""
    size, captions = config.curation.sub_batch, None
    if config.objective.contrastive.repeated != "negatives":
        captions = torch.unique(batch.tokens[:size], dim=0, return_inverse=True)[1].to(student.image.device)
    own, *second = _split(student, size)
    taught = [_split(teacher, size) for teacher in teachers]
    terms = objective(own, [parts[0] for parts in taught], captions=captions)
    for pairs in second:
        more = objective(pairs, [parts[1] for parts in taught], batch="iid")
        terms = LossTerms(terms.total + more.total, terms.parts | more.parts)
    return terms


def _split(embeddings: Embeddings, size: int) -> list[Embeddings]:
    sides = zip(torch.split(embeddings.image, size), torch.split(embeddings.text, size), strict=True)
    return [replace(embeddings, image=image, text=text) for image, text in sides]
