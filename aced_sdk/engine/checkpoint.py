# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: whole folders, newest found, old ones pruned."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from aced_sdk.engine.base import Engine
from aced_sdk.engine.state import save_state
from aced_sdk.errors import EngineError
from aced_sdk.files import save_tensors, whole_folder, write_json


def save_checkpoint(
    directory: Path, step: int, engine: Engine, state: dict[str, Any], tensors: dict[str, Tensor], keep: int
) -> Path:
    """Write `checkpoints/step-00000100` and drop all but the newest `keep`. All processes call it, rank 0 writes.

    Args:
        directory: the run's folder.
        step: steps taken.
        engine: its weights and optimizer go along.
        state: JSON values of the loop.
        tensors: generator states, counts and the like.
        keep: how many checkpoints stay.
    """
    target = directory / "checkpoints" / f"step-{step:08d}"
    weights, moments = engine.weights(), engine.moments()

    def write() -> None:
        try:
            with whole_folder(target) as folder:
                save_state(folder, weights, moments)
                save_tensors(folder / "loop.safetensors", {name: t.contiguous() for name, t in tensors.items()})
                write_json(folder / "state.json", {"step": step} | state)
        except OSError as error:
            raise EngineError(
                f"the checkpoint of step {step} cannot be written to {directory}: {error.strerror or error}",
                remedy="free disk space or check permissions, then resume: older checkpoints are untouched",
            ) from error
        for old in checkpoints(directory)[:-keep]:
            shutil.rmtree(old)

    engine.ranks.in_first(write)
    return target


def checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(p for p in (directory / "checkpoints").glob("step-*") if (p / "state.json").is_file())


def step_of(checkpoint: Path) -> int:
    """The steps that a checkpoint folder's name tells."""
    return int(checkpoint.name.removeprefix("step-"))


def load_checkpoint(folder: Path, engine: Engine) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Restore the engine; returns the loop's JSON values (with `step`) and tensors.

    Raises:
        EngineError: if the folder is torn or does not fit.
    """

    def read() -> tuple[dict[str, Any], dict[str, Tensor]]:
        try:
            state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            return state, load_file(folder / "loop.safetensors")
        except (OSError, ValueError, SafetensorError) as error:
            raise EngineError(
                f"the checkpoint {folder} cannot be read: {error}",
                remedy="remove that folder and resume: the next older checkpoint serves",
            ) from error

    state, tensors = engine.ranks.together(read)
    engine.load(folder)
    return state, tensors
