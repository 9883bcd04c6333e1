# SPDX-License-Identifier: Apache-2.0
"""The streaming sampler against JEST's Algorithm 1 written out over full N x N matrices in float64."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch

from aced_sdk.curation import Embeddings, select_independent, select_joint
from aced_sdk.curation.scores import weights_of
from benchmarks import selection as benchmark

Array = npt.NDArray[np.float64]
SCORES = ("learnability", "easy_reference", "hard_learner")
# (N, b, n), a draw of everything and one chunk among them.
SIZES = ((64, 16, 4), (200, 40, 8), (96, 96, 6), (333, 111, 37), (150, 30, 1))


def model(rng: np.random.Generator, items: int, dim: int, scale: float, bias: float) -> Embeddings:
    """Pairs that match to a varying degree, so that diagonals and off-diagonals both matter."""
    image = rng.normal(size=(items, dim))
    text = image * rng.uniform(0, 2, size=(items, 1)) + rng.normal(size=(items, dim))
    image /= np.linalg.norm(image, axis=1, keepdims=True)
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    return Embeddings(torch.from_numpy(image), torch.from_numpy(text), scale, bias)


def pair(seed: int, items: int) -> tuple[Embeddings, Embeddings]:
    rng = np.random.default_rng(seed)
    return model(rng, items, 12, 7.3, -3.1), model(rng, items, 20, 62.0, -11.4)


def similarities(embeddings: Embeddings) -> Array:
    return float(embeddings.scale) * embeddings.image.numpy() @ embeddings.text.numpy().T


def sigmoid_losses(embeddings: Embeddings) -> Array:
    logits = similarities(embeddings) + float(embeddings.bias)
    signs = 2 * np.eye(len(logits)) - 1
    return np.logaddexp(0, -signs * logits)


def signed(score: str, of_student: Array, of_reference: Array) -> Array:
    return {
        "learnability": of_student - of_reference,
        "easy_reference": -of_reference,
        "hard_learner": of_student,
    }[score]


def softmax_part(embeddings: Embeddings, picked: list[int]) -> Array:
    """Each candidate's softmax loss with the partition over the picked, [N]."""
    s = similarities(embeddings)
    if not picked:
        return -np.diag(s)
    over_texts = np.log(np.exp(s[:, picked]).sum(axis=1))
    over_images = np.log(np.exp(s[picked, :]).sum(axis=0))
    return -np.diag(s) + (over_texts + over_images) / 2


def log_weights(student: Embeddings, reference: Embeddings, score: str, loss: str, picked: list[int]) -> Array:
    if loss == "softmax":
        return signed(score, softmax_part(student, picked), softmax_part(reference, picked))
    matrix = signed(score, sigmoid_losses(student), sigmoid_losses(reference))
    return np.diag(matrix) + matrix[picked, :].sum(axis=0) + matrix[:, picked].sum(axis=1)


def algorithm_1(
    student: Embeddings, reference: Embeddings, size: int, score: str, loss: str, gain: float, gumbel: Array
) -> list[int]:
    picked: list[int] = []
    for row in gumbel:
        keys = gain * log_weights(student, reference, score, loss, picked) + row
        keys[picked] = -np.inf
        picked += np.argsort(-keys)[: size // len(gumbel)].tolist()
    return picked


def float32(embeddings: Embeddings) -> Embeddings:
    return Embeddings(embeddings.image.float(), embeddings.text.float(), embeddings.scale, embeddings.bias)


@pytest.mark.parametrize("gain", [0.5, 4.0])
@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("sizes", SIZES)
def test_streaming_picks_what_the_full_matrix_picks(
    sizes: tuple[int, int, int], score: str, loss: str, gain: float
) -> None:
    items, size, chunks = sizes
    student, reference = pair(items, items)
    gumbel = np.random.default_rng(size).gumbel(size=(chunks, items))
    expected = algorithm_1(student, reference, size, score, loss, gain, gumbel)
    options = {"size": size, "num_chunks": chunks, "score": score, "loss": loss, "gain": gain}
    noise = torch.from_numpy(gumbel)
    assert select_joint(student, reference, gumbel=noise, **options).tolist() == expected
    assert select_joint(float32(student), float32(reference), gumbel=noise, **options).tolist() == expected


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
@pytest.mark.parametrize("score", SCORES)
def test_independent_is_the_diagonal_alone(score: str, loss: str) -> None:
    student, reference = pair(3, 120)
    gumbel = np.random.default_rng(4).gumbel(size=(1, 120))
    expected = algorithm_1(student, reference, 30, score, loss, 2.0, gumbel)
    for noise in (torch.from_numpy(gumbel), torch.from_numpy(gumbel[0])):
        rows = select_independent(student, reference, size=30, score=score, loss=loss, gain=2.0, gumbel=noise)
        assert rows.tolist() == expected


@pytest.mark.parametrize("score", SCORES)
def test_sigmoid_weight_is_the_change_of_the_batch_score(score: str) -> None:
    student, reference = pair(5, 24)
    matrix = signed(score, sigmoid_losses(student), sigmoid_losses(reference))

    def batch_score(batch: list[int]) -> float:
        return float(sum(matrix[i, j] for i in batch for j in batch))

    weights = weights_of(student, reference, score, "sigmoid")
    picked: list[int] = []
    for chunk in ([], [7, 2, 19], [0, 11], [23]):
        if chunk:
            weights.add(torch.tensor(chunk))
            picked += chunk
        current = weights.current().numpy()
        for item in sorted(set(range(24)) - set(picked)):
            change = batch_score([*picked, item]) - batch_score(picked)
            assert abs(current[item] - change) < 1e-9


@pytest.mark.parametrize("score", SCORES)
def test_softmax_weight_is_the_loss_over_the_picked(score: str) -> None:
    student, reference = pair(6, 40)
    weights = weights_of(student, reference, score, "softmax")
    picked: list[int] = []
    for chunk in ([3, 30], [5], [9, 12, 39]):
        weights.add(torch.tensor(chunk))
        picked += chunk
        rest = sorted(set(range(40)) - set(picked))
        expected = log_weights(student, reference, score, "softmax", picked)
        assert np.abs(weights.current().numpy() - expected)[rest].max() < 1e-9


def test_a_large_scale_does_not_overflow() -> None:
    # exp(700 * cosine) is beyond float32: a sampler that exponentiates without a maximum subtracted would fail here.
    student, reference = pair(8, 50)
    hot = Embeddings(reference.image, reference.text, 700.0, -300.0)
    gumbel = np.random.default_rng(9).gumbel(size=(5, 50))
    for loss in ("sigmoid", "softmax"):
        expected = algorithm_1(student, hot, 25, "learnability", loss, 1.0, gumbel)
        rows = select_joint(
            float32(student), float32(hot), size=25, num_chunks=5, loss=loss, gumbel=torch.from_numpy(gumbel)
        )
        assert rows.tolist() == expected


def test_the_benchmarks_written_out_forms_are_the_algorithm() -> None:
    student, reference = pair(11, 120)
    gumbel = np.random.default_rng(12).gumbel(size=(6, 120))
    expected = algorithm_1(student, reference, 48, "learnability", "sigmoid", 1.0, gumbel)
    for form in benchmark.FORMS:
        assert benchmark.draw(form, student, reference, 48, torch.from_numpy(gumbel)).tolist() == expected
