# SPDX-License-Identifier: Apache-2.0
"""Distillation losses of a student against a frozen teacher's embeddings of the same b pairs.

The teacher gets no gradient. Losses are computed in float32 (float64 for float64 embeddings); autocast is ignored.
They are means over the b pairs, so weights do not depend on the batch size. Errors are `ModelError`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from aced_sdk.errors import ModelError
from aced_sdk.objectives.contrastive import in_full, match_slab
from aced_sdk.objectives.slabs import in_slabs
from aced_sdk.towers.embeddings import Embeddings


def softmax_kd(
    student: Embeddings,
    teacher: Embeddings,
    *,
    teacher_scale: float | None = None,
    student_scale: float | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Softmax-KD (ACED, arXiv 2411.18674, eq. 3): cross-entropy between the teacher's and the student's distributions.

    Mean over i of -1/2 sum_j p_ij log q_ij, image to text plus text to image, with p of the teacher, q of the student.

    Args:
        student: the student's embeddings of the sub-batch.
        teacher: the teacher's embeddings of the same pairs; the dimension may differ.
        teacher_scale: scale on the teacher's cosines; None: its learned scale.
        student_scale: scale on the student's cosines; None: its learned scale, which is then trained by this loss too.
        chunk: rows per slab, see `aced_sdk.objectives.slabs.in_slabs`; None: one slab. The loss is the same.
    """
    return _both_ways(_cross_entropy_slab, student, teacher, teacher_scale, student_scale, chunk)


def sigmoid_kd(
    student: Embeddings,
    teacher: Embeddings,
    *,
    teacher_scale: float | None = None,
    student_scale: float | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Sigmoid-KD: binary cross-entropy of all b x b pairs against sigmoid(teacher's logit), summed over texts.

    The logits are scale * cosine + bias, with the bias of each model. The teacher should be sigmoid-trained: without a
    learned bias, sigmoid(logit) is not a match probability. Arguments as in `softmax_kd`.
    """
    (image, text, scale, bias), (t_image, t_text, t_scale, t_bias) = _both(
        student, teacher, teacher_scale, student_scale
    )
    with _no_autocast(student):
        whole = [text, t_text, scale, bias, t_scale, t_bias]
        return in_slabs(_binary_slab, chunk, [image, t_image], whole) / len(image)


def feature_matching(student: Embeddings, teacher: Embeddings) -> Tensor:
    """Feature distillation (CLIP-KD, arXiv 2307.12732, section 3): squared error of the normalised embeddings.

    The mean over pairs and dimensions, images plus texts. CLIP-KD's weight is 2000. Both models must have the same
    embedding dimension.
    """
    _same_dimension(student, teacher, "feature")
    image, text, _, _ = in_full(student)
    _same_pairs(student, teacher)
    with _no_autocast(student):
        return F.mse_loss(image, _frozen(teacher.image, image)) + F.mse_loss(text, _frozen(teacher.text, text))


def interactive(
    student: Embeddings, teacher: Embeddings, *, student_scale: float | None = None, chunk: int | None = None
) -> Tensor:
    """Interactive contrastive learning (CLIP-KD, section 3): softmax cross-entropy across the two models.

    The mean of two losses: student images against teacher texts, and student texts against teacher images. Both
    models must have the same embedding dimension. The scale is the student's unless `student_scale` is set; `chunk` as
    in `softmax_kd`.
    """
    _same_dimension(student, teacher, "interactive")
    _same_pairs(student, teacher)
    image, text, learned, _ = in_full(student)
    scale = learned if student_scale is None else student_scale
    with _no_autocast(student):
        by_image = in_slabs(match_slab, chunk, [image], [_frozen(teacher.text, text), scale])
        by_text = in_slabs(match_slab, chunk, [text], [_frozen(teacher.image, image), scale])
        return 0.5 * (by_image + by_text) / len(image)


def relational(
    student: Embeddings,
    teacher: Embeddings,
    *,
    teacher_scale: float | None = None,
    student_scale: float | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Contrastive relational distillation (CLIP-KD, section 3): KL(p || q) of the match distributions.

    The mean of image to text and text to image. It is `softmax_kd` minus the teacher's entropy: the gradient is the
    same, and the loss is 0 if the student agrees. Arguments as in `softmax_kd`.
    """
    return _both_ways(_divergence_slab, student, teacher, teacher_scale, student_scale, chunk)


def _both_ways(
    slab: Callable[..., Tensor],
    student: Embeddings,
    teacher: Embeddings,
    teacher_scale: float | None,
    student_scale: float | None,
    chunk: int | None,
) -> Tensor:
    """Mean over rows and both directions (image to text, text to image) of a loss of match distributions."""
    (image, text, scale, _), (t_image, t_text, t_scale, _) = _both(student, teacher, teacher_scale, student_scale)
    with _no_autocast(student):
        by_image = in_slabs(slab, chunk, [image, t_image], [text, t_text, scale, t_scale])
        by_text = in_slabs(slab, chunk, [text, t_text], [image, t_image, scale, t_scale])
        return 0.5 * (by_image + by_text) / len(image)


_Parts = tuple[Tensor, Tensor, Tensor | float, Tensor]


def _both(
    student: Embeddings, teacher: Embeddings, teacher_scale: float | None, student_scale: float | None
) -> tuple[_Parts, _Parts]:
    """Return image, text, scale and bias of both models with the given scales; the teacher without gradient."""
    _same_pairs(student, teacher)
    image, text, scale, bias = in_full(student)
    t_image, t_text, t_scale, t_bias = (_frozen(part, image) for part in in_full(teacher))
    return (
        (image, text, scale if student_scale is None else student_scale, bias),
        (t_image, t_text, t_scale if teacher_scale is None else teacher_scale, t_bias),
    )


# Slabs: r rows of both models against all b others.


def _cross_entropy_slab(
    _: int, ours: Tensor, t_ours: Tensor, others: Tensor, t_others: Tensor, scale: Tensor, t_scale: Tensor
) -> Tensor:
    p_rb = (t_scale * t_ours @ t_others.T).softmax(dim=1)
    return F.cross_entropy(scale * ours @ others.T, p_rb, reduction="sum")


def _divergence_slab(
    _: int, ours: Tensor, t_ours: Tensor, others: Tensor, t_others: Tensor, scale: Tensor, t_scale: Tensor
) -> Tensor:
    log_p_rb = (t_scale * t_ours @ t_others.T).log_softmax(dim=1)
    return F.kl_div((scale * ours @ others.T).log_softmax(dim=1), log_p_rb, reduction="sum", log_target=True)


def _binary_slab(
    _: int,
    ours: Tensor,
    t_ours: Tensor,
    others: Tensor,
    t_others: Tensor,
    scale: Tensor,
    bias: Tensor,
    t_scale: Tensor,
    t_bias: Tensor,
) -> Tensor:
    targets_rb = (t_scale * t_ours @ t_others.T + t_bias).sigmoid()
    return F.binary_cross_entropy_with_logits(scale * ours @ others.T + bias, targets_rb, reduction="sum")


def _frozen(part: Tensor, like: Tensor) -> Tensor:
    return part.detach().to(like.device, like.dtype)


def _no_autocast(model: Embeddings) -> torch.autocast:
    return torch.autocast(model.image.device.type, enabled=False)


def _same_pairs(student: Embeddings, teacher: Embeddings) -> None:
    if len(student) != len(teacher):
        raise ModelError(
            f"the student embeds {len(student)} pairs and the teacher {len(teacher)}",
            remedy="pass embeddings of the same pairs in the same order",
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
