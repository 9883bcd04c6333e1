# SPDX-License-Identifier: Apache-2.0
"""End a run with a checkpoint on SIGTERM and SIGUSR1, which schedulers send before they end a job."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignal:
    """A request to stop.

    Attributes:
        number: number of the first signal received; 0: none.
        taken: whether the training has ended because of it.
    """

    number: int = 0
    taken: bool = False


@contextmanager
def stop_signals() -> Iterator[StopSignal]:
    """Record SIGTERM and SIGUSR1 in the block. The previous handlers are restored afterwards.

    A signal that the training did not react to is sent again after the block. In other threads than the main thread,
    Python allows no handlers, and nothing is recorded.
    """
    stop = StopSignal()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def note(number: int, frame: FrameType | None) -> None:
        stop.number = stop.number or number

    before = {number: signal.signal(number, note) for number in _SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not installed from Python
        if stop.number and not stop.taken:
            signal.raise_signal(stop.number)
