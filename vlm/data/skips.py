# SPDX-License-Identifier: Apache-2.0
"""Bad conversations are left out and counted by reason, up to a bound."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from aced_sdk.errors import DataError


class Unusable(DataError):
    """A conversation or picture that cannot be used; the others can.

    Attributes:
        reason: a few words, the same for all with this fault.
    """

    def __init__(self, cause: str, *, remedy: str, field: str | None = None, reason: str = "unusable") -> None:
        super().__init__(cause, remedy=remedy, field=field)
        self.reason = reason


class Skips:
    """What was left out of some data.

    Attributes:
        messages: one for each, which names it.
        reasons: how many for each reason.
    """

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.reasons: Counter[str] = Counter()
        self._first: Unusable | None = None

    @contextmanager
    def counting(self) -> Iterator[None]:
        """A block whose conversation is left out if it is unusable."""
        try:
            yield
        except Unusable as error:
            self.messages.append(error.cause)
            self.reasons[error.reason] += 1
            self._first = self._first or error

    def check(self, total: int, max_unusable_fraction: float) -> None:
        """Refuse the data if too much of it was left out.

        Args:
            total: conversations, with those left out.
            max_unusable_fraction: largest fraction of them that may be left out.

        Raises:
            DataError: above it, or if nothing is left; it counts the reasons and quotes the first conversation.
        """
        count = len(self.messages)
        if self._first and (count > max_unusable_fraction * total or count >= total):
            raise DataError(
                f"{count} of {total} conversations cannot be used ({self}); the first: {self._first.cause}",
                remedy=f"{self._first.remedy}; max_unusable_fraction is the largest fraction that is left out",
                field=self._first.field or "max_unusable_fraction",
            ) from self._first

    def __str__(self) -> str:
        return ", ".join(f"{count} {reason}" for reason, count in self.reasons.most_common())
