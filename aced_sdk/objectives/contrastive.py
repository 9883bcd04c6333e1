# SPDX-License-Identifier: Apache-2.0
"""The task losses: SigLIP's sigmoid loss and CLIP's softmax loss, and what they make of repeated captions.

Both work in float32 (float64 for float64 embeddings) whatever autocast says, and send gradients to embeddings, scale
and bias. Shapes: b pairs, D embedding dimension, r rows of a slab.

Captions repeat in real pools, and then another pair of the sub-batch may be as good a match as a pair's own. `repeated`
says what such a pair is; n_i is the number of pairs of the sub-batch with the caption of pair i, itself included.

- "negatives": a negative like all others, as in the papers.
- "masked": nothing; a pair's negatives are the pairs with other captions.
- "positives": masked, and each of the n_i - 1 other pairs with the caption is one more positive of weight 1/n_i. So a
  pair's positives weigh 2 - 1/n_i together, below 2 however often its caption is repeated; unweighted they would weigh
  n_i, and a caption that fills a tenth of the sub-batch would drown all others.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from aced_sdk.config.objective import Repeated
from aced_sdk.curation.scores import softplus
from aced_sdk.errors import ConfigError, ModelError
from aced_sdk.objectives.slabs import in_slabs
from aced_sdk.towers.embeddings import Embeddings


def sigmoid_loss(
    student: Embeddings,
    chunk: int | None = None,
    *,
    captions: Tensor | None = None,
    repeated: Repeated = "negatives",
) -> Tensor:
    """SigLIP (arXiv 2303.15343, eq. 1): the sum over all b x b pairs of softplus(-z (scale * cosine + bias)), over b.

    With x_ij = scale * <image_i, text_j> + bias and E_i the pairs with the caption of pair i, the sum over i of

    - "negatives": softplus(-x_ii) + sum over j != i of softplus(x_ij);
    - "masked": softplus(-x_ii) + sum over j not in E_i of softplus(x_ij);
    - "positives": masked + (1 / n_i) * sum over j != i in E_i of softplus(-x_ij).

    Args:
        student: embeddings of the sub-batch.
        chunk: texts of a slab; a slab is computed again in the backward pass, so that memory is O(b * chunk) instead
            of O(b * b). None: one slab. The value is the same.
        captions: int64 [b], equal numbers for equal captions; not read with "negatives".
        repeated: what another pair with the same caption is.

    Returns:
        0-dim tensor.

    Raises:
        ModelError: if image and text embeddings are not both [b, D], or captions not [b].
        ConfigError: if captions are needed and missing.
    """
    image_bD, text_bD, scale, bias = in_full(student)
    captions_b, weight_b = _captions(captions, repeated, image_bD)
    with torch.autocast(image_bD.device.type, enabled=False):
        if captions_b is None:
            total = in_slabs(_sigmoid_slab, chunk, [text_bD], [image_bD, scale, bias])
        else:
            total = in_slabs(
                _sigmoid_slab_repeated, chunk, [text_bD, captions_b, weight_b], [image_bD, captions_b, scale, bias]
            )
        return total / len(image_bD)


def softmax_loss(
    student: Embeddings,
    chunk: int | None = None,
    *,
    captions: Tensor | None = None,
    repeated: Repeated = "negatives",
) -> Tensor:
    """CLIP (arXiv 2103.00020, figure 3): cross-entropy of each image over texts and of each text over images, halved.

    The bias cancels and gets no gradient. With x_ij = scale * <image_i, text_j>, E_i the pairs with the caption of
    pair i, and l_ij = -log(exp x_ij / (exp x_ij + sum over k not in E_i of exp x_ik)), an image's part is

    - "negatives": -log(exp x_ii / sum over k of exp x_ik);
    - "masked": l_ii;
    - "positives": l_ii + (1 / n_i) * sum over j != i in E_i of l_ij;

    a text's part is the same with the sides exchanged, and the loss is half the mean of both. Arguments, result and
    errors are those of `sigmoid_loss`, `chunk` being rows of either direction.
    """
    image_bD, text_bD, scale, _ = in_full(student)
    captions_b, weight_b = _captions(captions, repeated, image_bD)
    with torch.autocast(image_bD.device.type, enabled=False):
        total = image_bD.new_zeros(())
        for ours_bD, others_bD in ((image_bD, text_bD), (text_bD, image_bD)):
            if captions_b is None:
                total = total + in_slabs(match_slab, chunk, [ours_bD], [others_bD, scale])
            else:
                total = total + in_slabs(
                    _softmax_slab_repeated, chunk, [ours_bD, captions_b, weight_b], [others_bD, captions_b, scale]
                )
        return 0.5 * total / len(image_bD)


def match_slab(start: int, ours_rD: Tensor, others_bD: Tensor, scale: Tensor | float) -> Tensor:
    """Summed softmax cross-entropy of rows start, start + 1, ... towards the others of the same number."""
    own_r = torch.arange(start, start + len(ours_rD), device=ours_rD.device)
    return F.cross_entropy(scale * ours_rD @ others_bD.T, own_r, reduction="sum")


def in_full(model: Embeddings) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Image [b, D], text [b, D], scale [] and bias [], in float32, or float64 if an embedding is.

    Raises:
        ModelError: if image and text embeddings are not both [b, D].
    """
    if model.image.ndim != 2 or model.image.shape != model.text.shape or len(model.image) == 0:
        raise ModelError(
            f"image and text embeddings have shapes {list(model.image.shape)} and {list(model.text.shape)}",
            remedy="give both as [b, D], row i of the text belonging to image i",
        )
    wide = torch.float64 in (model.image.dtype, model.text.dtype)
    dtype, device = (torch.float64 if wide else torch.float32), model.image.device
    scale, bias = (torch.as_tensor(value).to(device, dtype) for value in (model.scale, model.bias))
    return model.image.to(dtype), model.text.to(dtype), scale, bias


def _sigmoid_slab(start: int, text_rD: Tensor, image_bD: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    logits_rb = scale * text_rD @ image_bD.T + bias
    # softplus(-x) = softplus(x) - x turns the diagonal's negatives into positives without a matrix of signs.
    return softplus(logits_rb).sum() - logits_rb.diagonal(start).sum()


def _sigmoid_slab_repeated(
    start: int,
    text_rD: Tensor,
    captions_r: Tensor,
    weight_r: Tensor,
    image_bD: Tensor,
    captions_b: Tensor,
    scale: Tensor,
    bias: Tensor,
) -> Tensor:
    logits_rb = scale * text_rD @ image_bD.T + bias
    same_rb = captions_r[:, None] == captions_b
    negatives = softplus(logits_rb).masked_fill(same_rb, 0).sum()
    return negatives + _positives(softplus(-logits_rb), same_rb, weight_r, start)


def _softmax_slab_repeated(
    start: int,
    ours_rD: Tensor,
    captions_r: Tensor,
    weight_r: Tensor,
    others_bD: Tensor,
    captions_b: Tensor,
    scale: Tensor,
) -> Tensor:
    logits_rb = scale * ours_rD @ others_bD.T
    same_rb = captions_r[:, None] == captions_b
    negatives_r = logits_rb.masked_fill(same_rb, -math.inf).logsumexp(dim=1)
    # -log(exp x / (exp x + exp n)) = softplus(n - x)
    return _positives(softplus(negatives_r[:, None] - logits_rb), same_rb, weight_r, start)


def _positives(losses_rb: Tensor, same_rb: Tensor, weight_r: Tensor, start: int) -> Tensor:
    """Losses of positives: a row's own pair counts 1, another with its caption `weight_r`."""
    all_same = (losses_rb.masked_fill(~same_rb, 0).sum(dim=1) * weight_r).sum()
    return all_same + (losses_rb.diagonal(start) * (1 - weight_r)).sum()


def _captions(captions: Tensor | None, repeated: Repeated, like: Tensor) -> tuple[Tensor | None, Tensor]:
    """Captions [b] as numbers, None if they do not matter; and the weight [b] of another pair with the same one."""
    nothing = like.new_zeros(len(like))
    if repeated == "negatives":
        return None, nothing
    if captions is None:
        raise ConfigError(
            "repeated captions are to be told apart, and the loss was given no captions",
            remedy="pass captions=, int64 [b] with equal numbers for equal captions",
            field="objective.contrastive.repeated",
        )
    if captions.shape != nothing.shape:
        raise ModelError(
            f"captions have shape {list(captions.shape)} for {len(like)} pairs",
            remedy="give one number for each pair of the sub-batch",
            field="captions",
        )
    _, numbers, counts = torch.unique(captions.to(like.device), return_inverse=True, return_counts=True)
    return numbers, (1 / counts[numbers].to(like.dtype) if repeated == "positives" else nothing)
