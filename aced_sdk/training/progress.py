# SPDX-License-Identifier: Apache-2.0
"""The progress of a run, stored in checkpoints so that it can be resumed at the next step."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field, StrictBool, TypeAdapter, ValidationError
from torch import Tensor

from aced_sdk.config import DistillConfig
from aced_sdk.data.rowset import Rows
from aced_sdk.engine import Snapshot, load_checkpoint, read_checkpoint_state
from aced_sdk.engine.state import unreadable
from aced_sdk.errors import CacheError, ConfigError, DataError
from aced_sdk.training.parts import Parts

Total = Annotated[int, Field(strict=True, ge=0, le=2**53)]  # the range of an event log


@dataclass(frozen=True)
class Totals:
    """Totals since step 0.

    Attributes:
        step: steps taken.
        trained: pairs trained on, without skipped steps.
        scored: pairs scored by the student for selection.
        distilled: pairs of second, uniformly drawn batches.
        collapsed: whether a collapse of the draws was logged.
    """

    step: Total = 0
    trained: Total = 0
    scored: Total = 0
    distilled: Total = 0
    collapsed: StrictBool = False


def snapshot(config: DistillConfig, parts: Parts, done: Totals, lanes: Rows) -> Snapshot:
    """The state of a run besides weights and optimizer, for a checkpoint.

    Args:
        config: the run.
        parts: the components of the loop.
        done: the totals.
        lanes: int64 [L, K], state of the order.
    """
    tensors = {
        "generator": parts.generator.get_state(),
        "lanes": torch.from_numpy(lanes),
        **parts.statistics.state_dict(),
        **noise_state(parts.engine.device),
    }
    state = asdict(done) | {"pool": parts.pool.fingerprint, "frozen": parts.frozen, "config": config.hash()}
    return Snapshot(config.directory, state, tensors)


def check_pool(checkpoint: Path, pool: str) -> None:
    """Check that a checkpoint belongs to a pool.

    Args:
        checkpoint: folder of the checkpoint.
        pool: fingerprint of the pool.

    Raises:
        EngineError: if the checkpoint is damaged.
        DataError: if the run was trained on another pool.
    """
    if read_checkpoint_state(checkpoint).get("pool") != pool:
        raise DataError(
            "the shards have changed since the run was started: a resumed run would mix two pools",
            remedy="restore the shards, or start a new run",
            field="data.shards",
        )


def restore(folder: Path, parts: Parts) -> tuple[Totals, Rows]:
    """Restore all state from a checkpoint; return the totals and the state of the order, int64 [L, K].

    Raises:
        EngineError: if the checkpoint cannot be read.
        CurationError: if its pool has another size.
        CacheError: if the run was trained with other frozen models.
        ConfigError: if the config has other lanes.
    """
    state, tensors = load_checkpoint(folder, parts.engine)
    if state.get("frozen", parts.frozen) != parts.frozen:  # older checkpoints lack it
        raise CacheError(
            "a reference or teacher has changed since the run was started: a resumed run would mix two models",
            remedy="restore the model's folder, or start a new run",
            field="reference",
        )
    try:
        done = TypeAdapter(Totals).validate_python(state)
        counts, draws, lanes = tensors["counts"], tensors["draws"], tensors["lanes"]
        # A super-batch across the end of an epoch may contain a pair twice.
        if counts.dtype != torch.int32 or bool(((counts < 0) | (counts > 2 * done.step)).any()):
            raise ValueError("the draw counts are not those of its steps")
        if draws.shape != () or int(draws) != done.trained:
            raise ValueError("the number of draws is not that of its steps")
        if lanes.dtype != torch.int64 or bool((lanes < 0).any()):
            raise ValueError("the lanes are no positions")
        parts.generator.set_state(tensors["generator"])
        set_noise_state(tensors, parts.engine.device)
    except (ValidationError, LookupError, ValueError, TypeError, RuntimeError) as error:
        raise unreadable(folder, error) from error
    if lanes.shape != parts.order.start().shape:
        raise ConfigError(
            f"the run reads its pool in another order: its checkpoint has {len(lanes)} lanes of {lanes[0].numel()} "
            f"positions, and the config {' lanes of '.join(map(str, parts.order.start().shape))}",
            remedy="restore data.order, data.lanes, data.weights and the batch sizes of the run, or start a new run",
            field="data.lanes",
        )
    parts.statistics.load_state_dict(tensors)
    return done, lanes.numpy()


def noise_state(device: torch.device) -> dict[str, Tensor]:
    """States of torch's global generators, which dropout uses."""
    states = {"torch": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_noise_state(states: dict[str, Tensor], device: torch.device) -> None:
    """Restore the states of `noise_state`; the device type may differ."""
    torch.set_rng_state(states["torch"])
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
