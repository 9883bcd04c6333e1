# SPDX-License-Identifier: Apache-2.0
"""Zero-shot classification and retrieval from embeddings."""

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
    """Top-1 and top-5 accuracy as shares.

    Args:
        images: L2-normalised [N, D].
        classes: L2-normalised [C, D].
        labels: int64 [N].
    """
    top = (images @ classes.T).topk(min(5, len(classes)), dim=1).indices.cpu()
    hits = top == labels[:, None]
    return {"acc1": float(hits[:, 0].float().mean()), "acc5": float(hits.any(dim=1).float().mean())}


def retrieval(images: Tensor, texts: Tensor, own: Tensor) -> dict[str, float]:
    """Recall at 1 and 5 in both directions, as shares; found is what has any of its own among the best.

    Args:
        images: L2-normalised [N, D].
        texts: distinct texts, L2-normalised [T, D].
        own: bool [N, T], which texts are a picture's own.
    """
    similarity = (images @ texts.T).cpu()
    result: dict[str, float] = {}
    for k in (1, 5):
        for name, scores, match in (("image_to_text", similarity, own), ("text_to_image", similarity.T, own.T)):
            best = scores.topk(min(k, scores.shape[1]), dim=1).indices
            result[f"{name}_r{k}"] = float(match.gather(1, best).any(dim=1).float().mean())
    return result


def run_task(encoder: DualEncoder, task: Task) -> dict[str, float]:
    """A task's metrics for an encoder whose preprocessing the task was loaded with."""
    images = encoder.encode_image(task.images)
    if task.kind == "retrieval":
        return retrieval(images, encoder.encode_text(task.texts), task.labels)
    return zero_shot(images, class_embeddings(encoder, task.texts, task.templates), task.labels)
