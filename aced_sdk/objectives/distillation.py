# SPDX-License-Identifier: Apache-2.0
"""Distillation losses of a student against a frozen teacher's embeddings of the same b pairs.

The teacher gets no gradient. Everything is float32 (float64 for float64 embeddings) whatever autocast says. Each loss
is a mean over the b pairs, so that its weight does not depend on the batch size. Errors are `ModelError`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from aced_sdk.errors import ModelError
from aced_sdk.objectives.contrastive import in_full
from aced_sdk.towers.embeddings import Embeddings


def softmax_kd(
    student: Embeddings,
    teacher: Embeddings,
    *,
    teacher_scale: float | None = None,
    student_scale: float | None = None,
) -> Tensor:
    """Softmax-KD (ACED, arXiv 2411.18674, eq. 3): cross-entropy of the teacher's match distributions and the student's.

    -1/2 sum_j (p_ij log q_ij, image to text, + the same text to image), p teacher, q student, mean over i.

    Args:
        student: embeddings of the sub-batch, in training.
        teacher: the teacher's embeddings of the same pairs; its dimension may differ.
        teacher_scale: scale on the teacher's cosines; None: its own learned one.
        student_scale: likewise for the student; None: its own, which then learns from this loss too.
    """
    logits = _logits(student, teacher, teacher_scale, student_scale, with_bias=False)
    with _no_autocast(student):
        return 0.5 * (_cross_entropy(*logits) + _cross_entropy(*(side.T for side in logits)))


def sigmoid_kd(
    student: Embeddings,
    teacher: Embeddings,
    *,
    teacher_scale: float | None = None,
    student_scale: float | None = None,
) -> Tensor:
    """Sigmoid-KD: binary cross-entropy of all b x b pairs against sigmoid(teacher's logit), summed over texts.

    Both logits are scale * cosine + bias, each model with its own bias. The teacher should be sigmoid-trained: a
    softmax-trained one has no bias, and calls every second pair a match. Arguments as in `softmax_kd`.
    """
    student_bb, teacher_bb = _logits(student, teacher, teacher_scale, student_scale, with_bias=True)
    with _no_autocast(student):
        losses = F.binary_cross_entropy_with_logits(student_bb, teacher_bb.sigmoid(), reduction="sum")
        return losses / len(student_bb)


def feature_matching(student: Embeddings, teacher: Embeddings) -> Tensor:
    """Feature distillation (CLIP-KD, arXiv 2307.12732, section 3): squared error of the normalised embeddings.

    The mean over pairs and dimensions, images plus texts. CLIP-KD gives it a weight of 2000. Both models must have one
    embedding dimension.
    """
    _same_dimension(student, teacher, "feature")
    image, text, _, _ = in_full(student)
    _same_pairs(student, teacher)
    with _no_autocast(student):
        return F.mse_loss(image, _frozen(teacher.image, image)) + F.mse_loss(text, _frozen(teacher.text, text))


def interactive(student: Embeddings, teacher: Embeddings, *, student_scale: float | None = None) -> Tensor:
    """Interactive contrastive learning (CLIP-KD, section 3): the student's images against the teacher's texts, and
    the student's texts against the teacher's images, each by softmax cross-entropy towards its own pair, halved.

    Both models must have one embedding dimension. The scale is the student's unless `student_scale` is given.
    """
    _same_dimension(student, teacher, "interactive")
    _same_pairs(student, teacher)
    image, text, learned, _ = in_full(student)
    scale = learned if student_scale is None else student_scale
    with _no_autocast(student):
        own = torch.arange(len(image), device=image.device)
        by_image = F.cross_entropy(scale * image @ _frozen(teacher.text, text).T, own)
        by_text = F.cross_entropy(scale * text @ _frozen(teacher.image, image).T, own)
        return 0.5 * (by_image + by_text)


def relational(
    student: Embeddings,
    teacher: Embeddings,
    *,
    teacher_scale: float | None = None,
    student_scale: float | None = None,
) -> Tensor:
    """Contrastive relational distillation (CLIP-KD, section 3): KL(p || q) of the match
    distributions, both ways, halved.

    It is `softmax_kd` less the teacher's entropy: the same gradient, and zero when the student agrees. Arguments as
    there.
    """
    logits = _logits(student, teacher, teacher_scale, student_scale, with_bias=False)
    with _no_autocast(student):
        return 0.5 * (_divergence(*logits) + _divergence(*(side.T for side in logits)))


def _logits(
    student: Embeddings,
    teacher: Embeddings,
    teacher_scale: float | None,
    student_scale: float | None,
    with_bias: bool,
) -> tuple[Tensor, Tensor]:
    """Student's and teacher's logits, image i in row i, both [b, b]."""
    _same_pairs(student, teacher)
    image, text, scale, bias = in_full(student)
    t_image, t_text, t_scale, t_bias = (_frozen(part, image) for part in in_full(teacher))
    with _no_autocast(student):
        student_bb = (scale if student_scale is None else student_scale) * image @ text.T
        teacher_bb = (t_scale if teacher_scale is None else teacher_scale) * t_image @ t_text.T
        return (student_bb + bias, teacher_bb + t_bias) if with_bias else (student_bb, teacher_bb)


def _cross_entropy(student_bb: Tensor, teacher_bb: Tensor) -> Tensor:
    return F.cross_entropy(student_bb, teacher_bb.softmax(dim=1))


def _divergence(student_bb: Tensor, teacher_bb: Tensor) -> Tensor:
    q, p = student_bb.log_softmax(dim=1), teacher_bb.log_softmax(dim=1)
    return F.kl_div(q, p, reduction="batchmean", log_target=True)


def _frozen(part: Tensor, like: Tensor) -> Tensor:
    return part.detach().to(like.device, like.dtype)


def _no_autocast(model: Embeddings) -> torch.autocast:
    return torch.autocast(model.image.device.type, enabled=False)


def _same_pairs(student: Embeddings, teacher: Embeddings) -> None:
    if len(student) != len(teacher):
        raise ModelError(
            f"the student embeds {len(student)} pairs and the teacher {len(teacher)}",
            remedy="give both the sub-batch, in one order",
            field="teacher",
        )


def _same_dimension(student: Embeddings, teacher: Embeddings, loss: str) -> None:
    ours, theirs = student.image.shape[-1], teacher.image.shape[-1]
    if ours != theirs:
        raise ModelError(
            f"the distillation loss {loss!r} compares embeddings, and the student has {ours} dimensions, "
            f"the teacher {theirs}",
            remedy=f"give the student an embed_dim of {theirs}, or use the softmax, sigmoid or relational loss",
            field="objective.distillation",
        )
