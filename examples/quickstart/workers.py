# SPDX-License-Identifier: Apache-2.0
"""Several runs side by side, each a process of the `aced` command with one compute thread; more would only fight."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import aced_sdk as aced
from aced_sdk.errors import ConfigError, EngineError
from aced_sdk.files import open_own
from aced_sdk.reporting import read_events


def distil_all(configs: Sequence[aced.DistillConfig], processes: int, progress: Callable[[int], None]) -> None:
    """Finish every run: what is done stays, what was broken off goes on, what is missing starts.

    Args:
        configs: the runs.
        processes: how many at a time.
        progress: hears how many steps were taken since it heard last.

    Raises:
        ConfigError: if a directory holds a run of another config.
        EngineError: if a run fails; its last words are in the message.
    """
    waiting = [config for config in configs if not is_done(config)]
    progress(sum(config.schedule.steps for config in configs if config not in waiting))
    running: list[_Process] = []
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                running.append(_Process(waiting.pop(0)))
            time.sleep(0.5)
            for process in list(running):
                progress(process.new_steps())
                if process.finished():
                    running.remove(process)
    finally:
        for process in running:
            process.stop()


def is_done(config: aced.DistillConfig) -> bool:
    """Whether a run of this config has saved its student and told so.

    Raises:
        ConfigError: if the directory holds a run of another config.
    """
    written = config.directory / "config.yaml"
    if not written.is_file():
        return False
    if aced.DistillConfig.from_yaml(written).hash() != config.hash():
        raise ConfigError(
            f"{config.directory} holds a run of another config (other settings, version or ACED_HOME)",
            remedy="remove the demo's folder and start again",
            field="directory",
        )
    if not (config.directory / "student" / "aced.json").is_file():
        return False
    return any(row["event"] == "run_ended" for row in read_events(config.directory / "events.jsonl"))


class _Process:
    def __init__(self, config: aced.DistillConfig) -> None:
        self.config = config
        directory = config.directory
        begun = (directory / "config.yaml").is_file()
        if begun:
            command = ["resume", str(directory)]
        else:
            target = directory.with_suffix(".yaml")
            config.to_yaml(target)
            command = ["distill", str(target)]
        self.log = directory.with_suffix(".log")
        self.events = directory / "events.jsonl"
        self._seen = 0
        with os.fdopen(open_own(self.log, os.O_TRUNC), "wb") as stream:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "aced_sdk.cli", *command],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": str(config.engine.threads or 1)},
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            )

    def new_steps(self) -> int:
        steps = (
            sum(1 for row in read_events(self.events) if row["event"] == "step_done") if self.events.is_file() else 0
        )
        # A resumed run first cuts events back to its checkpoint; steps told once are not taken back.
        new = max(0, steps - self._seen)
        self._seen += new
        return new

    def finished(self) -> bool:
        code = self._process.poll()
        if code is None:
            return False
        if code != 0:
            last = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise EngineError(
                f"the run {self.config.directory} ended with code {code}: {last[-1] if last else 'no message'}",
                remedy=f"read {self.log}, mend the cause and start again: finished work is kept",
            )
        return True

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait()


def _die_with_parent() -> None:
    """Linux sends the child SIGTERM when its parent is gone, however it went; two writers of one run would be worse."""
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def last_metrics(directory: Path) -> dict[str, Any]:
    """Scored and trained counts and the last held-out figures of a finished run."""
    metrics: dict[str, Any] = {}
    for row in read_events(directory / "events.jsonl"):
        if row["event"] == "evaluated":
            metrics["evaluation"] = row["metrics"]
        if row["event"] == "run_ended":
            metrics |= {"trained": row["trained"], "scored": row["scored"], "seconds": row["seconds"]}
    return metrics
