# SPDX-License-Identifier: Apache-2.0
"""What a selection does to its pool: draw counts against the direct formulas, collapse, quantiles of scores."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import logsigmoid, normalize

from aced_sdk.config import Curation, Iid, Independent, Joint, StaticFilter
from aced_sdk.curation import (
    COLLAPSE_REMEDY,
    DrawStatistics,
    Embeddings,
    even_pool_size,
)
from aced_sdk.errors import CurationError

PAIRS = 2000


def counted(rows: npt.NDArray[np.int64], pairs: int = PAIRS) -> DrawStatistics:
    statistics = DrawStatistics(pairs)
    statistics.update(rows)
    return statistics


# --- measures ----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_measures_kept_up_step_by_step_are_those_of_the_counts(data: st.DataObject) -> None:
    pairs = data.draw(st.integers(1, 40))
    steps = data.draw(st.lists(st.lists(st.integers(0, pairs - 1), min_size=1, max_size=30), min_size=1, max_size=6))
    resumed_at = data.draw(st.integers(0, len(steps)))
    statistics = DrawStatistics(pairs)
    for number, rows in enumerate(steps):
        if number == resumed_at:
            fresh = DrawStatistics(pairs)
            fresh.load_state_dict(statistics.state_dict())
            statistics = fresh
        statistics.update(np.array(rows))

    counts = np.bincount(np.concatenate([np.array(rows) for rows in steps]), minlength=pairs)
    share = counts[counts > 0] / counts.sum()
    top = max(1, round(pairs / 10))
    summary = statistics.summary()
    assert statistics.counts.tolist() == counts.tolist()
    assert summary.draws == counts.sum()
    assert summary.unique_coverage == (counts > 0).sum() / pairs
    assert summary.top_decile_fraction == np.sort(counts)[-top:].sum() / counts.sum()
    assert summary.effective_pool_size == pytest.approx(float(np.exp(-(share * np.log(share)).sum())), rel=1e-12)


@pytest.mark.parametrize("draws", [1, 600, PAIRS, 15_000, 400_000])
def test_what_even_draws_reach_is_what_they_reach(draws: int) -> None:
    rows = np.random.default_rng(3).integers(0, PAIRS, draws)
    reached = counted(rows).summary().effective_pool_size
    assert even_pool_size(draws, PAIRS) == pytest.approx(reached, rel=0.015)


def test_even_draws_of_nothing_reach_nothing_and_of_much_reach_all() -> None:
    assert even_pool_size(0, 10) == 0
    assert even_pool_size(10**9, 10) == pytest.approx(10)
    assert even_pool_size(100, 10**9) == pytest.approx(100)


# --- collapse ----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(pairs=st.integers(1, 3000), passes=st.floats(1, 8), seed=st.integers(0, 2**32 - 1))
def test_even_draws_never_warn(pairs: int, passes: float, seed: int) -> None:
    rows = np.random.default_rng(seed).integers(0, pairs, round(passes * pairs))
    assert counted(rows, pairs).collapsed(0.2) is None


def test_a_healthy_selection_does_not_warn() -> None:
    # A fixed preference as of a curated run: after five passes' worth of draws, a third of the pool was never drawn.
    generator = np.random.default_rng(0)
    weights = np.exp(generator.normal(0, 1.8, PAIRS))
    statistics = counted(generator.choice(PAIRS, 5 * PAIRS, p=weights / weights.sum()))
    assert 0.5 < statistics.summary().unique_coverage < 0.75
    assert statistics.collapsed(0.2) is None


def test_draws_of_a_narrow_part_warn_with_figures() -> None:
    narrow = np.random.default_rng(0).integers(0, 100, 2 * PAIRS)
    told = counted(narrow).collapsed(0.2)
    assert told is not None
    assert told.startswith("the draws have collapsed onto about 99 of 2,000 pairs (effective pool size after 4,000")
    assert told.endswith("uniform draws would reach about 1,504)")
    assert counted(narrow).collapsed(0.05) is None
    assert "curation.gain" in COLLAPSE_REMEDY


def test_fewer_draws_than_pairs_say_nothing_yet() -> None:
    assert counted(np.zeros(PAIRS - 1, dtype=np.int64)).collapsed(0.2) is None
    assert counted(np.zeros(PAIRS, dtype=np.int64)).collapsed(0.2) is not None
    assert DrawStatistics(5).collapsed(0.2) is None


# --- scores ------------------------------------------------------------------------------------------------------


def embeddings(seed: int, scale: float, bias: float) -> Embeddings:
    image, text = torch.randn(2, 64, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Embeddings(normalize(image, dim=1), normalize(text, dim=1), scale, bias)


STUDENT, REFERENCE = embeddings(0, 9.0, -8.0), embeddings(1, 20.0, -7.0)


def cosine(model: Embeddings) -> torch.Tensor:
    return (model.image * model.text).sum(dim=1) * model.scale


def sigmoid_loss(model: Embeddings) -> torch.Tensor:
    return -logsigmoid(cosine(model) + model.bias)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (Joint(sub_batch=16, super_batch=64, gain=3), sigmoid_loss(STUDENT) - sigmoid_loss(REFERENCE)),
        (Joint(sub_batch=16, super_batch=64, loss="softmax"), cosine(REFERENCE) - cosine(STUDENT)),
        (Independent(sub_batch=16, super_batch=64, score="easy_reference"), -sigmoid_loss(REFERENCE)),
        (Independent(sub_batch=16, super_batch=64, score="hard_learner"), sigmoid_loss(STUDENT)),
    ],
)
def test_quantiles_are_of_each_pairs_own_score(config: Curation, expected: torch.Tensor) -> None:
    picked = config.build().select(STUDENT, REFERENCE, torch.Generator().manual_seed(0))
    told = config.build().quantiles(STUDENT, REFERENCE, picked)
    levels = [0.05, 0.25, 0.5, 0.75, 0.95]
    assert told["candidates"] == pytest.approx(np.quantile(expected.numpy(), levels).tolist())
    assert told["picked"] == pytest.approx(np.quantile(expected[picked].numpy(), levels).tolist())
    assert told["picked"][2] > told["candidates"][2]  # what is picked scores higher


def test_quantiles_carry_no_gradient_and_leave_the_embeddings_alone() -> None:
    student = Embeddings(STUDENT.image.clone().requires_grad_(), STUDENT.text, torch.tensor(9.0), torch.tensor(-8.0))
    before = student.image.detach().clone()
    picked = torch.arange(4)
    told = Independent(sub_batch=4, super_batch=64).build().quantiles(student, REFERENCE, picked)
    assert all(type(value) is float for values in told.values() for value in values)
    assert torch.equal(student.image.detach(), before)


def test_configs_that_score_nothing_have_no_quantiles() -> None:
    assert Iid().build().quantiles(None, None, torch.arange(4)) == {}
    assert StaticFilter().build().quantiles(None, REFERENCE, torch.arange(4)) == {}
    with pytest.raises(CurationError, match="student's embeddings"):
        Joint().build().quantiles(None, REFERENCE, torch.arange(4))
