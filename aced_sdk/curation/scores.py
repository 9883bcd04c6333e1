# SPDX-License-Identifier: Apache-2.0
"""Log-weights of the candidates of a super-batch, given what has been picked so far.

A score is a sum of losses, each with a sign: learnability is student minus reference, easy reference is minus the
reference, hard learner is the student alone (ACED, arXiv 2411.18674, section 3; JEST, arXiv 2406.17711, section 3).
The N x N matrix of pair losses is never built: a running vector takes up two slabs [K, N] for each K newly picked
items, and the slabs themselves are computed a few columns at a time.

Shape suffixes: N candidates, K newly picked items, D embedding dimension.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from aced_sdk.config import LossForm, Score, SelectionLoss
from aced_sdk.errors import CurationError
from aced_sdk.towers.embeddings import Embeddings

# Elements of one slab: in float32 1 MiB on a CPU, to stay in its caches, and 256 MiB on a GPU, to fill it.
_CPU_SLAB = 2**18
_GPU_SLAB = 2**26
_LEAST_LINES = 64
FLAT = 0.02  # of gain times a score's standard deviation: below it selection is close to random
# Rows looked at together where a whole pool, perhaps memory-mapped, goes by.
ROWS_AT_ONCE = 65_536


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), exact to the last bits of float64 (torch's default turns linear at 20, an error of 2e-9)."""
    return F.softplus(x, threshold=40.0)


def _softplus_(x: Tensor, bound: float) -> Tensor:
    """softplus(x), which may take the place of x. On a CPU two vectorised passes are faster than the fused function.

    Nothing in x is larger than `bound`.
    """
    if x.is_cuda or (bound > 80.0 and float(x.max()) > 80.0):  # exp overflows float32 at 88
        return softplus(x)
    return x.exp_().log1p_()


def number(value: float | Tensor) -> float:
    """A scale or bias as a float, learned or not."""
    return float(value.detach().item()) if isinstance(value, Tensor) else float(value)


@dataclass(frozen=True, eq=False)
class Term:
    """One model's loss inside a score, counted with `sign`."""

    name: str
    trained_with: LossForm
    sign: float
    image_ND: Tensor
    text_ND: Tensor
    scale: float
    bias: float

    def diagonal(self) -> Tensor:
        """scale * <image_i, text_i>, without the bias, [N]."""
        rows = self._lines(self.image_ND.shape[1])
        parts = zip(torch.split(self.image_ND, rows), torch.split(self.text_ND, rows), strict=True)
        return self.scale * torch.cat([(images * texts).sum(dim=1) for images, texts in parts])

    def slabs(self, rows_K: Tensor) -> Iterator[tuple[int, slice, Tensor]]:
        """Similarities (scaled, without the bias) of the picked rows with all N candidates, a few candidates at a time.

        Yields (0, candidates, picked images x their texts) and (1, candidates, picked texts x their images),
        each [K, candidates].
        """
        step = self._lines(len(rows_K))
        for direction, (ours, others) in enumerate(((self.image_ND, self.text_ND), (self.text_ND, self.image_ND))):
            picked_KD = self.scale * ours[rows_K]
            for start in range(0, len(others), step):
                candidates = slice(start, start + step)
                yield direction, candidates, picked_KD @ others[candidates].T

    def _lines(self, length: int) -> int:
        """How many lines of some length make a slab."""
        return max(_LEAST_LINES, (_GPU_SLAB if self.image_ND.is_cuda else _CPU_SLAB) // length)


class Weights(Protocol):
    """Log-weights of the candidates, given the picked set."""

    loss: LossForm
    spreads: Tensor
    """[M] standard deviation, over the candidates, of each model's own pair loss."""
    models: tuple[tuple[str, LossForm], ...]
    """Name of each model and the loss it was trained with, in the order of `spreads`."""

    def current(self) -> Tensor:
        """[N] log-weights given everything added so far. Entries of picked items mean nothing."""

    def add(self, rows_K: Tensor) -> None:
        """Take int64 [K] newly picked items into account."""


class SigmoidWeights:
    """The marginal change of the summed sigmoid loss when a candidate joins the picked set (JEST, Algorithm 1).

    Pair loss l_ij = softplus(-z_ij (scale <img_i, txt_j> + bias)), z = 1 on the diagonal and -1 elsewhere;
    weight_i = S_ii + sum over picked k of (S_ik + S_ki), with S the signed sum of the models' l.
    """

    loss: LossForm = "sigmoid"

    def __init__(self, terms: list[Term]) -> None:
        self._terms = terms
        self.models = tuple((term.name, term.trained_with) for term in terms)
        own_MN = torch.stack([term.sign * softplus(-(term.diagonal() + term.bias)) for term in terms])
        self.spreads = own_MN.std(dim=1, correction=0)
        self._weights = own_MN.sum(dim=0)

    def current(self) -> Tensor:
        return self._weights

    def add(self, rows_K: Tensor) -> None:
        for term in self._terms:
            bound = 1.1 * term.scale + term.bias  # `check` lets no embedding be longer than 1.04
            for _, candidates, slab in term.slabs(rows_K):
                self._weights[candidates].add_(_softplus_(slab.add_(term.bias), bound).sum(dim=0), alpha=term.sign)


class SoftmaxWeights:
    """The candidate's softmax loss with the partition taken over the picked set.

    weight_i = signed sum over models of -t s_ii + (LSE_k t s_ik + LSE_k t s_ki) / 2, k over the picked; before anything
    is picked only the first term is used. The bias cancels in a softmax and is not read.
    """

    loss: LossForm = "softmax"

    def __init__(self, terms: list[Term]) -> None:
        self._terms = terms
        self.models = tuple((term.name, term.trained_with) for term in terms)
        own_MN = torch.stack([-term.sign * term.diagonal() for term in terms])
        self.spreads = own_MN.std(dim=1, correction=0)
        self._diagonal = own_MN.sum(dim=0)
        self._partitions = [self._diagonal.new_full((2, len(self._diagonal)), -math.inf) for _ in terms]
        self._empty = True

    def current(self) -> Tensor:
        if self._empty:
            return self._diagonal
        halves = [0.5 * term.sign * part.sum(dim=0) for term, part in zip(self._terms, self._partitions, strict=True)]
        return self._diagonal + torch.stack(halves).sum(dim=0)

    def add(self, rows_K: Tensor) -> None:
        self._empty = False
        for term, partition in zip(self._terms, self._partitions, strict=True):
            for direction, candidates, slab in term.slabs(rows_K):
                part = partition[direction, candidates]
                torch.logaddexp(part, slab.logsumexp(dim=0), out=part)


def weights_of(student: Embeddings | None, reference: Embeddings | None, score: Score, loss: SelectionLoss) -> Weights:
    """The running log-weights for a score before the first pick.

    They are kept in float32, or in float64 if any embedding is float64.

    Raises:
        CurationError: if a model that the score needs is missing, shapes or devices differ, or `check` refuses it.
    """
    needed: list[tuple[str, float, Embeddings | None]]
    if score == "learnability":
        needed = [("student", 1.0, student), ("reference", -1.0, reference)]
    elif score == "easy_reference":
        needed = [("reference", -1.0, reference)]
    elif score == "hard_learner":
        needed = [("student", 1.0, student)]
    else:
        raise CurationError(
            f"unknown score {score!r}", remedy="use learnability, easy_reference or hard_learner", field="score"
        )
    form = loss_form(loss, *(embeddings for _, _, embeddings in needed if embeddings is not None))
    models: list[tuple[str, float, Embeddings]] = []
    for name, sign, embeddings in needed:
        if embeddings is None:
            raise CurationError(
                f"the score {score!r} needs the {name}'s embeddings", remedy=f"pass {name}=Embeddings(...)", field=name
            )
        check(name, embeddings, form)
        models.append((name, sign, embeddings))
    _check_alike(models)
    wide = any(side.dtype == torch.float64 for _, _, model in models for side in (model.image, model.text))
    dtype = torch.float64 if wide else torch.float32
    terms = [
        Term(
            name,
            trained_with(model),
            sign,
            model.image.to(dtype),
            model.text.to(dtype),
            number(model.scale),
            number(model.bias),
        )
        for name, sign, model in models
    ]
    return SigmoidWeights(terms) if form == "sigmoid" else SoftmaxWeights(terms)


def loss_form(loss: SelectionLoss, *models: Embeddings) -> LossForm:
    """The form of the loss to score with.

    "auto" is "sigmoid" if every model was trained with the sigmoid loss, else "softmax": the sigmoid loss of a
    softmax-trained model saturates, and selection by it is close to random.

    Raises:
        CurationError: if the loss is unknown.
    """
    if loss == "auto":
        return "sigmoid" if models and all(trained_with(model) == "sigmoid" for model in models) else "softmax"
    if loss not in ("sigmoid", "softmax"):
        raise CurationError(f"unknown loss {loss!r}", remedy="use auto, sigmoid or softmax", field="loss")
    return loss


def trained_with(model: Embeddings) -> LossForm:
    """The loss that a model was trained with; where the embeddings do not say, a bias means sigmoid."""
    return model.trained_with or ("sigmoid" if number(model.bias) else "softmax")


def doubts(weights: Weights, gain: float) -> tuple[str, str] | None:
    """Cause and remedy if selection by these weights is close to random.

    That is so if a softmax-trained model is scored by the sigmoid loss, which saturates, or if a frozen model's pair
    losses hardly differ: a draw adds Gumbel noise of standard deviation 1.28 to gain * score. A student in training is
    not looked at beside a reference, since a new one scores all pairs alike.
    """
    for (name, loss), spread in zip(weights.models, weights.spreads.tolist(), strict=True):
        if (weights.loss, loss) == ("sigmoid", "softmax"):
            return (
                f"the {name} was trained with the softmax loss, and its sigmoid loss saturates: "
                "selection by it is close to random",
                'use loss="auto" or "softmax"; set Embeddings.trained_with if the model was trained with sigmoid',
            )
        if gain * spread < FLAT and (name == "reference" or len(weights.models) == 1):
            return (
                f"the {name}'s scores hardly differ between pairs (standard deviation {spread:.2g}): "
                "selection by them is close to random",
                f"check the {name}, or raise gain",
            )
    return None


def check(name: str, embeddings: Embeddings, loss: LossForm) -> None:
    """Refuse embeddings that cannot be scored.

    Raises:
        CurationError: if image and text are not both tensors [N, D] with N > 0, a value is not finite, a row is not of
            unit length, or the scale is no factor on cosine similarities.
    """
    image, text = embeddings.image, embeddings.text
    for side, value in (("image", image), ("text", text)):
        if not isinstance(value, Tensor):
            raise CurationError(
                f"the {name}'s {side} embeddings are {type(value).__name__}, not a tensor",
                remedy="give image and text embeddings of the same pairs as tensors [N, D]",
                field=name,
            )
    if image.ndim != 2 or image.shape != text.shape or len(image) == 0:
        raise CurationError(
            f"the {name}'s image and text embeddings have shapes {list(image.shape)} and {list(text.shape)}",
            remedy="give both as [N, D], row i of the text belonging to image i",
            field=name,
        )
    _check_scale(name, number(embeddings.scale), number(embeddings.bias), loss)
    norms_2N = torch.stack([_norms(image), _norms(text)])
    bad = int((~torch.isfinite(norms_2N)).any(dim=0).sum())
    if bad:
        raise CurationError(
            f"{bad} of {len(image)} rows of the {name}'s embeddings are not finite",
            remedy="leave these pairs out, or check the model that embedded them (overflow in half precision?)",
            field=name,
        )
    worst = float(norms_2N.flatten()[(norms_2N - 1).abs().argmax()])
    # 16 bits round every entry by up to 0.4 %, and models normalise in 16 bits too.
    if abs(worst - 1) > (0.04 if min(image.dtype.itemsize, text.dtype.itemsize) < 4 else 0.02):
        raise CurationError(
            f"the {name}'s embeddings are not L2-normalised: a row has length {worst:.4g}",
            remedy="pass them through torch.nn.functional.normalize(..., dim=-1)",
            field=name,
        )


def _norms(side_ND: Tensor) -> Tensor:
    """Length of each row, at least float32 [N]."""
    wide = torch.promote_types(side_ND.dtype, torch.float32)
    blocks = torch.split(side_ND.detach(), ROWS_AT_ONCE)
    return torch.cat([torch.linalg.vector_norm(block, dim=1, dtype=wide) for block in blocks])


def _check_scale(name: str, scale: float, bias: float, loss: LossForm) -> None:
    if not (math.isfinite(scale) and math.isfinite(bias)):
        raise CurationError(
            f"the {name}'s scale or bias is not finite ({scale}, {bias})",
            remedy="check the model: its learned temperature has diverged",
            field=name,
        )
    if scale <= 0:
        raise CurationError(
            f"the {name}'s scale is {scale:.4g}",
            remedy="pass the positive factor on cosine similarities; of a learned logarithm, exp(log_scale)",
            field=name,
        )
    # Logarithms of the usual scales, 10 to 1000, lie below 7. A model in training may well hold all its logits down for
    # a while, but not with so small a scale.
    if loss == "sigmoid" and scale < 7 and scale + bias < -5:
        raise CurationError(
            f"the {name}'s scale of {scale:.4g} with a bias of {bias:.4g} looks like a logarithm: "
            f"not even identical embeddings would match (a logit of {scale + bias:.4g})",
            remedy="pass exp(log_scale), the factor on cosine similarities",
            field=name,
        )


def _check_alike(models: list[tuple[str, float, Embeddings]]) -> None:
    first_name, _, first = models[0]
    for name, _, other in models[1:]:
        if len(other) != len(first):
            raise CurationError(
                f"the {first_name} embeds {len(first)} pairs and the {name} {len(other)}",
                remedy="pass both models' embeddings of the same pairs, in the same order",
                field=name,
            )
        if other.image.device != first.image.device:
            raise CurationError(
                f"the {first_name} is on {first.image.device} and the {name} on {other.image.device}",
                remedy="move both to one device",
                field=name,
            )
