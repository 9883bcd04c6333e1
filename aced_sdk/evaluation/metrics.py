# SPDX-License-Identifier: Apache-2.0
"""Metrics of zero-shot classification and retrieval, computed from embeddings as CLIP_benchmark computes them."""

from __future__ import annotations

import torch
from torch import Tensor

from aced_sdk.evaluation.tasks import Task
from aced_sdk.towers import DualEncoder


@torch.no_grad()
def class_embeddings(encoder: DualEncoder, names: list[str], templates: list[str]) -> Tensor:
    """One L2-normalised embedding per class [C, D]: the mean over the prompts, as in CLIP (arXiv 2103.00020)."""
    prompts = [template.replace("{c}", name) for name in names for template in templates]
    embedded = encoder.encode_text(prompts).view(len(names), len(templates), -1)
    return torch.nn.functional.normalize(embedded.mean(dim=1), dim=-1)


def zero_shot(images: Tensor, classes: Tensor, labels: Tensor) -> dict[str, float]:
    """Top-1 and top-5 accuracy, and the mean over classes of their recall, as shares in 0..1.

    Args:
        images: L2-normalised [N, D].
        classes: L2-normalised [C, D]; with fewer than five, `acc5` is 1.
        labels: int64 [N].
    """
    top = (images @ classes.T).topk(min(5, len(classes)), dim=1).indices.cpu()
    hits = top == labels[:, None]
    found, of = (torch.bincount(part, minlength=len(classes)) for part in (labels[hits[:, 0]], labels))
    return {
        "acc1": float(hits[:, 0].double().mean()),
        "acc5": float(hits.any(dim=1).double().mean()),
        "mean_per_class_recall": float((found[of > 0].double() / of[of > 0]).mean()),
    }


def multilabel(images: Tensor, classes: Tensor, labels: Tensor) -> dict[str, float]:
    """Mean over classes of the average precision, a share in 0..1; 0 for a class without a positive.

    Args:
        images: L2-normalised [N, D].
        classes: L2-normalised [C, D].
        labels: bool [N, C].
    """
    scores = (images @ classes.T).cpu()
    order = scores.argsort(dim=0, descending=True)
    truth = labels.gather(0, order).double()
    precision = truth.cumsum(dim=0) / torch.arange(1, len(truth) + 1).double()[:, None]
    average = (precision * truth).sum(dim=0) / truth.sum(dim=0).clamp(min=1)
    return {"mean_average_precision": float(average.mean())}


def retrieval(images: Tensor, texts: Tensor, owner: Tensor) -> dict[str, float]:
    """Recall at 1 and 5 in both directions, as shares in 0..1.

    A query is a hit if any of its positives is in the top k. Every caption is a text of its own, as in CLIP_benchmark:
    of two pictures with the same caption, only one can have it at rank 1.

    Args:
        images: L2-normalised [N, D].
        texts: L2-normalised [T, D].
        owner: int64 [T], the picture that each text belongs to.
    """
    own = torch.zeros(len(images), len(texts), dtype=torch.bool)
    own[owner, torch.arange(len(texts))] = True
    return _recall(images, texts, own, "")


def merged_retrieval(images: Tensor, texts: Tensor, owner: Tensor, same: Tensor) -> dict[str, float]:
    """As `retrieval`, with equal captions merged to one text that belongs to all of their pictures.

    Args:
        images: L2-normalised [N, D].
        texts: L2-normalised [T, D].
        owner: int64 [T], the picture that each text belongs to.
        same: int64 [T], equal numbers for equal captions, 0 to the number of distinct captions - 1.
    """
    distinct = int(same.max()) + 1
    first = torch.zeros(distinct, dtype=torch.int64)
    first[same.flip(0)] = torch.arange(len(texts)).flip(0)
    own = torch.zeros(len(images), distinct, dtype=torch.bool)
    own[owner, same] = True
    return _recall(images, texts[first.to(texts.device)], own, "merged_")


def _recall(images: Tensor, texts: Tensor, own: Tensor, prefix: str) -> dict[str, float]:
    """Recall from bool [N, T], which texts are a picture's own."""
    scores = (texts @ images.T).cpu()  # in this order, so that rounding and ties are those of CLIP_benchmark
    result: dict[str, float] = {}
    for k in (1, 5):
        for name, of, match in (("image_to_text", scores.T, own), ("text_to_image", scores, own.T)):
            best = of.topk(min(k, of.shape[1]), dim=1).indices
            result[f"{prefix}{name}_r{k}"] = float(match.gather(1, best).any(dim=1).double().mean())
    return result


def run_task(encoder: DualEncoder, task: Task) -> dict[str, float]:
    """A task's metrics for an encoder whose preprocessing the task was loaded with."""
    images = encoder.encode_image(task.images)
    if task.kind == "retrieval":
        texts = encoder.encode_text(task.texts)[task.captions.to(images.device)]
        owner = task.labels
        return retrieval(images, texts, owner) | merged_retrieval(images, texts, owner, task.captions)
    classes = class_embeddings(encoder, task.texts, task.templates)
    return (zero_shot if task.kind == "zero_shot" else multilabel)(images, classes, task.labels)
