# SPDX-License-Identifier: Apache-2.0
"""Checkpoints written while training continues: what is saved, one at a time, and what happens to errors."""

from __future__ import annotations

from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from aced_sdk.config import Engine, Optimizer, Schedule
from aced_sdk.engine import (
    Learned,
    Snapshot,
    Step,
    StopSignal,
    TrainingEngine,
    build_engine,
    checkpoints,
    step_of,
    take_steps,
    writer,
)
from aced_sdk.engine.writer import CheckpointWriter
from aced_sdk.errors import EngineError, Interrupted

CONFIG = Engine(kind="single", device="cpu", checkpoint_every=2)


def engine() -> TrainingEngine:
    torch.manual_seed(0)
    return build_engine(nn.Linear(3, 1), CONFIG, Optimizer())


class Training:
    """Steps on random numbers; what happened is in `story`."""

    def __init__(self, folder: Path, trained: TrainingEngine) -> None:
        self.folder, self.engine, self.story = folder, trained, list[str]()

    def learn(self, number: int) -> Learned:
        loss = self.engine.forward(torch.full((2, 3), float(number))).mean()
        self.engine.backward(loss)
        return Learned(float(loss.detach()))

    def taken(self, step: Step) -> None:
        self.story.append(f"step {step.number}")

    def skipped(self, step: Step, in_a_row: int) -> None:
        raise AssertionError

    def snapshot(self) -> Snapshot:
        self.story.append("snapshot")
        return Snapshot(self.folder)

    def saved(self, number: int, folder: Path) -> None:
        assert step_of(folder) == number
        self.story.append(f"saved {number}")

    def diverged(self, step: Step, in_a_row: int) -> EngineError:
        raise AssertionError


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Event:
    """Writing waits for this event."""
    may, write = Event(), writer.write_checkpoint

    def wait(*given: Any) -> None:
        assert may.wait(60)
        write(*given)

    monkeypatch.setattr(writer, "write_checkpoint", wait)
    return may


def test_a_checkpoint_has_the_weights_of_its_step(tmp_path: Path, held: Event) -> None:
    trained, noise = engine(), torch.ones(2)
    before = {name: tensor.clone() for name, tensor in trained.module.state_dict().items()}
    with CheckpointWriter(trained, keep=2) as saving:
        saving.start(1, Snapshot(tmp_path, {"kind": "test"}, {"noise": noise}))
        assert saving.poll() is None
        with torch.no_grad():
            for tensor in (*trained.module.parameters(), noise):
                tensor.add_(1)
        held.set()
        assert saving.wait() == (1, checkpoints(tmp_path)[0])
        assert saving.wait() is None
    saved = load_file(checkpoints(tmp_path)[0] / "weights.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in before.items())
    assert load_file(checkpoints(tmp_path)[0] / "loop.safetensors")["noise"].tolist() == [1, 1]


def test_steps_are_taken_while_a_checkpoint_is_written_and_one_is_written_at_a_time(
    tmp_path: Path, held: Event
) -> None:
    trained = engine()
    training = Training(tmp_path, trained)
    original = training.snapshot

    def snapshot() -> Snapshot:
        if training.story.count("snapshot") == 1:
            held.set()  # the first one is complete before the second one starts
        return original()

    training.snapshot = snapshot  # type: ignore[method-assign]
    take_steps(training, trained, Schedule(steps=5), 1e-3, CONFIG)
    steps = [line for line in training.story if line.startswith("step")]
    assert steps == [f"step {n}" for n in range(1, 6)]
    assert training.story.index("saved 2") > training.story.index("step 4")
    assert training.story[-1] == "saved 5"
    assert [line for line in training.story if line.startswith("saved")] == ["saved 2", "saved 4", "saved 5"]
    assert [step_of(path) for path in checkpoints(tmp_path)] == [4, 5]


def test_a_checkpoint_that_cannot_be_written_ends_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: Any) -> None:
        raise EngineError("the disk is full", remedy="free space")

    monkeypatch.setattr(writer, "write_checkpoint", fail)
    trained = engine()
    training = Training(tmp_path, trained)
    with pytest.raises(EngineError, match="the disk is full"):
        take_steps(training, trained, Schedule(steps=9), 1e-3, CONFIG)
    assert training.story[:3] == ["step 1", "step 2", "snapshot"]
    assert training.story.count("snapshot") == 1


def test_a_check_that_fails_ends_the_training(tmp_path: Path) -> None:
    def refuse(file: Path, weights: dict[str, Tensor]) -> None:
        assert load_file(file).keys() == weights.keys()
        raise EngineError("not what was trained", remedy="report it")

    with CheckpointWriter(engine(), keep=2) as saving:
        saving.start(1, Snapshot(tmp_path, check=refuse))
        with pytest.raises(EngineError, match="not what was trained"):
            saving.wait()


def test_an_interrupt_leaves_the_checkpoint_complete(tmp_path: Path) -> None:
    def interrupted() -> None:
        with CheckpointWriter(engine(), keep=2) as saving:
            saving.start(1, Snapshot(tmp_path))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [step_of(path) for path in checkpoints(tmp_path)] == [1]


def test_a_signal_ends_the_training_after_its_step(tmp_path: Path) -> None:
    trained, stop = engine(), StopSignal()
    training = Training(tmp_path, trained)
    training.skipped = lambda step, in_a_row: None  # type: ignore[method-assign]
    stop.number = 15
    config = CONFIG.replace(signal_exit_code=7)
    with pytest.raises(Interrupted, match="SIGTERM ended the run after step 1") as caught:
        take_steps(training, trained, Schedule(steps=9), 1e-3, config, stop=stop)
    assert training.story == ["step 1", "snapshot", "saved 1"]
    assert (caught.value.exit_code, caught.value.checkpoint) == (7, checkpoints(tmp_path)[-1])
    assert stop.taken
