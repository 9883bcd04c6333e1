# SPDX-License-Identifier: Apache-2.0
"""Progress bars on standard error, shown only on rank 0 and on a terminal.

A hidden bar costs one attribute test per call. Logging is not changed. A `Progress` opened while a `Stages` is open is
shown below the total bar, so that both share one display.
"""

from __future__ import annotations

import os
import sys
import time
from contextvars import ContextVar, Token
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

from aced_sdk.files import one_line

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

# The open display, shared by nested bars.
_display: ContextVar[RichProgress | None] = ContextVar("aced_sdk_progress_display", default=None)


def first_rank() -> bool:
    """Whether this process is rank 0, by the variables of its launcher; True without them."""
    names = ("RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")
    return next((os.environ[name] for name in names if name in os.environ), "0") == "0"


def say(line: str) -> None:
    """Write a line to standard error, if it exists (a daemon may have none)."""
    if sys.stderr is not None:
        sys.stderr.write(line + "\n")


class Progress:
    """A progress bar with rate and remaining time.

    Args:
        title: text before the bar.
        total: number of units; None if unknown.
        unit: name of the units, plural ("steps", "pairs").
        done: units done before, by an interrupted run.
        plain: without a terminal, write a line at the start and at the end.
        stream: output stream; None: standard error.

    Example: `with Progress("distil", 300) as bar: bar.advance(1, loss=0.31)`
    """

    def __init__(
        self,
        title: str,
        total: int | None,
        unit: str = "steps",
        *,
        done: int = 0,
        plain: bool = False,
        stream: TextIO | None = None,
    ) -> None:
        self.title = one_line(title)
        self.total = total
        self.unit = unit
        self.done = done
        self._plain = plain
        self._stream = stream
        self._display: RichProgress | None = None
        self._token: Token[RichProgress | None] | None = None

    def __enter__(self) -> Self:
        stream: TextIO | None = self._stream if self._stream is not None else sys.stderr
        self._start = time.monotonic()
        self._line: TextIO | None = None
        self._shown = ""
        if not first_rank() or stream is None:  # a daemon may have no standard error
            return self
        if (outer := _display.get()) is not None:
            self._display = outer
        elif stream.isatty():
            self._display = _new_display(stream)
            self._display.start()
            self._token = _display.set(self._display)
        elif self._plain:
            self._line = stream
            self._write("started")
        if self._display is not None:
            self._task = self._display.add_task(
                self.title, total=self.total, completed=self.done, unit=self.unit, shown=""
            )
        return self

    def advance(self, n: int = 1, **shown: float | str) -> None:
        """Add `n` units and show the named values next to the bar."""
        self.done += n
        if self._display is not None:
            if shown:
                self._shown = "  ".join(f"{name} {_short(value)}" for name, value in shown.items())
            self._display.update(self._task, advance=n, shown=self._shown)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._line is not None:
            seconds = time.monotonic() - self._start
            self._write(f"{'done' if kind is None else 'stopped'} after {seconds:.1f} s, {self.done:,} {self.unit}")
        if self._display is None:
            return
        if self._token is not None:
            self._display.stop()
            _display.reset(self._token)
        else:
            self._display.remove_task(self._task)
        self._display = self._token = None

    def _write(self, what: str) -> None:
        if self._line is not None:
            self._line.write(f"{self.title}: {what}\n")
            self._line.flush()


class Stages:
    """A total bar over named stages, with a bar for each stage below.

    Args:
        names: the stages in order.
        title: text before the total bar.
        plain: without a terminal, write a line at the start and at the end of each stage.
        stream: output stream; None: standard error.

    Example: `with Stages(["data", "distil"]) as stages, stages.stage("data", total=90, unit="shards") as bar: ...`
    """

    def __init__(
        self, names: list[str], *, title: str = "total", plain: bool = False, stream: TextIO | None = None
    ) -> None:
        self.names = names
        self._plain = plain
        self._stream = stream
        self._bar = Progress(title, len(names), "stages", stream=stream)

    def __enter__(self) -> Self:
        self._bar.__enter__()
        return self

    @property
    def done(self) -> int:
        """Number of stages that ended without an error."""
        return self._bar.done

    def stage(self, name: str, total: int | None = None, unit: str = "steps", *, done: int = 0) -> _Stage:
        """Return the bar of a stage. The stage is done when the bar closes without an error.

        Raises:
            ValueError: if there is no stage `name`.
        """
        if name not in self.names:
            raise ValueError(f"no stage {name!r}; there are {', '.join(self.names)}")
        title = f"{self.names.index(name) + 1}/{len(self.names)} {name}"
        return _Stage(self._bar, title, total, unit, done=done, plain=self._plain, stream=self._stream)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.__exit__(kind, error, trace)


class _Stage(Progress):
    def __init__(
        self,
        whole: Progress,
        title: str,
        total: int | None,
        unit: str,
        *,
        done: int,
        plain: bool,
        stream: TextIO | None,
    ) -> None:
        super().__init__(title, total, unit, done=done, plain=plain, stream=stream)
        self._whole = whole

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        if kind is None:
            self._whole.advance()


def _short(value: float | str) -> str:
    return one_line(value) if isinstance(value, str) else f"{value:.4g}"


def _new_display(stream: TextIO) -> RichProgress:
    from rich.console import Console
    from rich.progress import BarColumn, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text(f"{speed:,.1f} {task.fields['unit']}/s" if speed else "", style="cyan")

    class Count(ProgressColumn):
        def render(self, task: Task) -> Text:
            total = "?" if task.total is None else f"{int(task.total):,}"
            return Text(f"{int(task.completed):,}/{total} {task.fields['unit']}")

    return RichProgress(
        TextColumn("{task.description}", markup=False),  # a folder name may contain markup
        BarColumn(bar_width=28),
        Count(),
        Rate(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[shown]}", style="green", markup=False),
        console=Console(file=stream),
    )
