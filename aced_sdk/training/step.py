# SPDX-License-Identifier: Apache-2.0
"""One step's loss and gradient, of the whole batch at once or in micro-batches (GradCache, arXiv 2101.06983).

Contrastive and distillation losses join all pairs of a batch, so that gradients of smaller batches do not add up to
that of the batch. But the loss reaches the towers only through b small embeddings. So with `engine.micro_batch`:

1. all pairs are embedded without gradient, a micro-batch at a time;
2. the objective on these embeddings gives their gradients (and those of scale and bias);
3. each micro-batch is embedded again, with gradient and with the same dropout noise, and the inner product of its
   embeddings with their gradients is what goes backward.

The sum over micro-batches is the gradient of the whole batch, for every objective. The price is one more forward pass;
it is spared where the selection has just scored the same pairs with the same weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from aced_sdk.config import DistillConfig
from aced_sdk.data import SuperBatch
from aced_sdk.engine import Engine
from aced_sdk.errors import ConfigError
from aced_sdk.objectives import LossTerms, Objective
from aced_sdk.towers import Embeddings
from aced_sdk.training.progress import noise_state, set_noise_state
from aced_sdk.training.scoring import cheap_places, shrunk

_Out = tuple[Tensor, Tensor, Tensor, Tensor]  # image [m, D], text [m, D], scale [], bias []
_Pieces = list[tuple[Tensor, int | None]]  # places in the batch (int64 [m]) and the pictures' size; None: their own


@dataclass(frozen=True, eq=False)
class Gradient:
    """A step's loss, whose gradient is in the engine.

    Attributes:
        loss: the objective's total.
        parts: its named terms, unweighted.
        student: the student's embeddings of the pairs, without gradient.
    """

    loss: float
    parts: dict[str, float]
    student: Embeddings


def learn(
    config: DistillConfig,
    engine: Engine,
    objective: Objective,
    batch: SuperBatch,
    teachers: Sequence[Embeddings],
    known: Embeddings | None = None,
) -> Gradient:
    """Bring the gradient of the objective into the engine; a loss that is not finite brings none.

    Args:
        config: sizes of batches, and at which size pictures are trained.
        engine: its module embeds pairs.
        objective: what to learn.
        batch: the sub-batch's b pairs; b more where terms have a second batch.
        teachers: embeddings of the same pairs, in the numbering of the objective's terms.
        known: the student's embeddings of the same pairs at the present weights, to be used instead of the first pass
            over micro-batches.
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
    """Refuse micro-batches where they would not give the gradient of the whole batch.

    Raises:
        ConfigError: if the module normalises by statistics of the batch, which differ for every micro-batch.
    """
    kinds = [type(part).__name__ for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    if config.engine.micro_batch is not None and kinds:
        raise ConfigError(
            f"the student has {len(kinds)} batch norms ({kinds[0]} first), whose statistics in training are those of a "
            "micro-batch: the gradient would not be that of the sub-batch",
            remedy="leave micro_batch out, or take a student without batch norm",
            field="engine.micro_batch",
        )


@torch.no_grad()
def is_quiet(engine: Engine, batch: SuperBatch) -> bool:
    """Whether training mode draws no noise (dropout, stochastic depth): asked of the module itself, with two pairs."""
    before = noise_state(engine.device)
    engine.forward(batch.images[:2].to(engine.device), batch.tokens[:2].to(engine.device))
    after = noise_state(engine.device)
    set_noise_state(before, engine.device)
    return all(torch.equal(state, after[name]) for name, state in before.items())


def _pieces(config: DistillConfig, pairs: int) -> _Pieces:
    """What goes through the towers together: pairs of one size, a micro-batch at most."""
    places, cheap = torch.arange(pairs), cheap_places(config.curation, pairs)
    by_size = ((places[~cheap], None), (places[cheap], config.curation.scoring_side))
    step = config.engine.micro_batch or pairs
    return [(piece, size) for of_size, size in by_size for piece in torch.split(of_size, step) if len(piece)]


@torch.no_grad()
def _first_pass(engine: Engine, batch: SuperBatch, pieces: _Pieces) -> tuple[Embeddings, list[dict[str, Tensor]]]:
    """All embeddings, and the state of the generators before each piece."""
    outs, noise = [], []
    for piece in pieces:
        noise.append(noise_state(engine.device))
        outs.append(_embed(engine, batch, *piece))
    return _joined(outs, pieces), noise


def _second_pass(
    engine: Engine,
    batch: SuperBatch,
    pieces: _Pieces,
    noise: Sequence[dict[str, Tensor]],
    gradients: Sequence[Tensor],
) -> None:
    """Take the gradients of image and text embeddings, scale and bias on to the weights, a piece at a time."""
    for number, (places, size) in enumerate(pieces):
        if noise:
            set_noise_state(noise[number], engine.device)
        out, last = _embed(engine, batch, places, size), number == len(pieces) - 1
        at = places.to(engine.device)
        inner = [(out[side] * gradients[side][at]).sum() for side in (0, 1)]
        # Once for all pieces, in the first backward: ZeRO stage 3 clears a buffer there, and adds to it afterwards.
        inner += [out[side] * gradients[side] for side in (2, 3) if number == 0]
        engine.backward(torch.stack([part.reshape(()) for part in inner]).sum(), last=last)


def _leaves(known: Embeddings) -> list[Tensor]:
    """Image, text, scale and bias as tensors of one kind that want gradients."""
    values, like = (known.image, known.text, known.scale, known.bias), known.image
    tensors = [torch.as_tensor(value, dtype=like.dtype, device=like.device) for value in values]
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def _embed(engine: Engine, batch: SuperBatch, places: Tensor, size: int | None) -> _Out:
    images, tokens = batch.images[places].to(engine.device), batch.tokens[places].to(engine.device)
    out: _Out = engine.forward(shrunk(images, size), tokens)
    return out


def _joined(outs: Sequence[_Out], pieces: _Pieces) -> Embeddings:
    """The pieces' embeddings in the batch's order."""
    image, text, scale, bias = outs[0]
    if len(outs) > 1:
        order = torch.cat([places for places, _ in pieces]).argsort().to(image.device)
        image, text = (torch.cat([out[side] for out in outs])[order] for side in (0, 1))
    return Embeddings(image, text, scale, bias)


def _terms(
    config: DistillConfig, objective: Objective, batch: SuperBatch, student: Embeddings, teachers: Sequence[Embeddings]
) -> LossTerms:
    """The objective's terms, each on its batch: the first b pairs, or the b that follow."""
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
