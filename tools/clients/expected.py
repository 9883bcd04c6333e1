# SPDX-License-Identifier: Apache-2.0
"""What this project computes on its artefacts, for clients to be compared with."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch


class Expected(NamedTuple):
    """A value and how far a client may be from it.

    Attributes:
        value: a number, a text, or nested lists of them.
        bound: largest allowed difference; 0 for texts.
    """

    value: Any
    bound: float


class Expectations(dict[tuple[str, str], Expected]):
    """Expected values by artefact (a folder) and by what is compared."""

    def add(self, artefact: str, compared: str, value: Any, bound: float = 1e-5) -> None:
        """Add a value; a tensor becomes lists."""
        self[artefact, compared] = Expected(value.tolist() if isinstance(value, torch.Tensor) else value, bound)


def difference(found: Any, expected: Any) -> float:
    """Largest absolute difference of numbers, or the number of different texts; infinite for other shapes."""
    if isinstance(expected, list) or isinstance(found, list):
        if not (isinstance(expected, list) and isinstance(found, list) and len(found) == len(expected)):
            return float("inf")
        parts = [difference(a, b) for a, b in zip(found, expected, strict=True)]
        return sum(parts) if isinstance(next(iter(expected), None), str) else max(parts, default=0.0)
    if isinstance(expected, str) or isinstance(found, str):
        return float(found != expected)
    distance = abs(float(found) - float(expected))
    return distance if distance == distance else float("inf")
