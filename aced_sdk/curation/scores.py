# SPDX-License-Identifier: Apache-2.0
"""Log-weights of the candidates of a super-batch, given the items picked so far.

A score is a signed sum of losses: learnability is student - reference, easy reference is - reference, hard learner is
the student's loss (ACED, arXiv 2411.18674, section 3; JEST, arXiv 2406.17711, section 3).
The N x N matrix of pair losses is not built. For K newly picked items, two slabs [K, N] are added to a running vector;
slabs are computed a few columns at a time.

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

# Elements of a slab. In float32: 1 MiB on a CPU, which fits its caches; 256 MiB on a GPU, which keeps it busy.
_CPU_SLAB = 2**18
_GPU_SLAB = 2**26
_LEAST_LINES = 64
FLAT = 0.02  # selection is close to random if gain times the scores' standard deviation is below
# Rows per block when all embeddings of a pool, possibly memory-mapped, are read.
ROWS_AT_ONCE = 65_536


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), exact in float64. Torch's default is linear above 20, with an error of 2e-9."""
    return F.softplus(x, threshold=40.0)


def _softplus_(x: Tensor, bound: float) -> Tensor:
    """softplus(x), possibly in place; no value of x is larger than `bound`.

    On a CPU two vectorised passes are faster than the fused function.
    """
    if x.is_cuda or (bound > 80.0 and float(x.max()) > 80.0):  # exp overflows float32 at 88
        return softplus(x)
    return x.exp_().log1p_()


def number(value: float | Tensor) -> float:
    """A scale or bias as a float."""
    return float(value.detach().item()) if isinstance(value, Tensor) else float(value)


@dataclass(frozen=True, eq=False)
class Term:
    """The loss of one model in a score, with its `sign`."""

    name: str
    trained_with: LossForm
    sign: float
    image_ND: Tensor
    text_ND: Tensor
    scale: float
    bias: float

    def diagonal(self) -> Tensor:
        """[N] scale * <image_i, text_i>, without the bias."""
        rows = self._lines(self.image_ND.shape[1])
        parts = zip(torch.split(self.image_ND, rows), torch.split(self.text_ND, rows), strict=True)
        return self.scale * torch.cat([(images * texts).sum(dim=1) for images, texts in parts])

    def slabs(self, rows_K: Tensor) -> Iterator[tuple[int, slice, Tensor]]:
        """Scaled similarities (without the bias) of the picked rows with all N candidates, in blocks of candidates.

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
        """Lines per slab, for lines of this length."""
        return max(_LEAST_LINES, (_GPU_SLAB if self.image_ND.is_cuda else _CPU_SLAB) // length)


class Weights(Protocol):
    """Log-weights of the candidates, given the picked set."""

    loss: LossForm
    spreads: Tensor
    """[M] standard deviation over the candidates of each model's diagonal pair loss."""
    models: tuple[tuple[str, LossForm], ...]
    """Name and training loss of each model, in the order of `spreads`."""

    def current(self) -> Tensor:
        """[N] log-weights given all items added so far. Entries of picked items are undefined."""

    def add(self, rows_K: Tensor) -> None:
        """Add newly picked items, int64 [K]."""


class SigmoidWeights:
    """The change of the summed sigmoid loss when a candidate is added to the picked set (JEST, Algorithm 1).

    Pair loss l_ij = softplus(-z_ij (scale <img_i, txt_j> + bias)), with z = 1 on the diagonal and -1 elsewhere.
    weight_i = S_ii + sum over picked k of (S_ik + S_ki), where S is the signed sum of the models' l.
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
            bound = 1.1 * term.scale + term.bias  # `check` refuses embeddings longer than 1.04
            for _, candidates, slab in term.slabs(rows_K):
                self._weights[candidates].add_(_softplus_(slab.add_(term.bias), bound).sum(dim=0), alpha=term.sign)


class SoftmaxWeights:
    """The softmax loss of a candidate, with the partition over the picked set.

    weight_i = signed sum over models of -t s_ii + (LSE_k t s_ik + LSE_k t s_ki) / 2, with k over the picked items.
    Before the first pick, only the first term is used. The bias cancels in a softmax and is not used.
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
    """Return the log-weights of a score before the first pick, in float32, or in float64 if an embedding is.

    Raises:
        CurationError: if a model is missing, lengths or devices differ, or `check` refuses the embeddings.
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
    """Resolve the loss of the scores.

    "auto" is "sigmoid" if all models were trained with the sigmoid loss, else "softmax". The sigmoid loss of a
    softmax-trained model saturates, so selection by it is close to random.

    Raises:
        CurationError: if the loss is unknown.
    """
    if loss == "auto":
        return "sigmoid" if models and all(trained_with(model) == "sigmoid" for model in models) else "softmax"
    if loss not in ("sigmoid", "softmax"):
        raise CurationError(f"unknown loss {loss!r}", remedy="use auto, sigmoid or softmax", field="loss")
    return loss


def trained_with(model: Embeddings) -> LossForm:
    """The loss a model was trained with; if unknown, sigmoid if it has a bias, else softmax."""
    return model.trained_with or ("sigmoid" if number(model.bias) else "softmax")


def doubts(weights: Weights, gain: float) -> tuple[str, str] | None:
    """Return cause and remedy if selection by these weights is close to random.

    There are two causes. The sigmoid loss of a softmax-trained model saturates. Or the pair losses of the reference
    hardly differ compared with the Gumbel noise, whose standard deviation is 1.28. The student's losses are checked
    only without a reference, because a new student scores all pairs alike.
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
        CurationError: if image and text are not tensors [N, D] with N > 0, or a value is not finite. Also if a row
            does not have unit length, or the scale is not positive or looks like a logarithm.
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
    # In 16 bits each value is rounded by up to 0.4 %, and models also normalise in 16 bits.
    if abs(worst - 1) > (0.04 if min(image.dtype.itemsize, text.dtype.itemsize) < 4 else 0.02):
        raise CurationError(
            f"the {name}'s embeddings are not L2-normalised: a row has length {worst:.4g}",
            remedy="pass them through torch.nn.functional.normalize(..., dim=-1)",
            field=name,
        )


def _norms(side_ND: Tensor) -> Tensor:
    """[N] norm of each row, in float32 or float64."""
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
            remedy="pass the positive factor on cosine similarities; for a learned logarithm, exp(log_scale)",
            field=name,
        )
    # The logarithms of usual scales (10 to 1000) are below 7. A model in training can have only negative logits, but
    # not with such a small scale.
    if loss == "sigmoid" and scale < 7 and scale + bias < -5:
        raise CurationError(
            f"the {name}'s scale of {scale:.4g} with a bias of {bias:.4g} looks like a logarithm: "
            f"even identical embeddings have a logit of {scale + bias:.4g}",
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
