# SPDX-License-Identifier: Apache-2.0
"""Rank and world size of this process, from the environment of deepspeed, torchrun or srun."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from aced_sdk.errors import EngineError


@dataclass(frozen=True)
class Launch:
    """Rank, local rank and world size of this process."""

    rank: int
    local_rank: int
    world_size: int


def read_launch(environment: Mapping[str, str] | None = None) -> Launch:
    """Read RANK, LOCAL_RANK and WORLD_SIZE, or Slurm's variables; without them, a single process.

    Raises:
        EngineError: if a value is not a number, or the rank is not in 0..world_size - 1.
    """
    env = os.environ if environment is None else environment

    def number(name: str, slurm: str, default: int) -> int:
        text = env.get(name) or (env.get(slurm) if "SLURM_PROCID" in env else None)
        try:
            return int(text) if text else default
        except ValueError:
            raise EngineError(
                f"{name}={text!r} is not a number", remedy="launch with deepspeed, torchrun or srun", field=name
            ) from None

    launch = Launch(
        number("RANK", "SLURM_PROCID", 0),
        number("LOCAL_RANK", "SLURM_LOCALID", 0),
        number("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", 1),
    )
    if not 0 <= launch.rank < launch.world_size:
        raise EngineError(
            f"rank {launch.rank} is invalid for a world size of {launch.world_size}",
            remedy="set RANK and WORLD_SIZE together",
            field="RANK",
        )
    return launch
