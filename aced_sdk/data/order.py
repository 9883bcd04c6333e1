# SPDX-License-Identifier: Apache-2.0
"""The order in which a run reads its pool. It depends on the seed and on positions, and takes bounded memory.

Every order has L lanes. A super-batch takes equally many pairs of each lane, and a rank of W owns L / W lanes, so what
is read does not depend on W. The state of an order is a few integers per lane.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from aced_sdk.config import Data
from aced_sdk.data.permutation import Permutation
from aced_sdk.data.rowset import Rows
from aced_sdk.errors import ConfigError

_MOST_LANES = 64  # by default
_SLOTS, _MOST_SLOTS = 1000, 1_000_000  # of a mixing pattern


class Order(Protocol):
    """An endless sequence of rows in each of several lanes.

    Attributes:
        lanes: L.
        pairs: rows of one pass over the pool.
    """

    lanes: int
    pairs: int

    def start(self) -> Rows:
        """The state before the first row: int64 [L, K]."""

    def rows(self, lanes: Rows, state: Rows, count: int) -> Rows:
        """The next `count` rows of some lanes.

        Args:
            lanes: int64 [l], numbers of lanes.
            state: int64 [l, K], their states.
            count: rows of each.

        Returns:
            int64 [l, count].
        """

    def advance(self, lanes: Rows, state: Rows, counts: Rows) -> Rows:
        """The states of lanes after `counts` (int64 [l]) more rows: int64 [l, K]."""


class Mixing:
    """A shuffled pattern of sources in given proportions. It repeats, and gives the source of each position.

    Args:
        weights: of each source; above 0.
        seed: of the shuffle.
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        self.quotas = _quotas(np.array(weights, dtype=np.float64))
        slots = int(self.quotas.sum())
        self.pattern = np.repeat(np.arange(len(weights)), self.quotas)[Permutation(slots, seed, 1)(np.arange(slots))]
        of_source = self.pattern.argsort(kind="stable")
        starts = np.repeat(np.cumsum(self.quotas) - self.quotas, self.quotas)
        self._earlier = np.empty(slots, dtype=np.int64)  # number of earlier slots with the same source
        self._earlier[of_source] = np.arange(slots) - starts

    def sources(self, positions: Rows) -> Rows:
        """The source of each position, int64 of the same shape."""
        found: Rows = self.pattern[positions % len(self.pattern)]
        return found

    def taken(self, positions: Rows, sources: Rows) -> Rows:
        """How many earlier positions read the same source, for each position."""
        cycles, slots = np.divmod(positions, len(self.pattern))
        taken: Rows = cycles * self.quotas[sources] + self._earlier[slots]
        return taken


def _quotas(weights: NDArray[np.float64]) -> Rows:
    """Slots of each source, in proportion to the weights: at least 10 each, 1000 or more in all. A single source has 1.

    Raises:
        ConfigError: if a source has less than a hundred-thousandth of the weight.
    """
    if len(weights) == 1:
        return np.ones(1, dtype=np.int64)
    fractions = weights / weights.sum()
    slots = max(_SLOTS, math.ceil(10 / fractions.min()))
    if slots > _MOST_SLOTS:
        raise ConfigError(
            f"source {int(fractions.argmin())} (counted from 0) has {fractions.min():.1e} of the weights",
            remedy="remove it, or give it at least a hundred-thousandth",
            field="data.weights",
        )
    exact = fractions * slots
    quotas: Rows = np.floor(exact).astype(np.int64)
    rest = np.argsort(quotas - exact, kind="stable")  # rounded down most comes first
    quotas[rest[: slots - int(quotas.sum())]] += 1
    return quotas


class FullOrder:
    """A new keyed permutation of each source's rows in every epoch, for storage with fast random access.

    Position p belongs to lane p mod L. Its state is the number of rows that each lane has given.

    Args:
        sources: the rows of each source.
        lanes: L.
        seed: selects the permutations.
        weights: proportions of the sources.
    """

    def __init__(self, sources: Sequence[range], lanes: int, seed: int, weights: Sequence[float] = (1.0,)) -> None:
        self.lanes = lanes
        self.pairs = sum(map(len, sources))
        self._sources = sources
        self._mixing = Mixing(weights, seed)
        self._permutation = lru_cache(2 * len(sources))(
            lambda source, epoch: Permutation(len(sources[source]), seed, source, epoch)
        )

    def start(self) -> Rows:
        return np.zeros((self.lanes, 1), dtype=np.int64)

    def rows(self, lanes: Rows, state: Rows, count: int) -> Rows:
        positions = (state[:, :1] + np.arange(count)) * self.lanes + lanes[:, None]
        numbers = self._mixing.sources(positions)
        taken = self._mixing.taken(positions, numbers)
        found = np.empty_like(positions)
        for source in np.unique(numbers).tolist():
            rows = self._sources[source]
            epochs, places = np.divmod(taken, len(rows))
            for epoch in np.unique(epochs[numbers == source]).tolist():
                chosen = (numbers == source) & (epochs == epoch)
                found[chosen] = rows.start + self._permutation(source, epoch)(places[chosen])
        return found

    def advance(self, lanes: Rows, state: Rows, counts: Rows) -> Rows:
        after: Rows = state + counts[:, None]
        return after


class WindowOrder:
    """Shuffled shards, read in windows of a few shards with shuffled rows, for slow or remote storage.

    In each epoch, the shards of a source are dealt to the lanes in a new order. The state of a lane is the number of
    rows that it has given, and for each source its epoch and the rows taken of it.

    Args:
        sources: of each source, the rows of each shard.
        lanes: L; no source has fewer shards.
        seed: selects the orders.
        window: shards that are shuffled together.
        weights: proportions of the sources.
    """

    def __init__(
        self,
        sources: Sequence[Sequence[range]],
        lanes: int,
        seed: int,
        window: int,
        weights: Sequence[float] = (1.0,),
    ) -> None:
        self.lanes = lanes
        self.pairs = sum(len(shard) for shards in sources for shard in shards)
        self._sources = sources
        self._seed, self._window = seed, window
        self._mixing = Mixing(weights, seed)
        self._dealt = lru_cache(2 * len(sources))(self._deal)
        self._lane = lru_cache(4 * lanes * len(sources))(self._shards_of)

    def start(self) -> Rows:
        return np.zeros((self.lanes, 1 + 2 * len(self._sources)), dtype=np.int64)

    def rows(self, lanes: Rows, state: Rows, count: int) -> Rows:
        found = np.empty((len(lanes), count), dtype=np.int64)
        for place, lane in enumerate(lanes.tolist()):
            numbers = self._next_sources(lane, int(state[place, 0]), count)
            for source in np.unique(numbers).tolist():
                epoch, taken = state[place, 1 + 2 * source : 3 + 2 * source].tolist()
                chosen = numbers == source
                found[place, chosen] = self._of_lane(lane, source, epoch, taken, int(chosen.sum()))
        return found

    def advance(self, lanes: Rows, state: Rows, counts: Rows) -> Rows:
        after = state.copy()
        for place, (lane, count) in enumerate(zip(lanes.tolist(), counts.tolist(), strict=True)):
            numbers = self._next_sources(lane, int(state[place, 0]), count)
            after[place, 0] += count
            for source, more in enumerate(np.bincount(numbers, minlength=len(self._sources)).tolist()):
                epoch, taken = state[place, 1 + 2 * source : 3 + 2 * source].tolist()
                taken += more
                while taken >= (total := self._lane(lane, source, epoch)[1][-1]):
                    epoch, taken = epoch + 1, taken - int(total)
                after[place, 1 + 2 * source : 3 + 2 * source] = epoch, taken
        return after

    def _next_sources(self, lane: int, given: int, count: int) -> Rows:
        return self._mixing.sources((given + np.arange(count)) * self.lanes + lane)

    def _of_lane(self, lane: int, source: int, epoch: int, taken: int, count: int) -> Rows:
        """The next rows of one source in a lane."""
        parts: list[Rows] = []
        while count:
            shards, ends = self._lane(lane, source, epoch)
            window = int(np.searchsorted(ends, taken, side="right")) // self._window
            first, last = window * self._window, min((window + 1) * self._window, len(shards))
            start, end = (int(ends[first - 1]) if first else 0), int(ends[last - 1])
            shuffle = Permutation(end - start, self._seed, source, epoch, lane, window)
            places = start + shuffle(np.arange(taken, min(taken + count, end)) - start)
            inside = np.searchsorted(ends, places, side="right")
            starts = np.array([shard.start for shard in shards]) - np.append(0, ends[:-1])
            parts.append(starts[inside] + places)
            taken, count = taken + len(places), count - len(places)
            if taken == ends[-1]:
                epoch, taken = epoch + 1, 0
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    def _deal(self, source: int, epoch: int) -> Rows:
        shards = len(self._sources[source])
        return Permutation(shards, self._seed, source, epoch)(np.arange(shards, dtype=np.int64))

    def _shards_of(self, lane: int, source: int, epoch: int) -> tuple[list[range], Rows]:
        """The shards of a lane in an epoch, and the sums of their rows. Empty shards are left out."""
        dealt = self._dealt(source, epoch)[lane :: self.lanes].tolist()
        shards = [shard for number in dealt if len(shard := self._sources[source][number])]
        return shards, np.cumsum([len(shard) for shard in shards])


class Listed:
    """An order over a list of rows, such as the rows that may be drawn.

    Args:
        order: of places, 0 to K - 1.
        rows: integers [K], ascending.
    """

    def __init__(self, order: Order, rows: NDArray[Any]) -> None:
        self.lanes, self.pairs = order.lanes, order.pairs
        self._order, self._rows = order, rows

    def start(self) -> Rows:
        return self._order.start()

    def rows(self, lanes: Rows, state: Rows, count: int) -> Rows:
        return self._rows[self._order.rows(lanes, state, count)].astype(np.int64)

    def advance(self, lanes: Rows, state: Rows, counts: Rows) -> Rows:
        return self._order.advance(lanes, state, counts)


def default_lanes(candidates: int, shards: int | None = None) -> int:
    """The largest power of two that divides the candidates of a step, at most 64, and at most the number of shards."""
    most = min(_MOST_LANES, shards or _MOST_LANES)
    lanes = candidates & -candidates
    while lanes > most:
        lanes //= 2
    return lanes


def build_order(config: Data, shard_rows: Sequence[range], sources: Sequence[int], candidates: int, seed: int) -> Order:
    """Build the order of a config.

    Args:
        config: kind of order, lanes, window and weights.
        shard_rows: the rows of each shard.
        sources: number of shards behind each entry of `config.shards`.
        candidates: pairs drawn per step.
        seed: of the run.

    Raises:
        ConfigError: if the lanes do not divide the candidates, or exceed the shards of a source in windows.
    """
    starts = np.cumsum([0, *sources]).tolist()
    groups = [list(shard_rows[start:end]) for start, end in pairwise(starts)]
    weights = config.weights or (1.0,)
    if config.weights is None:
        groups = [list(shard_rows)]
    fewest = min(sum(1 for shard in group if len(shard)) for group in groups)
    if not fewest:
        raise ConfigError(
            "a source in data.shards has no pairs", remedy="remove it and its weight", field="data.weights"
        )
    windows = config.order == "windows"
    lanes = config.lanes or default_lanes(candidates, fewest if windows else None)
    if candidates % lanes:
        raise ConfigError(
            f"{lanes} lanes do not divide the {candidates} pairs that a step draws",
            remedy="use a divisor, or leave data.lanes out",
            field="data.lanes",
        )
    if not windows:
        rows = [range(group[0].start, group[-1].stop) for group in groups]
        return FullOrder(rows, lanes, seed, weights)
    if lanes > fewest:
        raise ConfigError(
            f"{lanes} lanes read windows of shards, and a source has {fewest} shards",
            remedy="use at most that many lanes, more and smaller shards, or order 'full'",
            field="data.lanes",
        )
    filled = [[shard for shard in group if len(shard)] for group in groups]
    return WindowOrder(filled, lanes, seed, config.window, weights)


def own_lanes(lanes: int, rank: int, world_size: int) -> Rows:
    """The lanes of a rank, int64 [L / W].

    Raises:
        ConfigError: if the number of ranks does not divide the lanes.
    """
    if lanes % world_size:
        raise ConfigError(
            f"{world_size} ranks do not divide the {lanes} lanes of the pool",
            remedy="set data.lanes to a multiple of the ranks that divides the super-batch, or launch fewer ranks",
            field="data.lanes",
        )
    each = lanes // world_size
    return np.arange(rank * each, (rank + 1) * each)
