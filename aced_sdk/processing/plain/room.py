# SPDX-License-Identifier: Apache-2.0
"""A bound on the memory of threads that decode pictures at the same time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition


class Room:
    """A size that threads share. Each thread waits until the part that it needs is free.

    Args:
        size: total, such as bytes or pixels. A need above it waits until all of it is free.
    """

    def __init__(self, size: int) -> None:
        self._size = self._free = size
        self._freed = Condition()

    @contextmanager
    def of(self, need: int) -> Iterator[None]:
        """Reserve `need` within the `with` block."""
        need = min(need, self._size)
        with self._freed:
            self._freed.wait_for(lambda: self._free >= need)
            self._free -= need
        try:
            yield
        finally:
            with self._freed:
                self._free += need
                self._freed.notify_all()
