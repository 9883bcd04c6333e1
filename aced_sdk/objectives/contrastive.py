# SPDX-License-Identifier: Apache-2.0
"""The task losses: SigLIP's sigmoid loss and CLIP's softmax loss, with options for repeated captions.

Losses are computed in float32 (float64 for float64 embeddings); autocast is ignored. Embeddings, scale and bias get
gradients. Shapes: b pairs, D embedding dimension, r rows of a slab.

Pools contain repeated captions, so another pair of the sub-batch may also be a correct match. `repeated` sets how such
pairs are treated. n_i is the number of pairs of the sub-batch with the caption of pair i, including pair i.

- "negatives": as negatives, like in the papers.
- "masked": ignored. Only pairs with other captions are negatives.
- "positives": each of the n_i - 1 other pairs is a positive of weight 1/n_i. The positives of a pair have a total
  weight of 2 - 1/n_i, which stays below 2. Without the weight it would be n_i, and a frequent caption would dominate.
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
    """SigLIP (arXiv 2303.15343, eq. 1): sum over all b x b pairs of softplus(-z (scale * cosine + bias)), divided by b.

    Let x_ij = scale * <image_i, text_j> + bias, and E_i the pairs with the caption of pair i. It is the sum over i of

    - "negatives": softplus(-x_ii) + sum over j != i of softplus(x_ij);
    - "masked": softplus(-x_ii) + sum over j not in E_i of softplus(x_ij);
    - "positives": masked + (1 / n_i) * sum over j != i in E_i of softplus(-x_ij).

    Args:
        student: embeddings of the sub-batch.
        chunk: texts per slab. Slabs are recomputed in the backward pass, so memory is O(b * chunk) instead of
            O(b * b). None: one slab. The loss is the same.
        captions: int64 [b], equal ids for equal captions; not used with "negatives".
        repeated: how other pairs with the same caption are treated.

    Returns:
        0-dim tensor.

    Raises:
        ModelError: if image or text embeddings are not [b, D], or captions are not [b].
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
    """CLIP (arXiv 2103.00020, figure 3): mean of the image-to-text and text-to-image cross-entropies.

    The bias cancels and gets no gradient. Let x_ij = scale * <image_i, text_j>, E_i the pairs with the caption of
    pair i, and l_ij = -log(exp x_ij / (exp x_ij + sum over k not in E_i of exp x_ik)). The loss of image i is

    - "negatives": -log(exp x_ii / sum over k of exp x_ik);
    - "masked": l_ii;
    - "positives": l_ii + (1 / n_i) * sum over j != i in E_i of l_ij.

    The loss of a text is the same with images and texts exchanged. Arguments, result and errors are those of
    `sigmoid_loss`; `chunk` is rows per slab, in both directions.
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
    """Summed softmax cross-entropy of rows start, start + 1, ...; the target of a row has the same index."""
    own_r = torch.arange(start, start + len(ours_rD), device=ours_rD.device)
    return F.cross_entropy(scale * ours_rD @ others_bD.T, own_r, reduction="sum")


def in_full(model: Embeddings) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return image [b, D], text [b, D], scale [] and bias [] in float32, or in float64 if an embedding is.

    Raises:
        ModelError: if image or text embeddings are not [b, D].
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
    # softplus(-x) = softplus(x) - x: subtracting the diagonal makes it positive without a matrix of signs.
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
    """Summed losses of positives: a row's own pair has weight 1, others with its caption `weight_r`."""
    all_same = (losses_rb.masked_fill(~same_rb, 0).sum(dim=1) * weight_r).sum()
    return all_same + (losses_rb.diagonal(start) * (1 - weight_r)).sum()


def _captions(captions: Tensor | None, repeated: Repeated, like: Tensor) -> tuple[Tensor | None, Tensor]:
    """Return caption ids [b] (None if not needed) and the weight [b] of other pairs with the same caption."""
    nothing = like.new_zeros(len(like))
    if repeated == "negatives":
        return None, nothing
    if captions is None:
        raise ConfigError(
            f"repeated='{repeated}' needs captions, and none are given",
            remedy="pass captions=, int64 [b] with equal ids for equal captions",
            field="objective.contrastive.repeated",
        )
    if captions.shape != nothing.shape:
        raise ModelError(
            f"captions have shape {list(captions.shape)} for {len(like)} pairs",
            remedy="pass one id per pair of the sub-batch",
            field="captions",
        )
    _, numbers, counts = torch.unique(captions.to(like.device), return_inverse=True, return_counts=True)
    return numbers, (1 / counts[numbers].to(like.dtype) if repeated == "positives" else nothing)
