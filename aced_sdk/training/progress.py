# SPDX-License-Identifier: Apache-2.0
"""How far a run is, kept in checkpoints so that a resumed run goes on at the very step."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from aced_sdk.config import DistillConfig
from aced_sdk.engine import load_checkpoint, save_checkpoint
from aced_sdk.training.parts import Parts


@dataclass(frozen=True)
class Progress:
    """Totals since step 0.

    Attributes:
        step: steps taken.
        position: rows of the pool's order consumed.
        trained: pairs trained on; those of skipped steps do not count.
        scored: pairs scored by the student for selection.
        distilled: pairs of second, evenly drawn batches.
        collapsed: whether it was told that the draws have collapsed.
    """

    step: int = 0
    position: int = 0
    trained: int = 0
    scored: int = 0
    distilled: int = 0
    collapsed: bool = False


def keep(config: DistillConfig, parts: Parts, done: Progress) -> Path:
    """Write a checkpoint; returns its folder.

    Raises:
        EngineError: if it cannot be written.
    """
    tensors = {
        "generator": parts.generator.get_state(),
        **parts.statistics.state_dict(),
        **noise_state(parts.engine.device),
    }
    return save_checkpoint(
        config.directory, done.step, parts.engine, asdict(done), tensors, config.engine.keep_checkpoints
    )


def restore(folder: Path, parts: Parts) -> Progress:
    """Put everything back to where a checkpoint was written.

    Raises:
        EngineError: if it cannot be read.
        CurationError: if it is of another pool.
    """
    state, tensors = load_checkpoint(folder, parts.engine)
    parts.generator.set_state(tensors["generator"])
    set_noise_state(tensors, parts.engine.device)
    parts.statistics.load_state_dict(tensors)
    return Progress(**state)


def noise_state(device: torch.device) -> dict[str, Tensor]:
    """States of torch's own generators, which dropout in a tower draws from."""
    states = {"torch": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_noise_state(states: dict[str, Tensor], device: torch.device) -> None:
    """Put back what `noise_state` gave; a run may go on on a device of another kind."""
    torch.set_rng_state(states["torch"])
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
