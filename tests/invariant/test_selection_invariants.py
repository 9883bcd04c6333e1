# SPDX-License-Identifier: Apache-2.0
"""What holds for every selection, whatever the embeddings."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aced_sdk.curation import Embeddings, gumbel_noise, select_independent, select_joint, select_random
from aced_sdk.errors import CurationError

seeds = st.integers(0, 2**31)
losses = st.sampled_from(("sigmoid", "softmax"))
scores = st.sampled_from(("learnability", "easy_reference", "hard_learner"))
few = settings(max_examples=25, deadline=None)


def model(items: int, seed: int, scale: float = 9.0, bias: float = -4.0) -> Embeddings:
    noise = torch.Generator().manual_seed(seed)
    image, text = torch.randn(2, items, 6, dtype=torch.float64, generator=noise)
    return Embeddings(F.normalize(image, dim=1), F.normalize(image + text, dim=1), scale, bias)


def noise_of(chunks: int, items: int, seed: int) -> Tensor:
    return gumbel_noise(chunks, items, torch.Generator().manual_seed(seed))


@few
@given(
    seed=seeds, chunks=st.integers(1, 6), each=st.integers(1, 5), spare=st.integers(0, 20), loss=losses, score=scores
)
def test_indices_are_distinct_and_in_range(
    seed: int, chunks: int, each: int, spare: int, loss: str, score: str
) -> None:
    size = chunks * each
    items = size + spare
    generator = torch.Generator().manual_seed(seed)
    rows = select_joint(
        model(items, seed),
        model(items, seed + 1, 30.0),
        size=size,
        num_chunks=chunks,
        loss=loss,
        score=score,
        generator=generator,
    )
    assert rows.dtype == torch.int64
    assert rows.shape == (size,)
    assert len(set(rows.tolist())) == size
    assert rows.min() >= 0
    assert rows.max() < items


@few
@given(seed=seeds, loss=losses, score=scores, kept=st.integers(1, 4))
def test_a_shorter_draw_is_a_prefix_of_a_longer_one(seed: int, loss: str, score: str, kept: int) -> None:
    student, reference, noise = model(40, seed), model(40, seed + 1), noise_of(5, 40, seed)
    whole = select_joint(student, reference, size=15, num_chunks=5, loss=loss, score=score, gumbel=noise)
    part = select_joint(student, reference, size=3 * kept, num_chunks=kept, loss=loss, score=score, gumbel=noise[:kept])
    assert whole[: 3 * kept].tolist() == part.tolist()


@few
@given(seed=seeds, loss=losses, score=scores)
def test_permuted_candidates_give_permuted_picks(seed: int, loss: str, score: str) -> None:
    student, reference, noise = model(30, seed), model(30, seed + 1), noise_of(4, 30, seed)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(seed))
    rows = select_joint(student, reference, size=12, num_chunks=4, loss=loss, score=score, gumbel=noise)
    permuted = select_joint(
        student[order], reference[order], size=12, num_chunks=4, loss=loss, score=score, gumbel=noise[:, order]
    )
    assert order[permuted].tolist() == rows.tolist()


@few
@given(seed=seeds, shift=st.floats(-50, 50), loss=losses)
def test_a_constant_on_all_logits_changes_nothing(seed: int, shift: float, loss: str) -> None:
    student, reference, noise = model(30, seed), model(30, seed + 1), noise_of(4, 30, seed)
    rows = select_joint(student, reference, size=12, num_chunks=4, loss=loss, gumbel=noise)
    shifted = select_joint(student, reference, size=12, num_chunks=4, loss=loss, gumbel=noise + shift)
    assert shifted.tolist() == rows.tolist()


@few
@given(seed=seeds, loss=losses, score=scores)
def test_one_chunk_is_independent_selection(seed: int, loss: str, score: str) -> None:
    student, reference, noise = model(30, seed), model(30, seed + 1), noise_of(1, 30, seed)
    joint = select_joint(student, reference, size=10, num_chunks=1, loss=loss, score=score, gumbel=noise)
    alone = select_independent(student, reference, size=10, loss=loss, score=score, gumbel=noise)
    assert joint.tolist() == alone.tolist()


@few
@given(seed=seeds, loss=losses)
def test_a_generator_repeats_itself_and_is_replayed_by_its_noise(seed: int, loss: str) -> None:
    student, reference = model(50, seed), model(50, seed + 1)

    def draw() -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        rows = select_joint(student, reference, size=16, num_chunks=4, loss=loss, generator=generator)
        return rows.tolist()

    replayed = select_joint(student, reference, size=16, num_chunks=4, loss=loss, gumbel=noise_of(4, 50, seed))
    assert draw() == draw() == replayed.tolist()


@few
@given(seed=seeds, loss=losses)
def test_a_masked_item_is_never_drawn(seed: int, loss: str) -> None:
    student, reference, noise = model(20, seed), model(20, seed + 1), noise_of(4, 20, seed)
    noise[:, :8] = -math.inf
    rows = select_joint(student, reference, size=12, num_chunks=4, loss=loss, gumbel=noise)
    assert sorted(rows.tolist()) == list(range(8, 20))
    with pytest.raises(CurationError, match="finite weight"):
        select_joint(student, reference, size=16, num_chunks=4, loss=loss, gumbel=noise)


@few
@given(seed=seeds, loss=losses, score=scores)
def test_drawing_all_draws_all(seed: int, loss: str, score: str) -> None:
    rows = select_joint(model(24, seed), model(24, seed + 1), size=24, num_chunks=8, loss=loss, score=score)
    assert sorted(rows.tolist()) == list(range(24))


@few
@given(seed=seeds, of=st.integers(1, 60))
def test_random_selection_is_distinct_and_repeats(seed: int, of: int) -> None:
    size = max(1, of // 2)
    first, second = (select_random(size, of, torch.Generator().manual_seed(seed)).tolist() for _ in range(2))
    assert first == second
    assert len(set(first)) == size
    assert set(first) <= set(range(of))


def chi_square(counts: Tensor, expected: Tensor) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


def test_first_draws_follow_the_softmax_of_the_diagonal() -> None:
    student, reference = model(12, 1), model(12, 2)
    generator = torch.Generator().manual_seed(0)
    draws = [select_joint(student, reference, size=1, num_chunks=1, gain=1.5, generator=generator) for _ in range(3000)]
    counts = torch.bincount(torch.cat(draws), minlength=12)
    losses_of = [F.softplus(-(m.scale * (m.image * m.text).sum(1) + m.bias)) for m in (student, reference)]
    expected = 3000 * (1.5 * (losses_of[0] - losses_of[1])).softmax(0)
    # The 99.9 % point of chi-square with 11 degrees of freedom.
    assert chi_square(counts, expected) < 31.3


def test_second_chunks_follow_the_conditional_softmax() -> None:
    student = model(5, 3, scale=4.0, bias=-1.0)
    generator = torch.Generator().manual_seed(1)
    draws = [
        select_joint(student, None, size=2, num_chunks=2, score="hard_learner", generator=generator)
        for _ in range(3000)
    ]
    pairs = torch.stack(draws)
    logits = 4.0 * student.image @ student.text.T - 1.0
    losses_of = F.softplus(logits)
    own = F.softplus(-logits.diagonal())
    expected = torch.zeros(5, 5, dtype=torch.float64)
    for first in range(5):
        after = own + losses_of[first] + losses_of[:, first]
        after[first] = -math.inf
        expected[first] = 3000 * own.softmax(0)[first] * after.softmax(0)
    counts = torch.bincount(5 * pairs[:, 0] + pairs[:, 1], minlength=25).reshape(5, 5)
    off = ~torch.eye(5, dtype=torch.bool)
    # The 99.9 % point of chi-square with 19 degrees of freedom.
    assert chi_square(counts[off], expected[off]) < 43.8
