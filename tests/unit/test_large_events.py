# SPDX-License-Identifier: Apache-2.0
"""Events, statistics and filters of pools and super-batches of any size stay small."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from aced_sdk.curation import DrawStatistics, statistics
from aced_sdk.curation.statistics import even_pool_size
from aced_sdk.data import RowSet
from aced_sdk.data.rowset import BLOCK
from aced_sdk.errors import CurationError
from aced_sdk.reporting import JsonlWriter, read_events
from aced_sdk.training.events import Selected, digests
from aced_sdk.training.filtering import best_rows


def selected(rows: np.ndarray, candidates: np.ndarray) -> Selected:
    scores = {"candidates": (-2.0, -1.0, 0.0, 1.0, 2.0), "picked": (-1.0, 0.0, 1.0, 2.0, 3.0)}
    of = dict.fromkeys(("unique_coverage", "top_decile_fraction", "effective_pool_size", "noisy_selected"), 0.5)
    picked = torch.from_numpy(rows)
    return Selected(1, tuple(rows.tolist()), tuple(candidates.tolist()), of, scores, *digests(picked))


def test_a_log_entry_of_a_large_super_batch_has_digests_in_place_of_rows(tmp_path: Path) -> None:
    candidates = np.random.default_rng(0).permutation(10**8)[:163_840]
    event = selected(candidates[:32_768], candidates)
    with JsonlWriter(tmp_path / "events.jsonl") as writer:
        writer(event)
    assert (tmp_path / "events.jsonl").stat().st_size < 2000
    (row,) = read_events(tmp_path / "events.jsonl")
    assert row["digest"] == hashlib.sha256(candidates[:32_768].astype("<i8").tobytes()).hexdigest()
    assert row["digest_set"] == hashlib.sha256(np.sort(candidates[:32_768]).astype("<i8").tobytes()).hexdigest()
    assert "picked" not in row


def test_a_log_entry_of_a_small_super_batch_has_its_rows() -> None:
    event = selected(np.array([3, 1]), np.array([1, 2, 3]))
    row = json.loads(json.dumps(event.to_dict()))
    assert (row["picked"], row["candidates"]) == ([3, 1], [1, 2, 3])
    swapped = selected(np.array([1, 3]), np.array([1, 2, 3]))
    assert event.digest != swapped.digest
    assert event.digest_set == swapped.digest_set


def test_draws_of_a_large_pool_are_counted_in_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "MAX_COUNTED", 20_000)
    pairs = 400_000
    sampled = DrawStatistics(pairs)
    monkeypatch.setattr(statistics, "MAX_COUNTED", pairs)
    exact = DrawStatistics(pairs)
    dice = np.random.default_rng(0)
    for _ in range(60):
        rows = (dice.random(20_000) ** 2 * pairs).astype(np.int64)  # the first rows are drawn more often
        sampled.update(rows)
        exact.update(rows)
    found, expected = sampled.summary(), exact.summary()
    assert sampled.counts.nbytes == 80_000
    assert found.draws == expected.draws == 1_200_000
    for name in ("unique_coverage", "top_decile_fraction", "effective_pool_size"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=0.03), name
    again = DrawStatistics.__new__(DrawStatistics)
    again.__dict__.update(sampled.__dict__)
    again.load_state_dict(sampled.state_dict())
    assert again.summary() == found
    assert expected.effective_pool_size < even_pool_size(1_200_000, pairs)


class Cache:
    """Embeddings whose score is a known number per row."""

    def __init__(self, scores: np.ndarray) -> None:
        self.scores = scores

    def blocks(self, rows_at_once: int) -> Iterator[tuple[range, Any]]:
        for start in range(0, len(self.scores), rows_at_once):
            block = range(start, min(start + rows_at_once, len(self.scores)))
            yield block, torch.from_numpy(self.scores[block.start : block.stop])


@pytest.mark.parametrize("levels", [3, 10**9])
@pytest.mark.parametrize("fraction", [0.000001, 0.2, 0.77, 1.0])
def test_a_static_filter_keeps_what_a_sort_keeps(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, levels: int, fraction: float
) -> None:
    monkeypatch.setenv("ACED_HOME", str(tmp_path))
    pairs = BLOCK + 12_345
    dice = np.random.default_rng(1)
    scores = (dice.integers(-levels, levels, pairs) / 7).astype(np.float32)
    usable = dice.random(pairs) < 0.9
    selector: Any = SimpleNamespace(keep_fraction=fraction, pool_scores=lambda scores: scores)
    cache: Any = Cache(scores)
    kept = best_rows(RowSet.of(pairs, lambda block: usable[block]), cache, selector)
    rows = np.flatnonzero(usable)
    best = rows[np.argsort(-scores[rows], kind="stable")][: max(1, round(fraction * len(rows)))]
    np.testing.assert_array_equal(np.flatnonzero(kept(np.arange(pairs))), np.sort(best))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("scores", [torch.tensor([float("nan"), 1.0]), torch.ones(1), torch.ones(3)])
def test_scores_that_are_no_numbers_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, scores: torch.Tensor
) -> None:
    monkeypatch.setenv("ACED_HOME", str(tmp_path))
    selector: Any = SimpleNamespace(keep_fraction=0.5, pool_scores=lambda _: scores)
    cache: Any = Cache(np.zeros(2, dtype=np.float32))
    with pytest.raises(CurationError, match="not finite"):
        best_rows(RowSet(2), cache, selector)


def test_scores_need_room_on_the_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("ACED_HOME", str(tmp_path / "file"))
    selector: Any = SimpleNamespace(keep_fraction=0.5, pool_scores=lambda scores: scores)
    cache: Any = Cache(np.zeros(2, dtype=np.float32))
    with pytest.raises(CurationError, match="cannot be stored"):
        best_rows(RowSet(2), cache, selector)
