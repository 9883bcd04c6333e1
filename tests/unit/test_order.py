# SPDX-License-Identifier: Apache-2.0
"""The order of the pool: each pair once per epoch, the same for any number of ranks, from any state."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aced_sdk.config import Data
from aced_sdk.data import FullOrder, Order, RowSet, SuperBatch, SuperBatches, WindowOrder, build_order, own_lanes
from aced_sdk.data.order import Listed, Mixing, default_lanes
from aced_sdk.data.permutation import Permutation
from aced_sdk.data.rowset import Rows
from aced_sdk.errors import ConfigError, DataError


class Numbers:
    """A source whose pictures are their row numbers; some rows are unusable when they are read."""

    def __init__(self, unusable: frozenset[int] = frozenset()) -> None:
        self.unusable = unusable
        self.seen, self.skipped = 0, Counter[str]()

    def usable(self, block: slice) -> np.ndarray:
        return np.ones(block.stop - block.start, dtype=np.bool_)

    def fetch(self, rows: Rows) -> SuperBatch:
        kept = torch.tensor([row for row in rows.tolist() if row not in self.unusable], dtype=torch.int64)
        return SuperBatch(kept[:, None], kept[:, None], kept)


def shards(*sizes: int) -> list[range]:
    ends = np.cumsum(sizes).tolist()
    return [range(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def orders(lanes: int, seed: int = 0) -> list[Order]:
    parts = shards(*([7, 3, 12, 5] * 4))
    sources = [parts[:10], parts[10:]]
    ranges = [range(part[0].start, part[-1].stop) for part in sources]
    return [
        FullOrder([range(108)], lanes, seed),
        FullOrder(ranges, lanes, seed, (1, 3)),
        WindowOrder([parts], lanes, seed, 2),
        WindowOrder(sources, lanes, seed, 3, (2, 1)),
    ]


def taken(order: Order, count: int) -> Rows:
    return order.rows(np.arange(order.lanes), order.start(), count)


@pytest.mark.parametrize("size", [1, 2, 5, 255, 65_536, 65_537, 100_003, 2**20])
def test_a_permutation_gives_each_number_once(size: int) -> None:
    numbers = Permutation(size, 3, 4)(np.arange(size))
    np.testing.assert_array_equal(np.sort(numbers), np.arange(size))
    assert size < 5 or not np.array_equal(numbers, Permutation(size, 3, 5)(np.arange(size)))


def test_a_permutation_is_uniform_and_uncorrelated() -> None:
    numbers = Permutation(10**9, 0)(np.arange(200_000))
    assert len(np.unique(numbers)) == 200_000
    counts = np.histogram(numbers, 100, (0, 10**9))[0]
    assert ((counts - 2000) ** 2 / 2000).sum() < 180  # chi-squared with 99 degrees of freedom
    for lag in (1, 2, 64, 1000):
        assert abs(np.corrcoef(numbers[:-lag], numbers[lag:])[0, 1]) < 0.01
    bits = (numbers[:, None] >> np.arange(29) & 1).mean(axis=0)
    assert np.abs(bits[:20] - 0.5).max() < 0.01


def test_a_full_order_is_one_permutation_after_another() -> None:
    rows = taken(FullOrder([range(100, 148)], 8, 1), 18).T.ravel()  # position p belongs to lane p mod 8
    for epoch in range(3):
        assert sorted(rows[48 * epoch : 48 * epoch + 48]) == list(range(100, 148))
    assert not np.array_equal(rows[:48], rows[48:96])


def test_windows_give_each_pair_of_the_shards_of_a_lane_once_per_epoch() -> None:
    parts = shards(*([10] * 12))
    rows = taken(WindowOrder([parts], 4, 0, 2), 60)  # a lane has 3 shards of 10 pairs
    for epoch in range(2):
        assert sorted(rows[:, 30 * epoch : 30 * epoch + 30].ravel()) == list(range(120))
    lane = rows[0, :30] // 10
    assert len(set(lane[:20])) == 2  # two shards are shuffled together,
    assert len(set(lane[20:])) == 1  # then the third
    assert not np.array_equal(lane[:20], np.sort(lane[:20]))


@pytest.mark.parametrize("kind", [1, 3])
def test_sources_are_mixed_in_proportion(kind: int) -> None:
    order = orders(4)[kind]
    rows = taken(order, 5000)
    first = (rows < 64).mean()  # pairs of the first source
    assert first == pytest.approx(1 / 4 if kind == 1 else 2 / 3, abs=0.01)
    counts = np.bincount(rows.ravel(), minlength=108)
    for part in (counts[:64], counts[64:]):  # within a source, pairs are read equally often
        assert part.max() - part.min() <= (1 if kind == 1 else 0.25 * part.mean())


@settings(deadline=None, max_examples=300)
@given(kind=st.integers(0, 3), counts=st.lists(st.integers(0, 40), min_size=1, max_size=8), seed=st.integers(0, 99))
def test_any_pieces_join_to_the_same_sequence(kind: int, counts: list[int], seed: int) -> None:
    order = orders(4, seed)[kind]
    whole, lanes, state = taken(order, sum(counts)), np.arange(4), order.start()
    at = 0
    for count in counts:
        np.testing.assert_array_equal(order.rows(lanes, state, count), whole[:, at : at + count])
        for lane in (0, 3):
            some = orders(4, seed)[kind].rows(np.array([lane]), state[[lane]], count)
            np.testing.assert_array_equal(some[0], whole[lane, at : at + count])
        state = order.advance(lanes, state, np.full(4, count))
        at += count


def stream(
    order: Order, state: Rows, world: int, steps: int, source: Numbers, allowed: RowSet
) -> tuple[list[Any], Rows]:
    """Super-batches of 16 pairs, read by `world` ranks and put together again."""
    parts = [
        SuperBatches(source, order, 16, state, allowed, own_lanes(order.lanes, rank, world)) for rank in range(world)
    ]
    found = []
    for _ in range(steps):
        batches = [next(part) for part in parts]
        each = 16 // order.lanes
        rows = np.concatenate([batch.rows.numpy().reshape(each, -1) for batch, _ in batches], axis=1)
        found.append(rows.ravel().tolist())
        lanes = [own_lanes(order.lanes, rank, world) for rank in range(world)]
        state = state.copy()
        for (_, after), own in zip(batches, lanes, strict=True):
            state[own] = after[own]
    for part in parts:
        part.close()
    return found, state


@settings(deadline=None, max_examples=40)
@given(
    kind=st.integers(0, 3),
    worlds=st.lists(st.sampled_from([1, 2, 4]), min_size=2, max_size=4),
    seed=st.integers(0, 99),
    unusable=st.frozensets(st.integers(0, 107), max_size=30),
    barred=st.frozensets(st.integers(0, 107), max_size=60),
)
def test_any_number_of_ranks_reads_the_same_super_batches(
    kind: int, worlds: list[int], seed: int, unusable: frozenset[int], barred: frozenset[int]
) -> None:
    order, source = orders(4, seed)[kind], Numbers(unusable)
    allowed = RowSet.of(108, lambda block: ~np.isin(np.arange(block.start, block.stop), list(barred)))
    expected, end = stream(order, order.start(), 1, 3 * len(worlds), source, allowed)
    found, state = [], order.start()
    for world in worlds:  # the number of ranks changes every three steps
        some, state = stream(order, state, world, 3, source, allowed)
        found += some
    assert found == expected
    np.testing.assert_array_equal(state, end)
    assert not {row for rows in found for row in rows} & (unusable | barred)


def test_no_pair_is_repeated_or_lost_over_an_epoch() -> None:
    source = Numbers(frozenset({5, 50}))
    order = FullOrder([range(108)], 4, 0)
    allowed = RowSet.of(108, lambda block: np.arange(block.start, block.stop) != 7)
    found, state = stream(order, order.start(), 2, 6, source, allowed)
    rows = [row for batch in found for row in batch]
    assert len(rows) == len(set(rows)) == 96
    consumed = order.rows(np.arange(4), order.start(), int(state.max()))
    lost = {int(row) for lane in range(4) for row in consumed[lane, : state[lane, 0]]} - set(rows)
    assert lost <= {5, 50, 7}


def test_nothing_usable_ends_with_an_error() -> None:
    order = FullOrder([range(20)], 4, 0)
    batches = SuperBatches(Numbers(frozenset(range(20))), order, 16, order.start(), RowSet(20))
    with pytest.raises(DataError, match="no pair of the pool is usable"):
        next(batches)
    batches.close()


def test_lanes_must_fit() -> None:
    data = Data(shards=("a", "b"))
    parts = shards(4, 4, 4, 4)

    def build(candidates: int, **changes: Any) -> Order:
        return build_order(data.replace(**changes), parts, [1, 3], candidates, 0)

    assert [default_lanes(count) for count in (1, 12, 64, 20_480, 163_840)] == [1, 4, 64, 64, 64]
    assert build(24).lanes == 8
    assert build(24, order="windows").lanes == 4
    for field, candidates, changes in (
        ("data.lanes", 24, {"lanes": 16}),
        ("data.lanes", 24, {"lanes": 8, "order": "windows"}),
        ("data.lanes", 24, {"lanes": 4, "order": "windows", "weights": (1.0, 1.0)}),
    ):
        with pytest.raises(ConfigError) as caught:
            build(candidates, **changes)
        assert caught.value.field == field
    with pytest.raises(ConfigError, match="3 ranks do not divide the 8 lanes"):
        own_lanes(8, 0, 3)
    with pytest.raises(ConfigError, match="1 weights for 2 entries"):
        data.replace(weights=(1.0,))


def test_a_row_set_holds_what_it_was_made_of() -> None:
    chosen = np.random.default_rng(0).random(3_000_001) < 0.3
    rows = RowSet.of(len(chosen), lambda block: chosen[block])
    assert len(rows) == chosen.sum()
    asked = np.random.default_rng(1).integers(0, len(chosen), (3, 500))
    np.testing.assert_array_equal(rows(asked), chosen[asked])
    np.testing.assert_array_equal(rows.rows(slice(2**20, 2**20 + 100)), 2**20 + np.flatnonzero(chosen[2**20 :][:100]))
    assert RowSet(5)(np.arange(5)).all()


def test_a_list_of_rows_gives_each_of_them_once_per_epoch() -> None:
    kept = np.flatnonzero(np.random.default_rng(0).random(108) < 0.3).astype(np.uint32)
    kept = kept[: len(kept) // 8 * 8]
    order = Listed(FullOrder([range(len(kept))], 8, 0), kept)
    found, _ = stream(order, order.start(), 2, len(kept) // 8, Numbers(), RowSet(108))
    rows = [row for batch in found for row in batch]
    for epoch in range(2):
        assert sorted(rows[epoch * len(kept) : (epoch + 1) * len(kept)]) == kept.tolist()


@pytest.mark.parametrize("weights", [(9000.0, *[1.0] * 1000), (3.0, 1.0, 1.0), (1e-4, 1.0)])
def test_sources_of_any_weight_have_their_proportion(weights: tuple[float, ...]) -> None:
    mixing = Mixing(weights, 0)
    positions = np.arange(len(mixing.pattern) * 2)
    sources = mixing.sources(positions)
    expected = np.array(weights) / sum(weights)
    np.testing.assert_allclose(np.bincount(sources) / len(sources), expected, rtol=0.06)
    for source in range(min(3, len(weights))):
        np.testing.assert_array_equal(
            mixing.taken(positions, sources)[sources == source], np.arange((sources == source).sum())
        )


def test_a_vanishing_weight_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"source 0 \(counted from 0\) has") as caught:
        Mixing((1e-9, 1.0), 0)
    assert caught.value.field == "data.weights"


def test_lanes_without_usable_pairs_wait_for_their_next_epoch() -> None:
    """All usable pairs are in one shard, which each epoch deals to another lane."""
    order = WindowOrder([shards(*[10] * 8)], 4, 0, 1)
    found, _ = stream(order, order.start(), 1, 20, Numbers(frozenset(range(10, 80))), RowSet(80))
    assert {row for batch in found for row in batch} == set(range(10))
