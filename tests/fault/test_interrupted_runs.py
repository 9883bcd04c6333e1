# SPDX-License-Identifier: Apache-2.0
"""Runs that are killed, get a signal or find a full disk are resumed to the student of an uninterrupted run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import run_in, write_world
from torch import Tensor

import aced_sdk as aced
from aced_sdk import towers
from aced_sdk.config import DistillConfig
from aced_sdk.engine import checkpoints, step_of
from aced_sdk.engine.events import Event, StepDone
from aced_sdk.errors import ConfigError, EngineError, Interrupted, ModelError


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def whole(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The weights of an uninterrupted run."""
    run = aced.distill(run_in(world, tmp_path_factory.mktemp("whole") / "run"))
    return run.student.model.state_dict()


SCRIPT = """
import resource, sys
sys.path.insert(0, {tests!r})
import aced_sdk as aced
from aced_sdk.config import DistillConfig
from aced_sdk.engine.events import CheckpointSaved, StepDone

def listen(event):
    if isinstance(event, CheckpointSaved) and {limit}:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # from now on no file may grow larger
    if isinstance(event, StepDone):
        print("step", event.step, flush=True)

aced.distill(DistillConfig.from_yaml(sys.argv[1]), callbacks=[listen])
"""


def started(root: Path, folder: Path, limit: bool) -> subprocess.Popen[str]:
    script = folder / "run.py"
    script.write_text(SCRIPT.format(tests=str(root / "tests"), limit=limit))
    command = [sys.executable, str(script), str(folder / "given.yaml")]
    environment = os.environ | {"PYTHONPATH": str(root)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def test_a_disk_that_fills_while_a_checkpoint_is_written_leaves_the_older_ones(
    root: Path, world: Path, tmp_path: Path
) -> None:
    run_in(world, tmp_path / "run").to_yaml(tmp_path / "given.yaml")
    _, errors = started(root, tmp_path, limit=True).communicate(timeout=120)
    assert "EngineError: the checkpoint of step 4 cannot be written" in errors
    assert "free disk space" in errors
    assert [step_of(path) for path in checkpoints(tmp_path / "run")] == [2]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]
    resumed = aced.resume(tmp_path / "run")
    whole = aced.distill(run_in(world, tmp_path / "whole"))
    for name, tensor in whole.student.model.state_dict().items():
        assert torch.equal(tensor, resumed.student.model.state_dict()[name]), name


WRITING = """
import sys, time
import aced_sdk as aced
from aced_sdk.config import DistillConfig
from aced_sdk.engine import checkpoint

sync = checkpoint.sync

def stop(folder):
    if "step-00000004" in str(folder):
        print("writing", flush=True)
        time.sleep(60)
    sync(folder)

checkpoint.sync = stop
aced.distill(DistillConfig.from_yaml(sys.argv[1]))
"""


def test_a_kill_while_a_checkpoint_is_written_leaves_the_older_one(
    root: Path, world: Path, tmp_path: Path, whole: dict[str, Tensor]
) -> None:
    made = run_in(world, tmp_path / "run")
    made.to_yaml(tmp_path / "given.yaml")
    environment = os.environ | {"PYTHONPATH": str(root)}
    command = [sys.executable, "-c", WRITING, str(tmp_path / "given.yaml")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    process.kill()
    process.communicate(timeout=60)
    assert [step_of(path) for path in checkpoints(tmp_path / "run")] == [2]
    run = aced.distill(made, resume="auto")
    for name, tensor in run.student.model.state_dict().items():
        assert torch.equal(tensor, whole[name]), name
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 2  # what the killed process left is removed


def test_a_killed_process_is_resumed_to_the_same_student(root: Path, world: Path, tmp_path: Path) -> None:
    long = aced.Schedule(steps=200, shape="constant", warmup=0, cooldown=0)
    run_in(world, tmp_path / "run", schedule=long).to_yaml(tmp_path / "given.yaml")
    process = started(root, tmp_path, limit=False)
    assert process.stdout is not None
    for line in process.stdout:
        if line == "step 7\n":
            break
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    with (tmp_path / "run" / "events.jsonl").open("a") as stream:
        stream.write('{"event": "step_do')  # what a kill in the midst of a line leaves
    broken_at = step_of(checkpoints(tmp_path / "run")[-1])
    assert 4 <= broken_at < 200  # that of step 6 may not be complete yet
    short = aced.Schedule(steps=broken_at + 4, shape="constant", warmup=0, cooldown=0)
    DistillConfig.from_yaml(tmp_path / "run" / "config.yaml").replace(schedule=short).to_yaml(
        tmp_path / "run" / "config.yaml"
    )
    resumed = aced.resume(tmp_path / "run")
    whole = aced.distill(run_in(world, tmp_path / "whole", schedule=short))
    for name, tensor in whole.student.model.state_dict().items():
        assert torch.equal(tensor, resumed.student.model.state_dict()[name]), name
    steps = [
        row["step"]
        for row in map(json.loads, (tmp_path / "run" / "events.jsonl").read_text().splitlines())
        if row["event"] == "step_done"
    ]
    assert steps == list(range(1, broken_at + 5))


@pytest.mark.parametrize(
    ("number", "given", "code"), [("SIGTERM", None, 143), ("SIGUSR1", None, 138), ("SIGTERM", 0, 0)]
)
def test_a_signal_ends_a_run_with_a_checkpoint(
    world: Path, tmp_path: Path, whole: dict[str, Tensor], number: str, given: int | None, code: int
) -> None:
    signals = (signal.SIGTERM, signal.SIGUSR1)
    handlers = [signal.getsignal(each) for each in signals]
    engine = aced.Engine(kind="single", device="cpu", checkpoint_every=4, threads=1, signal_exit_code=given)

    def send(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 3:
            os.kill(os.getpid(), signal.Signals[number])

    made = run_in(world, tmp_path / "run", engine=engine)
    with pytest.raises(Interrupted, match=f"{number} ended the run after step 3") as caught:
        aced.distill(made, callbacks=[send])
    assert [signal.getsignal(each) for each in signals] == handlers
    assert caught.value.exit_code == code
    assert caught.value.checkpoint == checkpoints(tmp_path / "run")[-1]
    assert step_of(caught.value.checkpoint) == 3
    run = aced.distill(made, resume="must")
    for name, tensor in run.student.model.state_dict().items():
        assert torch.equal(tensor, whole[name]), name


def test_a_signal_in_another_thread_is_left_alone(world: Path, tmp_path: Path) -> None:
    seen: list[Any] = []
    done: list[Any] = []
    before = signal.getsignal(signal.SIGTERM)

    def listen(event: Event) -> None:
        seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(
        target=lambda: done.append(aced.distill(run_in(world, tmp_path / "run"), callbacks=[listen]))
    )
    thread.start()
    thread.join()
    assert done[0].step == 6
    assert set(seen) == {before}


def test_distill_with_resume_warns_of_another_config(world: Path, tmp_path: Path) -> None:
    made = run_in(world, tmp_path / "run")
    with pytest.raises(EngineError, match="holds no run"):
        aced.distill(made, resume="must")
    assert not (tmp_path / "run").exists()
    aced.distill(made, resume="auto")
    longer = made.replace(schedule=aced.Schedule(steps=8))
    with pytest.warns(UserWarning, match="not the config that the run was started with"):
        assert aced.distill(longer, resume="auto").step == 8
    assert DistillConfig.from_yaml(tmp_path / "run" / "config.yaml").schedule.steps == 8
    with pytest.raises(ConfigError, match="unknown resume 'always'"):
        aced.distill(made, resume="always")  # type: ignore[arg-type]


def test_a_full_disk_at_the_end_is_told(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = run_in(world, tmp_path / "run")

    def full(target: Path, tensors: object, metadata: object = None) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("aced_sdk.towers.folder.save_tensors", full)
    with pytest.raises(ModelError, match="No space left"):
        aced.distill(made)
    monkeypatch.undo()
    assert [step_of(path) for path in checkpoints(tmp_path / "run")] == [4, 6]
    assert aced.resume(tmp_path / "run").step == 6
    assert towers.load(tmp_path / "run" / "student").fingerprint()
