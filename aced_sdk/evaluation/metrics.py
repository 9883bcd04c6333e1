# SPDX-License-Identifier: Apache-2.0
"""Metrics of zero-shot classification and retrieval, computed from embeddings as CLIP_benchmark computes them."""

from __future__ import annotations

import torch
from torch import Tensor

from aced_sdk.towers import DualEncoder

# What is in memory at once. Smaller tasks, the whole of StableEval among them, are computed in one piece.
_PROMPTS = 100_000
_SCORES = 2**26  # pictures times classes: ImageNet's 50,000 pictures and 1,000 classes have fewer
_LABELS = 2**24  # pictures times classes
_MATCHES = 2**27  # pictures times captions


@torch.no_grad()
def class_embeddings(encoder: DualEncoder, names: list[str], templates: list[str]) -> Tensor:
    """One L2-normalised embedding per class [C, D]: the mean over the prompts, as in CLIP (arXiv 2103.00020)."""
    means, step = [], max(1, _PROMPTS // len(templates))
    for start in range(0, len(names), step):
        some = names[start : start + step]
        embedded = encoder.encode_text([template.replace("{c}", name) for name in some for template in templates])
        means.append(embedded.view(len(some), len(templates), -1).mean(dim=1))
    return torch.nn.functional.normalize(torch.cat(means), dim=-1)


def zero_shot(images: Tensor, classes: Tensor, labels: Tensor) -> dict[str, float]:
    """Top-1 and top-5 accuracy, and the mean over classes of their recall, as shares in 0..1.

    Args:
        images: L2-normalised [N, D].
        classes: L2-normalised [C, D]; with fewer than five, `acc5` is 1.
        labels: int64 [N].
    """
    step = max(1, _SCORES // len(classes))
    best = [(part @ classes.T).topk(min(5, len(classes)), dim=1).indices.cpu() for part in torch.split(images, step)]
    top = torch.cat(best)
    hits = top == labels[:, None]
    found, of = (torch.bincount(part, minlength=len(classes)) for part in (labels[hits[:, 0]], labels))
    return {
        "acc1": float(hits[:, 0].double().mean()),
        "acc5": float(hits.any(dim=1).double().mean()),
        "mean_per_class_recall": float((found[of > 0].double() / of[of > 0]).mean()),
    }


def multilabel(images: Tensor, classes: Tensor, labels: Tensor) -> dict[str, float]:
    """Mean over classes of the average precision, in 0..1; 0 for a class without a positive.

    Args:
        images: L2-normalised [N, D].
        classes: L2-normalised [C, D].
        labels: bool [N, C].
    """
    scores, averages = (images @ classes.T).cpu(), []
    step = max(1, _LABELS // len(images))
    for score, label in zip(torch.split(scores, step, 1), torch.split(labels, step, 1), strict=True):
        truth = label.gather(0, score.argsort(dim=0, descending=True)).double()
        precision = truth.cumsum(dim=0) / torch.arange(1, len(truth) + 1).double()[:, None]
        averages.append((precision * truth).sum(dim=0) / truth.sum(dim=0).clamp(min=1))
    return {"mean_average_precision": float(torch.cat(averages).mean())}


def retrieval(images: Tensor, texts: Tensor, owner: Tensor) -> dict[str, float]:
    """Recall at 1 and 5 in both directions, as shares in 0..1.

    A query is a hit if any of its positives is in the top k. Every caption is a text of its own, as in CLIP_benchmark:
    of two pictures with the same caption, only one can have it at rank 1.

    Args:
        images: L2-normalised [N, D].
        texts: L2-normalised [T, D].
        owner: int64 [T], the picture that each text belongs to.
    """
    return _recall(images, texts, owner, torch.arange(len(texts)), "")


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
    return _recall(images, texts[first.to(texts.device)], owner, same, "merged_")


def _recall(images: Tensor, texts: Tensor, owner: Tensor, text: Tensor, prefix: str) -> dict[str, float]:
    """Recall, where the pictures `owner` and the texts `text` (both int64 [P]) belong together pair by pair."""
    names = ("image_to_text", "text_to_image")
    hits: dict[tuple[str, int], list[Tensor]] = {}
    for name, queries, others, query, other in (
        (names[0], images, texts, owner, text),
        (names[1], texts, images, text, owner),
    ):
        step = max(1, _MATCHES // len(others))
        for start in range(0, len(queries), step):
            part = queries[start : start + step]
            # in this order, so that rounding and ties are those of CLIP_benchmark
            scores = (others @ part.T).cpu().T if name == names[0] else (part @ others.T).cpu()
            mine = (query >= start) & (query < start + step)
            match = torch.zeros(scores.shape, dtype=torch.bool)
            match[query[mine] - start, other[mine]] = True
            for k in (1, 5):
                best = scores.topk(min(k, scores.shape[1]), dim=1).indices
                hits.setdefault((name, k), []).append(match.gather(1, best).any(dim=1))
    return {f"{prefix}{name}_r{k}": float(torch.cat(hits[name, k]).double().mean()) for k in (1, 5) for name in names}
