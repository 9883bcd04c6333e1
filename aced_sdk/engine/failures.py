# SPDX-License-Identifier: Apache-2.0
"""Report a failure of a launch once, name ranks that were killed or hang, and end all ranks.

Ranks write to the key-value store of the process group, which works when collectives do not.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from threading import Event, Thread

from torch import distributed

from aced_sdk.errors import AcedError, EngineError
from aced_sdk.files import one_line

_FAILURE, _LOST, _LEFT, _REPORTED = "aced/failure", "aced/lost", "aced/left", "aced/reported"
_ROLL_CALL_SECONDS = 2.0  # time in which ranks report a lost connection
_LEAVING_SECONDS = 5.0  # after a failure on another rank; then this process is ended
_LATER_SECONDS = 1.0  # the other ranks end later, because launchers name the first process that ends
_POLL_SECONDS = 0.05


def described(error: BaseException) -> str:
    """Class and message of an error, on one line."""
    return one_line(f"{type(error).__name__}: {error}", 4000)


def another(rank: int, text: str) -> EngineError:
    """The error for a failure that another rank reports."""
    error = EngineError(f"rank {rank} failed: {text}", remedy=f"see the output of rank {rank}")
    error.reported_by = rank
    return error


def lost_connection(error: BaseException) -> bool:
    """Whether an error, or its cause, comes from the connection to other ranks."""
    found: BaseException | None = error
    while found is not None:
        # gloo has no error class of its own
        if isinstance(found, distributed.DistError) or (
            isinstance(found, RuntimeError) and "gloo/transport" in str(found)
        ):
            return True
        found = found.__cause__
    return False


class Failures:
    """The failures of a launch, shared through the store of the process group.

    Args:
        rank: this rank.
        world_size: number of ranks, at least 2.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self._store = distributed.distributed_c10d._get_default_store()

    def note(self, name: str) -> None:
        """Set a mark for `wait_for`."""
        self._store.set(f"aced/{name}", "1")

    def wait_for(self, name: str) -> None:
        """Wait until another rank sets a mark.

        Raises:
            EngineError: if a rank failed, or rank 0 has ended.
        """
        while not self._store.check([f"aced/{name}"]):
            if found := self._published():
                raise another(*found)
            time.sleep(_POLL_SECONDS)

    @contextmanager
    def guarded(self, report: Callable[[BaseException], None] | None) -> Iterator[None]:
        """See `Ranks.guarded`."""
        ended = Event()
        Thread(target=self._watch, args=(ended,), daemon=True, name="aced-failures").start()
        try:
            with warnings.catch_warnings():
                if self.rank:
                    warnings.simplefilter("ignore")  # rank 0 shows them
                yield
        except BaseException as error:
            raised = self._settle(error)
            own = getattr(raised, "reported_by", None) is None
            if own and report is not None:
                report(raised)
            self._leave(own, ended)
            if raised is error:
                raise
            raise raised from error
        finally:
            ended.set()

    def _settle(self, error: BaseException) -> BaseException:
        """Publish an error of this rank, or find the rank that failed. Return the error to raise."""
        if isinstance(error, AcedError) and error.reported_by is not None:
            return error
        if lost_connection(error):
            return self._missing(error)
        try:
            rank, text = self._publish(described(error))
        except RuntimeError:  # rank 0 has ended, and the store with it
            return error
        if rank == self.rank or not isinstance(error, Exception):
            return error
        if isinstance(error, AcedError):
            error.reported_by = rank
            return error
        return another(rank, text)

    def _missing(self, error: BaseException) -> EngineError:
        """Find the ranks that did not notice the lost connection: they were killed or hang."""
        try:
            self._store.set_timeout(timedelta(seconds=_ROLL_CALL_SECONDS))
            self._store.set(f"{_LOST}/{self.rank}", "1")
            until, missing = time.monotonic() + _ROLL_CALL_SECONDS, list(range(self.world_size))
            while missing and time.monotonic() < until:
                if found := self._published():
                    return another(*found)
                missing = [rank for rank in missing if not self._store.check([f"{_LOST}/{rank}"])]
                time.sleep(_POLL_SECONDS)
            text = _names(missing) if missing else f"the ranks lost their connection: {described(error)}"
            rank, text = self._publish(text)
        except RuntimeError:  # the store is gone
            rank, text = 1, _names([0])
        if rank != self.rank:
            return another(rank, text)
        remedy = "see the output of that rank; a rank that needs longer for a step needs a larger timeout"
        return EngineError(text, remedy=remedy, field="engine.timeout_seconds")

    def _publish(self, text: str) -> tuple[int, str]:
        """Publish a failure if there is none yet. Return rank and text of the published failure."""
        self._store.compare_set(_FAILURE, "", json.dumps([self.rank, text]))
        found = self._published()
        return found or (self.rank, text)

    def _published(self) -> tuple[int, str] | None:
        if not self._store.check([_FAILURE]):
            return None
        rank, text = json.loads(self._store.get(_FAILURE))
        return int(rank), str(text)

    def _leave(self, own: bool, ended: Event) -> None:
        """End this rank after the failure is reported.

        A launcher may stop all ranks when the first one ends, so the rank that reports the failure ends first. Rank 0
        may serve the store, so it waits until the others no longer need it.
        """
        until = time.monotonic() + _ROLL_CALL_SECONDS
        with suppress(RuntimeError):
            if own:
                self._store.set(_REPORTED, "1")
            while not own and time.monotonic() < until and not self._store.check([_REPORTED]):
                time.sleep(_POLL_SECONDS)
            ended.set()
            self._store.add(_LEFT, 1)
            while self.rank == 0 and time.monotonic() < until and self._store.add(_LEFT, 0) < self.world_size:
                time.sleep(_POLL_SECONDS)
        if not own:
            time.sleep(_LATER_SECONDS)

    def _watch(self, ended: Event) -> None:
        """End this process if a failure is published and the main thread does not leave `guarded`."""
        while not ended.wait(1.0):
            try:
                failed = self._store.check([_FAILURE])
            except RuntimeError:  # rank 0 has ended
                failed = True
            if failed and not ended.wait(_LEAVING_SECONDS):
                for stream in (sys.stdout, sys.stderr):
                    with suppress(Exception):
                        stream.flush()
                os._exit(1)


def _names(missing: list[int]) -> str:
    names = f"rank {missing[0]}" if len(missing) == 1 else f"ranks {', '.join(map(str, missing[:8]))}"
    more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
    return f"{names}{more} ended without a message, or did not answer within the timeout"
