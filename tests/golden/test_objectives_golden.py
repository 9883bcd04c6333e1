# SPDX-License-Identifier: Apache-2.0
"""Every loss in float64 against its definition, written out pair by pair with math alone."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, log, log1p

import pytest
import torch
import torch.nn.functional as F

from aced_sdk.curation import Embeddings
from aced_sdk.objectives import (
    feature_matching,
    interactive,
    relational,
    sigmoid_kd,
    sigmoid_loss,
    softmax_kd,
    softmax_loss,
)

PAIRS = 11
CAPTIONS = [3, 1, 3, 8, 8, 3, 2, 3, 5, 1, 0]
CHUNKS = [None, 1, 4, 11]
Matrix = list[list[float]]


def model(seed: int, scale: float, bias: float) -> Embeddings:
    noise = torch.Generator().manual_seed(seed)
    image, text = torch.randn(2, PAIRS, 5, dtype=torch.float64, generator=noise)
    return Embeddings(F.normalize(image, dim=1), F.normalize(0.7 * image + text, dim=1), scale, bias)


STUDENT, TEACHER = model(0, 7.0, -2.0), model(1, 20.0, -9.0)


def cosines(images: torch.Tensor, texts: torch.Tensor) -> Matrix:
    return [
        [sum(a * b for a, b in zip(image, text, strict=True)) for text in texts.tolist()] for image in images.tolist()
    ]


def logits(one: Embeddings, scale: float | None = None, with_bias: bool = True) -> Matrix:
    factor, bias = one.scale if scale is None else scale, one.bias if with_bias else 0.0
    return [[factor * cosine + bias for cosine in row] for row in cosines(one.image, one.text)]


def turned(x: Matrix) -> Matrix:
    return [list(column) for column in zip(*x, strict=True)]


def softmax(row: Sequence[float]) -> list[float]:
    return [exp(value) / sum(exp(other) for other in row) for value in row]


def softplus(x: float) -> float:
    return log1p(exp(x))


def sigmoid_contrastive(x: Matrix, repeated: str) -> float:
    total = 0.0
    for i in range(PAIRS):
        count = CAPTIONS.count(CAPTIONS[i])
        for j in range(PAIRS):
            if i == j:
                total += softplus(-x[i][j])
            elif repeated == "negatives" or CAPTIONS[i] != CAPTIONS[j]:
                total += softplus(x[i][j])
            elif repeated == "positives":
                total += softplus(-x[i][j]) / count
    return total / PAIRS


def softmax_contrastive(x: Matrix, repeated: str) -> float:
    total = 0.0
    for side in (x, turned(x)):
        for i in range(PAIRS):
            if repeated == "negatives":
                total -= log(softmax(side[i])[i])
                continue
            others = sum(exp(side[i][k]) for k in range(PAIRS) if CAPTIONS[k] != CAPTIONS[i])
            count = CAPTIONS.count(CAPTIONS[i])
            for j in range(PAIRS):
                weight = 1.0 if i == j else 1 / count if repeated == "positives" else 0.0
                if CAPTIONS[i] == CAPTIONS[j]:
                    total -= weight * log(exp(side[i][j]) / (exp(side[i][j]) + others))
    return total / (2 * PAIRS)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("repeated", ["negatives", "masked", "positives"])
def test_contrastive(repeated: str, chunk: int | None) -> None:
    captions = torch.tensor(CAPTIONS)
    loss = sigmoid_loss(STUDENT, chunk, captions=captions, repeated=repeated)
    assert loss.item() == pytest.approx(sigmoid_contrastive(logits(STUDENT), repeated), abs=1e-12)
    loss = softmax_loss(STUDENT, chunk, captions=captions, repeated=repeated)
    assert loss.item() == pytest.approx(softmax_contrastive(logits(STUDENT), repeated), abs=1e-12)


def softmax_distillation(teacher: Matrix, student: Matrix, less_entropy: bool) -> float:
    total = 0.0
    for t, s in ((teacher, student), (turned(teacher), turned(student))):
        for i in range(PAIRS):
            for p, q in zip(softmax(t[i]), softmax(s[i]), strict=True):
                total -= p * (log(q) - (log(p) if less_entropy else 0.0))
    return total / (2 * PAIRS)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("scales", [(None, None), (12.0, 4.0)])
def test_distillation(scales: tuple[float | None, float | None], chunk: int | None) -> None:
    named = {"teacher_scale": scales[0], "student_scale": scales[1], "chunk": chunk}
    p, q = logits(TEACHER, scales[0], with_bias=False), logits(STUDENT, scales[1], with_bias=False)
    assert softmax_kd(STUDENT, TEACHER, **named).item() == pytest.approx(softmax_distillation(p, q, False), abs=1e-12)
    assert relational(STUDENT, TEACHER, **named).item() == pytest.approx(softmax_distillation(p, q, True), abs=1e-12)

    targets, x = logits(TEACHER, scales[0]), logits(STUDENT, scales[1])
    expected = 0.0
    for i in range(PAIRS):
        for j in range(PAIRS):
            match = 1 / (1 + exp(-targets[i][j]))
            expected += (match * softplus(-x[i][j]) + (1 - match) * softplus(x[i][j])) / PAIRS
    assert sigmoid_kd(STUDENT, TEACHER, **named).item() == pytest.approx(expected, abs=1e-12)

    scale = STUDENT.scale if scales[1] is None else scales[1]
    expected = 0.0
    for ours, theirs in ((STUDENT.image, TEACHER.text), (STUDENT.text, TEACHER.image)):
        for i, row in enumerate(cosines(ours, theirs)):
            expected -= log(softmax([scale * cosine for cosine in row])[i]) / (2 * PAIRS)
    loss = interactive(STUDENT, TEACHER, student_scale=scales[1], chunk=chunk)
    assert loss.item() == pytest.approx(expected, abs=1e-12)


def test_feature_matching() -> None:
    expected = 0.0
    for ours, theirs in ((STUDENT.image, TEACHER.image), (STUDENT.text, TEACHER.text)):
        for row, other in zip(ours.tolist(), theirs.tolist(), strict=True):
            expected += sum((a - b) ** 2 for a, b in zip(row, other, strict=True)) / ours.numel()
    assert feature_matching(STUDENT, TEACHER).item() == pytest.approx(expected, abs=1e-12)
