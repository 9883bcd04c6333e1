# SPDX-License-Identifier: Apache-2.0
"""Write checkpoints in a thread while training continues."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from aced_sdk.engine.base import TrainingEngine
from aced_sdk.engine.checkpoint import checkpoint_folder, write_checkpoint


@dataclass(frozen=True)
class Snapshot:
    """What a training adds to a checkpoint.

    Attributes:
        directory: the run's folder.
        state: JSON values.
        tensors: tensors, such as generator states and counts; they are copied.
        check: called with the file of the weights and the weights that were saved; it may raise an `AcedError`.
    """

    directory: Path
    state: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    check: Callable[[Path, dict[str, Tensor]], None] | None = None


class CheckpointWriter:
    """Write checkpoints of an engine, at most one at a time. All ranks call the methods, rank 0 writes.

    Weights and optimizer state are copied to the CPU first, so that they need the memory once more.

    Args:
        engine: its weights and optimizer state are saved.
        keep: number of checkpoints to keep.
    """

    def __init__(self, engine: TrainingEngine, keep: int) -> None:
        self.engine, self.keep = engine, keep
        self._threads = ThreadPoolExecutor(1, "aced-checkpoint")
        self._written: Future[None] | None = None
        self._step, self._folder = 0, Path()

    def start(self, step: int, snapshot: Snapshot) -> None:
        """Copy the state and start to write it. Call `wait` before if another checkpoint is being written."""
        weights, moments = self.engine.weights(), self.engine.moments()
        tensors = {name: tensor.clone() for name, tensor in snapshot.tensors.items()}
        folder = checkpoint_folder(snapshot.directory, step)

        def write() -> None:
            write_checkpoint(snapshot.directory, step, weights, moments, snapshot.state, tensors, self.keep)
            if snapshot.check is not None:
                snapshot.check(folder / "weights.safetensors", weights)

        first = self.engine.ranks.rank == 0
        self._step, self._folder = step, folder
        self._written = self._threads.submit(write if first else lambda: None)

    def poll(self) -> tuple[int, Path] | None:
        """Step and folder of the checkpoint that has been written since the last call, if any; does not wait.

        Raises:
            EngineError: if it could not be written.
        """
        if self._written is None or not self.engine.ranks.first(self._written.done()):
            return None
        return self.wait()

    def wait(self) -> tuple[int, Path] | None:
        """Wait for the checkpoint that is being written; returns its step and folder.

        Raises:
            EngineError: if it could not be written.
        """
        if self._written is None:
            return None
        written, self._written = self._written, None
        self.engine.ranks.together(written.result)
        return self._step, self._folder

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown()  # also after an error the checkpoint is completed
