# SPDX-License-Identifier: Apache-2.0
"""Write, find, verify, load and remove checkpoints of a run."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

from torch import Tensor

from aced_sdk.engine.base import TrainingEngine
from aced_sdk.engine.state import load_tensors, save_state, unreadable
from aced_sdk.errors import EngineError
from aced_sdk.files import (
    ReadError,
    check_digests,
    check_links,
    file_digests,
    inside,
    one_line,
    printable,
    read_json,
    save_tensors,
    sync,
    whole_folder,
    write_json,
)
from aced_sdk.files.reading import MIB

_STATE = "state.json"
_NAME = re.compile(r"step-([0-9]{8}|[1-9][0-9]{8,15})")


def checkpoint_folder(directory: Path, step: int) -> Path:
    """Folder of the checkpoint of a step, such as `checkpoints/step-00000100`.

    Raises:
        ReadError: if `checkpoints` is a link out of the run's folder.
    """
    return inside(directory, "checkpoints") / f"step-{step:08d}"


def save_checkpoint(
    directory: Path, step: int, engine: TrainingEngine, state: dict[str, Any], tensors: dict[str, Tensor], keep: int
) -> Path:
    """Write a checkpoint of an engine and wait for it. All ranks call it, rank 0 writes.

    Args:
        directory: the run's folder.
        step: steps taken.
        engine: its weights and optimizer state are saved.
        state: as for `write_checkpoint`.
        tensors: as for `write_checkpoint`.
        keep: number of checkpoints to keep.

    Raises:
        EngineError: if the checkpoint cannot be written.
        ReadError: if `checkpoints` is a link out of the run's folder.
    """
    target = checkpoint_folder(directory, step)
    weights, moments = engine.weights(), engine.moments()
    engine.ranks.in_first(lambda: write_checkpoint(directory, step, weights, moments, state, tensors, keep))
    return target


def write_checkpoint(
    directory: Path,
    step: int,
    weights: dict[str, Tensor],
    moments: dict[str, Tensor],
    state: dict[str, Any],
    tensors: dict[str, Tensor],
    keep: int,
) -> None:
    """Write `checkpoints/step-00000100`, whole or not at all, and remove all but the newest `keep`.

    `state.json` contains the digests of the other files and of its own values.

    Args:
        directory: the run's folder.
        step: steps taken.
        weights: `TrainingEngine.weights`.
        moments: `TrainingEngine.moments`.
        state: JSON values of the loop.
        tensors: tensors of the loop, such as generator states and counts.
        keep: number of checkpoints to keep.

    Raises:
        EngineError: if the checkpoint cannot be written.
        ReadError: if `checkpoints` is a link out of the run's folder.
    """
    target = checkpoint_folder(directory, step)
    try:
        with whole_folder(target) as folder:
            save_state(folder, weights, moments)
            save_tensors(folder / "loop.safetensors", {name: t.contiguous() for name, t in tensors.items()})
            values = {"step": step} | state | {"files": file_digests(folder)}
            write_json(folder / _STATE, values | {"digest": state_digest(values)})
            sync(folder)  # the folder is renamed only after its files are on the disk
        sync(target.parent)
        for old in [each for each in checkpoints(directory) if step_of(each) <= step][:-keep]:
            shutil.rmtree(old)
    except OSError as error:
        raise EngineError(
            f"the checkpoint of step {step} cannot be written to {printable(directory)}, or an older one not "
            f"removed: {error.strerror or error}",
            remedy="free disk space or check permissions, then resume",
        ) from error


def checkpoints(directory: Path) -> list[Path]:
    """List complete checkpoints, oldest first; links and folders with other names are ignored.

    Raises:
        ReadError: if `checkpoints` is a link out of the run's folder.
    """
    found = inside(directory, "checkpoints").glob("step-*")
    steps = [path for path in found if _NAME.fullmatch(path.name) and not path.is_symlink()]
    return sorted((path for path in steps if os.path.isfile(path / _STATE)), key=step_of)


def newest_intact(directory: Path) -> Path | None:
    """Return the newest checkpoint whose digests match; None if there is no checkpoint.

    Raises:
        EngineError: if all checkpoints are damaged.

    Warns:
        UserWarning: for each damaged checkpoint that is newer.
    """
    damaged: list[EngineError] = []
    for folder in reversed(checkpoints(directory)):
        try:
            read_checkpoint_state(folder)
        except EngineError as error:
            damaged.append(error)
            continue
        for newer in damaged:
            warnings.warn(f"{one_line(newer.cause, 1000)}; resuming from {folder.name}", stacklevel=2)
        return folder
    if damaged:
        raise damaged[0]
    return None


def read_checkpoint_state(folder: Path) -> dict[str, Any]:
    """Verify the digests of a checkpoint and return the loop's JSON values.

    Raises:
        EngineError: if the folder is damaged or has links out of it.
    """
    try:
        check_links(folder)
        state = read_json(folder / _STATE, MIB)
        if not isinstance(state, dict) or state.get("step") != step_of(folder):
            raise ReadError(f"{_STATE} is not that of step {step_of(folder)}", remedy="")
        if state.pop("digest", None) != state_digest(state):
            raise ReadError(f"{_STATE} is not the file that was saved", remedy="")
        files = state.pop("files", None)
        if not isinstance(files, dict):
            raise ReadError(f"{_STATE} holds no digests of the other files", remedy="")
        check_digests(folder, files, [_STATE])
    except ReadError as error:
        raise unreadable(folder, error) from error
    return state


def state_digest(values: dict[str, Any]) -> str:
    """sha256 of the values of `state.json` without `digest`."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def step_of(checkpoint: Path) -> int:
    """The step in the name of a checkpoint folder.

    Raises:
        EngineError: if the name is not that of a checkpoint.
    """
    found = _NAME.fullmatch(checkpoint.name)
    if not found:
        raise EngineError(f"{printable(checkpoint)} is not a checkpoint", remedy="name a folder such as step-00000100")
    return int(found[1])


def load_checkpoint(folder: Path, engine: TrainingEngine) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Load a checkpoint into the engine; return the loop's JSON values (with `step`) and tensors.

    Raises:
        EngineError: if the folder is damaged, has links out of it, or is of another model.
    """

    def read() -> tuple[dict[str, Any], dict[str, Tensor]]:
        state = read_checkpoint_state(folder)
        return state, load_tensors(folder, "loop.safetensors")

    state, tensors = engine.ranks.together(read)
    engine.load(folder)
    return state, tensors
