# SPDX-License-Identifier: Apache-2.0
"""Rows of an event log for charts, in bounded memory: neighbouring rows of a long log are averaged."""

from __future__ import annotations

import sys
from typing import Any

VALUES = 2_000_000
"""Maximum numbers kept of one kind of event; a step has about a dozen."""

_NAMES = 1000
"""Maximum names in a mapping of an averaged row."""

_LETTERS = 64
"""Characters of a name that use about as much memory as a number."""

Row = dict[str, Any]


class Thinned:
    """Collect rows in order. If there are too many, replace every two neighbours by their mean.

    The first and the last row are kept unchanged. A mean has the step of the later row.

    Args:
        values: maximum numbers to keep; long names count as numbers.
    """

    def __init__(self, values: int = VALUES) -> None:
        self._values = values
        self._cost = 0
        self._group = 1  # rows averaged in each of `_rows`
        self._rows: list[Row] = []
        self._waiting: Row = {}  # mean of the rows of an incomplete group
        self._count = 0  # rows in `_waiting`
        self._first: Row | None = None
        self._last: Row | None = None

    def add(self, row: Row) -> None:
        """Add the next row."""
        row = _interned(row)
        self._first, self._last = self._first or row, row
        self._waiting = _mean(self._waiting, row, self._count / (self._count + 1))
        self._count += 1
        if self._count < self._group:
            return
        self._keep(self._waiting)
        self._waiting, self._count = {}, 0
        while self._cost > self._values and len(self._rows) > 2 and len(self._rows) % 2 == 0:
            before, self._rows, self._cost = self._rows, [], 0
            for one, other in zip(before[::2], before[1::2], strict=True):
                self._keep(_mean(one, other, 0.5))
            self._group *= 2

    def rows(self) -> list[Row]:
        """Return the rows or their means."""
        if self._group == 1 or self._first is None or self._last is None:
            return list(self._rows)
        rest = [self._waiting] if self._count else []
        return [self._first, *self._rows, *rest, self._last]

    def _keep(self, row: Row) -> None:
        self._rows.append(row)
        self._cost += _cost(row)


def _interned(value: Any) -> Any:
    """Intern all names, so that rows share them."""
    if isinstance(value, dict):
        return {sys.intern(name): _interned(inner) for name, inner in value.items()}
    return value


def _cost(value: Any) -> int:
    if isinstance(value, dict):
        return sum(1 + len(name) // _LETTERS + _cost(inner) for name, inner in value.items())
    return len(value) if isinstance(value, list) else 1


def _mean(one: Row, other: Row, weight: float) -> Row:
    """Merge two rows: weighted means of numbers (`weight` for `one`), and all other values of `other`."""
    if not one:
        return other
    names = list((one | other).keys())[:_NAMES]
    merged = {name: _merged(one.get(name), other.get(name), weight) for name in names}
    return merged | ({"step": other["step"]} if "step" in other else {})


def _merged(one: Any, other: Any, weight: float) -> Any:
    if isinstance(one, dict) and isinstance(other, dict):
        return _mean(one, other, weight)
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [_merged(*places, weight) for places in zip(one, other, strict=True)]
    if isinstance(one, int | float) and isinstance(other, int | float):
        return weight * one + (1 - weight) * other
    return one if other is None else other
