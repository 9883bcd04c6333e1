# SPDX-License-Identifier: Apache-2.0
"""The task losses: SigLIP's sigmoid loss and CLIP's softmax loss.

Both work in float32 (float64 for float64 embeddings) whatever autocast says, and send gradients to embeddings, scale
and bias. Shapes: b pairs, D embedding dimension, c texts of a slab.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from aced_sdk.errors import ModelError
from aced_sdk.towers.embeddings import Embeddings


def sigmoid_loss(student: Embeddings, chunk: int | None = None) -> Tensor:
    """SigLIP (arXiv 2303.15343, eq. 1): the sum over all b x b pairs of softplus(-z (scale * cosine + bias)), over b.

    Args:
        student: embeddings of the sub-batch.
        chunk: texts of a slab; a slab is computed again in the backward pass, so that memory is O(b * chunk) instead
            of O(b * b). None: one slab. The value is the same.

    Returns:
        0-dim tensor.

    Raises:
        ModelError: if image and text embeddings are not both [b, D].
    """
    image_bD, text_bD, scale, bias = in_full(student)
    with torch.autocast(image_bD.device.type, enabled=False):
        if chunk is None or chunk >= len(text_bD):
            return _slab(image_bD, text_bD, scale, bias, 0) / len(image_bD)
        total = image_bD.new_zeros(())
        for start in range(0, len(text_bD), chunk):
            text_cD = text_bD[start : start + chunk]
            # Nothing in a slab is random, so there are no generator states to keep.
            total = total + checkpoint(
                _slab, image_bD, text_cD, scale, bias, start, use_reentrant=False, preserve_rng_state=False
            )
        return total / len(image_bD)


def softmax_loss(student: Embeddings) -> Tensor:
    """CLIP (arXiv 2103.00020, figure 3): cross-entropy of each image over texts and of each text over images, halved.

    The bias cancels and gets no gradient.

    Raises:
        ModelError: if image and text embeddings are not both [b, D].
    """
    image_bD, text_bD, scale, _ = in_full(student)
    with torch.autocast(image_bD.device.type, enabled=False):
        return match_loss(scale * image_bD @ text_bD.T)


def match_loss(logits_bb: Tensor) -> Tensor:
    """Softmax cross-entropy towards the diagonal, the mean of rows and columns."""
    own = torch.arange(len(logits_bb), device=logits_bb.device)
    return 0.5 * (F.cross_entropy(logits_bb, own) + F.cross_entropy(logits_bb.T, own))


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


def _slab(image_bD: Tensor, text_cD: Tensor, scale: Tensor, bias: Tensor, start: int) -> Tensor:
    """Summed pair losses of all images with the texts start, start + 1, ..."""
    logits_bc = scale * image_bD @ text_cD.T + bias
    # softplus(-x) = softplus(x) - x turns the diagonal's negatives into positives without a matrix of signs.
    return F.softplus(logits_bc, threshold=40.0).sum() - logits_bc.diagonal(-start).sum()
