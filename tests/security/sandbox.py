# SPDX-License-Identifier: Apache-2.0
"""Runs an attack in a child process with limits on time and memory, and says how it ended."""

from __future__ import annotations

import multiprocessing
import os
import resource
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

MIB = 2**20
# Forked from a process that has imported and computed nothing: threads do not outlive a fork, and imports take long.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    [
        "torch",
        "open_clip",
        "transformers",
        "peft",
        "onnxruntime",
        "aced_sdk.verbs",
        "vlm.model.saving",
        "vlm.tuning",
        "export.onnx.save",
    ]
)


@dataclass(frozen=True)
class Outcome:
    """How a call in a child process ended.

    Attributes:
        kind: "returned", "named" (one of this project's errors, with a remedy), "raw" (any other error), "hung" (killed
            after its time), or "died" (killed by a signal, or left without a word).
        value: what it returned, or the error's text; of a raw error the traceback.
        seconds: wall time.
        mib: MiB by which the peak of its resident memory grew.
    """

    kind: str
    value: Any = None
    seconds: float = 0.0
    mib: float = 0.0

    def refused(self, *words: str) -> bool:
        """Whether one of this project's errors was raised, with these words in its text."""
        assert self.kind == "named", f"{self.kind}: {self.value}"
        missing = [word for word in words if word not in self.value]
        assert not missing, f"{missing} not in: {self.value}"
        return True

    def returned(self) -> Any:
        """What it returned."""
        assert self.kind == "returned", f"{self.kind}: {self.value}"
        return self.value


def run(function: Callable[..., Any], *args: Any, seconds: float = 30, mib: int = 1024) -> Outcome:
    """Call `function(*args)` in a child process.

    Args:
        function: at the top level of a module, so that the child can import it; what it returns must be picklable.
        args: picklable.
        seconds: the child is killed after them.
        mib: the child may reserve so much memory beyond what it starts with.
    """
    _warm_up()
    ours, theirs = _FORKS.Pipe(duplex=False)
    child = _FORKS.Process(target=_child, args=(theirs, mib, function, args))
    begin = time.monotonic()
    child.start()
    theirs.close()
    try:
        outcome = ours.recv() if ours.poll(seconds) else Outcome("hung")
    except EOFError:
        outcome = Outcome("died")
    if outcome.kind == "hung":
        child.kill()
    child.join()
    return Outcome(outcome.kind, outcome.value or f"exit code {child.exitcode}", time.monotonic() - begin, outcome.mib)


@cache
def _warm_up() -> None:
    """Let the process that children are forked from import its packages, which no attack's time includes."""
    child = _FORKS.Process(target=os.getpid)
    child.start()
    child.join()


def canary(folder: Path) -> tuple[Path, str]:
    """A file that must never appear, and Python code that makes it."""
    path = folder / "code-has-run"
    return path, f"open({str(path)!r}, 'w').close()\n"


def _child(pipe: Connection, mib: int, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.setsid()
    start = _status("VmSize")
    resource.setrlimit(resource.RLIMIT_AS, (start + mib * MIB,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    before = _status("VmHWM")
    try:
        kind, value = "returned", function(*args)
    except BaseException as error:  # noqa: BLE001  how it ended is what is asked
        named = hasattr(error, "remedy") and hasattr(error, "cause")
        kind, value = ("named", f"{type(error).__name__}: {error}") if named else ("raw", traceback.format_exc())
    pipe.send(Outcome(kind, value, mib=(_status("VmHWM") - before) / MIB))


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(name)
