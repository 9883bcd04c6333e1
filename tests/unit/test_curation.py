# SPDX-License-Identifier: Apache-2.0
"""Selectors by config, what they refuse, what they cost, and the statistics of draws."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from aced_sdk.config import Iid, Independent, Joint, StaticFilter
from aced_sdk.curation import (
    DrawStatistics,
    Embeddings,
    gumbel_noise,
    pair_scores,
    select_independent,
    select_joint,
    select_random,
    static_filter,
)
from aced_sdk.curation import scores as scores_module
from aced_sdk.errors import CurationError


def model(items: int, seed: int, dim: int = 8, scale: float = 12.0, bias: float = -6.0) -> Embeddings:
    noise = torch.Generator().manual_seed(seed)
    image, text = torch.randn(2, items, dim, generator=noise)
    return Embeddings(F.normalize(image, dim=1), F.normalize(image + text, dim=1), scale, bias)


STUDENT, REFERENCE = model(40, 0), model(40, 1, dim=12)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def test_select_follows_the_config() -> None:
    joint = Joint(super_batch=40, sub_batch=8, num_chunks=4, score="learnability", loss="softmax", gain=2.0)
    expected = select_joint(STUDENT, REFERENCE, size=8, num_chunks=4, loss="softmax", gain=2.0, generator=generator())
    assert joint.build().select(STUDENT, REFERENCE, generator()).tolist() == expected.tolist()
    independent = Independent(super_batch=40, sub_batch=8, score="easy_reference", gain=3.0)
    alone = select_independent(None, REFERENCE, size=8, score="easy_reference", gain=3.0, generator=generator())
    assert independent.build().select(None, REFERENCE, generator()).tolist() == alone.tolist()
    for config in (Iid(sub_batch=5), StaticFilter(sub_batch=5)):
        assert config.build().select(None, None, generator()).tolist() == [0, 1, 2, 3, 4]


def test_models_a_score_does_not_use_are_not_needed() -> None:
    noise = gumbel_noise(4, 40, generator())
    for score, pair in (("easy_reference", (None, REFERENCE)), ("hard_learner", (STUDENT, None))):
        rows = select_joint(*pair, size=8, num_chunks=4, score=score, gumbel=noise)
        assert (
            rows.tolist() == select_joint(STUDENT, REFERENCE, size=8, num_chunks=4, score=score, gumbel=noise).tolist()
        )


def with_nan(embeddings: Embeddings) -> Embeddings:
    text = embeddings.text.clone()
    text[[3, 9], 0] = torch.tensor([math.nan, math.inf])
    return replace(embeddings, text=text)


def longer(embeddings: Embeddings, length: float, dtype: torch.dtype = torch.float32) -> Embeddings:
    """One caption's embedding is not of unit length."""
    text = embeddings.text.clone()
    text[7] *= length
    return replace(embeddings, image=embeddings.image.to(dtype), text=text.to(dtype))


@pytest.mark.parametrize(
    ("student", "reference", "options", "message", "field"),
    [
        (STUDENT, REFERENCE, {"size": 41, "num_chunks": 1}, "41 from 40 candidates", "size"),
        (STUDENT, REFERENCE, {"size": 10}, "does not divide into 4", "num_chunks"),
        (STUDENT, REFERENCE, {"num_chunks": 0}, "does not divide", "num_chunks"),
        (STUDENT, REFERENCE, {"size": 0}, "does not divide", "num_chunks"),
        (None, REFERENCE, {}, "needs the student's", "student"),
        (STUDENT, None, {}, "needs the reference's", "reference"),
        (None, None, {"score": "easy_reference"}, "needs the reference's", "reference"),
        (STUDENT, with_nan(REFERENCE), {}, "2 of 40 rows of the reference's", "reference"),
        (with_nan(STUDENT), REFERENCE, {}, "2 of 40 rows of the student's", "student"),
        (STUDENT, replace(REFERENCE, scale=math.inf), {}, "scale or bias is not finite", "reference"),
        (longer(STUDENT, 1.05), REFERENCE, {}, "the student's embeddings are not L2-normalised.*1.05$", "student"),
        (STUDENT, longer(REFERENCE, 0.97), {"loss": "softmax"}, "the reference's embeddings.*0.97$", "reference"),
        (STUDENT, longer(REFERENCE, 1.06, torch.bfloat16), {}, "reference's embeddings are not L2", "reference"),
        (replace(STUDENT, image=5 * STUDENT.image), REFERENCE, {}, "has length 5", "student"),
        (replace(STUDENT, scale=0.0), REFERENCE, {}, "the student's scale is 0", "student"),
        (STUDENT, replace(REFERENCE, scale=-3.0), {"loss": "softmax"}, "the reference's scale is -3", "reference"),
        (replace(STUDENT, scale=math.log(10), bias=-10.0), REFERENCE, {}, "looks like a logarithm", "student"),
        (STUDENT, replace(REFERENCE, scale=math.log(117), bias=-12.9), {}, "looks like a logarithm", "reference"),
        (STUDENT, model(39, 1), {}, "40 pairs and the reference 39", "reference"),
        (replace(STUDENT, text=STUDENT.text[:5]), REFERENCE, {}, "shapes", "student"),
        (STUDENT, REFERENCE, {"gumbel": torch.zeros(3, 40)}, "shape", "gumbel"),
        (STUDENT, REFERENCE, {"gumbel": torch.full((4, 40), math.nan)}, "finite weight", "gumbel"),
        (STUDENT, REFERENCE, {"gain": 0.0}, "gain", "gain"),
        (STUDENT, REFERENCE, {"score": "easiest"}, "unknown score", "score"),
        (STUDENT, REFERENCE, {"loss": "hinge"}, "unknown loss", "loss"),
    ],
)
def test_select_joint_refuses(
    student: Embeddings | None, reference: Embeddings | None, options: dict[str, Any], message: str, field: str
) -> None:
    with pytest.raises(CurationError) as caught:
        select_joint(student, reference, **({"size": 8, "num_chunks": 4} | options))
    assert re.search(message, caught.value.cause)
    assert caught.value.field == field
    assert caught.value.remedy


@pytest.mark.parametrize(
    "student",
    [
        replace(STUDENT, scale=1.0, bias=0.0),
        replace(STUDENT, scale=10.0, bias=-16.0),  # a student that holds all its logits down, early in training
        longer(STUDENT, 1.01),
        longer(STUDENT, 1.03, torch.bfloat16),
        longer(STUDENT, 1.0, torch.float16),
    ],
)
def test_what_only_looks_odd_is_accepted(student: Embeddings) -> None:
    assert len(select_joint(student, REFERENCE, size=8, num_chunks=4)) == 8
    softmax = replace(student, scale=math.log(10), bias=-10.0)  # the bias is not read
    assert len(select_joint(softmax, REFERENCE, size=8, num_chunks=4, loss="softmax")) == 8


def test_remedies_name_the_cure() -> None:
    for student, cure in (
        (longer(STUDENT, 2.0), "torch.nn.functional.normalize"),
        (replace(STUDENT, scale=math.log(10), bias=-10.0), "exp\\(log_scale\\)"),
        (replace(STUDENT, scale=-1.0), "exp\\(log_scale\\)"),
    ):
        with pytest.raises(CurationError, match=f"Remedy: .*{cure}"):
            select_independent(student, REFERENCE, size=8)


def test_other_selectors_refuse() -> None:
    with pytest.raises(CurationError, match="shape"):
        select_independent(STUDENT, REFERENCE, size=8, gumbel=torch.zeros(2, 40))
    with pytest.raises(CurationError, match="positive"):
        select_independent(STUDENT, REFERENCE, size=0)
    with pytest.raises(CurationError, match="cannot draw 9 of 8 items"):
        select_random(9, 8)
    with pytest.raises(CurationError, match="keep_fraction"):
        static_filter(REFERENCE, 0.0)
    with pytest.raises(CurationError, match="not finite"):
        static_filter(with_nan(REFERENCE), 0.5)
    with pytest.raises(CurationError, match="not L2-normalised"):
        static_filter(longer(REFERENCE, 1.1), 0.5)
    with pytest.raises(CurationError, match="logarithm"):
        pair_scores(replace(REFERENCE, scale=2.3, bias=-10.0))


def test_half_precision_and_autocast_do_not_change_the_arithmetic() -> None:
    noise = gumbel_noise(4, 40, generator())
    half = [replace(m, image=m.image.bfloat16(), text=m.text.bfloat16()) for m in (STUDENT, REFERENCE)]
    widened = [replace(m, image=m.image.float(), text=m.text.float()) for m in half]
    expected = select_joint(*widened, size=16, num_chunks=4, gumbel=noise).tolist()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert select_joint(*half, size=16, num_chunks=4, gumbel=noise).tolist() == expected
        assert scores_module.weights_of(*half, "learnability", "sigmoid").current().dtype == torch.float32


def test_matrix_precision_is_given_back() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        select_joint(STUDENT, REFERENCE, size=8, num_chunks=2)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_learned_scale_is_read_and_gets_no_gradient() -> None:
    noise = gumbel_noise(4, 40, generator())
    learned = replace(
        STUDENT,
        image=STUDENT.image.clone().requires_grad_(),
        scale=torch.tensor(12.0, requires_grad=True),
        bias=torch.tensor(-6.0, requires_grad=True),
    )
    rows = select_joint(learned, REFERENCE, size=8, num_chunks=4, gumbel=noise)
    assert rows.tolist() == select_joint(STUDENT, REFERENCE, size=8, num_chunks=4, gumbel=noise).tolist()
    assert (
        not scores_module.weights_of(replace(learned, image=STUDENT.image), REFERENCE, "learnability", "sigmoid")
        .current()
        .requires_grad
    )


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_no_square_matrix_is_built(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    items, size, chunks = 1000, 400, 4
    student, reference = model(items, 2), model(items, 3)
    with LargestTensor() as largest:
        whole = select_joint(student, reference, size=size, num_chunks=chunks, loss=loss, generator=generator())
    assert items < largest.elements <= size // chunks * items
    # Slabs are themselves cut: the picks stay.
    monkeypatch.setattr(scores_module, "_CPU_SLAB", 7 * items)
    monkeypatch.setattr(scores_module, "_LEAST_LINES", 1)
    with LargestTensor() as largest:
        cut = select_joint(student, reference, size=size, num_chunks=chunks, loss=loss, generator=generator())
    assert largest.elements <= 8 * items
    assert cut.tolist() == whole.tolist()


def test_static_filter_keeps_the_easiest(monkeypatch: pytest.MonkeyPatch) -> None:
    cosine = (REFERENCE.image * REFERENCE.text).sum(1)
    best = cosine.argsort(descending=True).tolist()
    for loss in ("sigmoid", "softmax"):
        assert static_filter(REFERENCE, 0.2, loss).tolist() == best[:8]
    assert static_filter(REFERENCE, 1.0).tolist() == best
    assert static_filter(REFERENCE, 0.001).tolist() == best[:1]
    expected = F.logsigmoid(12.0 * cosine - 6.0)
    monkeypatch.setattr("aced_sdk.curation.selectors.ROWS_AT_ONCE", 7)
    torch.testing.assert_close(pair_scores(REFERENCE), expected)
    assert (
        pair_scores(replace(REFERENCE, image=REFERENCE.image.half(), text=REFERENCE.text.half())).dtype == torch.float32
    )


def test_draw_statistics() -> None:
    statistics = DrawStatistics(20)
    empty = statistics.summary()
    assert (empty.draws, empty.unique_coverage) == (0, 0.0)
    statistics.update(torch.tensor([0, 7, 7, 7]))
    statistics.update(np.array([7, 8]))
    summary = statistics.summary()
    assert summary.draws == 6
    assert summary.unique_coverage == 3 / 20
    assert summary.top_decile_fraction == 5 / 6
    entropy = -(4 / 6 * math.log(4 / 6) + 2 * (1 / 6) * math.log(1 / 6))
    assert summary.effective_pool_size == pytest.approx(math.exp(entropy))
    assert statistics.counts.dtype == np.int32
    assert statistics.counts[7] == 4


def test_an_even_draw_uses_the_whole_pool() -> None:
    statistics = DrawStatistics(50)
    statistics.update(torch.arange(50))
    summary = statistics.summary()
    assert summary.effective_pool_size == pytest.approx(50)
    assert summary.unique_coverage == 1
    assert summary.top_decile_fraction == pytest.approx(0.1)


def test_draw_statistics_go_on_from_a_checkpoint() -> None:
    first = DrawStatistics(10)
    first.update(np.array([1, 2, 2]))
    state = first.state_dict()
    first.update(np.array([3]))
    second = DrawStatistics(10)
    second.load_state_dict(state)
    second.update(np.array([3]))
    assert second.summary() == first.summary()
    assert second.counts.tolist() == first.counts.tolist()
    with pytest.raises(CurationError, match="counts of 10 pairs"):
        DrawStatistics(11).load_state_dict(state)
    with pytest.raises(CurationError, match="no counts"):
        second.load_state_dict({})


def test_draw_statistics_refuse() -> None:
    statistics = DrawStatistics(10)
    for rows in ([10], [-1]):
        with pytest.raises(CurationError, match="pool of 10"):
            statistics.update(np.array(rows))
    assert statistics.summary().draws == 0
    with pytest.raises(CurationError, match="0 pairs"):
        DrawStatistics(0)
    with pytest.raises(ValueError, match="read-only"):
        statistics.counts[0] = 1


def test_a_missing_side_is_named() -> None:
    for side in ("image", "text"):
        broken = replace(REFERENCE, **{side: None})
        with pytest.raises(CurationError, match=f"reference's {side} embeddings are NoneType"):
            select_joint(None, broken, size=8, num_chunks=4, score="easy_reference")


def test_a_random_selection_without_a_generator_follows_torchs_seed() -> None:
    torch.manual_seed(3)
    first = select_random(5, 40)
    torch.manual_seed(3)
    assert torch.equal(first, torch.randperm(40)[:5])
    assert not torch.equal(first, select_random(5, 40))


def test_selection_builds_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    plain = scores_module.Term.diagonal

    def diagonal(term: scores_module.Term) -> Tensor:
        seen.append(torch.is_grad_enabled())
        return plain(term)

    monkeypatch.setattr(scores_module.Term, "diagonal", diagonal)
    learning = replace(STUDENT, image=STUDENT.image.clone().requires_grad_())
    for select_one in (select_joint, select_independent):
        assert not select_one(learning, REFERENCE, size=16).requires_grad
    pair_scores(learning)
    assert seen == [False] * 4
    assert torch.is_grad_enabled()
