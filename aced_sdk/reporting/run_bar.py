# SPDX-License-Identifier: Apache-2.0
"""The progress bars of a run, as a callback: one for each preparation and one for the steps."""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType
from typing import Self

from aced_sdk.engine.events import Event, StepDone, StepSkipped, Warned
from aced_sdk.files import one_line
from aced_sdk.reporting.progress import Progress, first_rank, say
from aced_sdk.training.events import RunStarted


class RunBar:
    """Show one bar at a time on a terminal; write the plan and warnings to standard error. Active only on rank 0."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._stack = ExitStack()
        self._bar: Progress | None = None
        self._what = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def watch(self, what: str, done: int, total: int) -> None:
        """Update the bar of a preparation."""
        if what != self._what or self._bar is None:
            self._open(what, total, "pairs", 0)
        if self._bar is not None:
            self._bar.advance(done - self._bar.done)

    def __call__(self, event: Event) -> None:
        if isinstance(event, RunStarted):
            if "plan" in event.facts:
                self._say(str(event.facts["plan"]))
            self._open(self.title, event.steps, "steps", event.step)
        elif isinstance(event, StepDone) and self._bar is not None:
            self._bar.advance(event.step - self._bar.done, loss=event.loss)
        elif isinstance(event, Warned):
            self._say(f"warning: {event.cause}; {event.remedy}")
        elif isinstance(event, StepSkipped) and event.in_a_row == 1:
            self._say(f"warning: step {event.step} was skipped: {event.reason}")

    def _say(self, line: str) -> None:
        if first_rank():
            say(f"{one_line(self.title)}: {one_line(line, 1000)}")

    def _open(self, what: str, total: int, unit: str, done: int) -> None:
        self._stack.close()
        self._what = what
        self._bar = self._stack.enter_context(Progress(what, total, unit, done=done))
