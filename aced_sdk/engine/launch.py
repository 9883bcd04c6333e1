# SPDX-License-Identifier: Apache-2.0
"""Who this process is among the others, however it was launched (deepspeed, torchrun, srun, or nobody)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from aced_sdk.errors import EngineError


@dataclass(frozen=True)
class Launch:
    """This process's place."""

    rank: int
    local_rank: int
    world_size: int


def read_launch(environment: Mapping[str, str] | None = None) -> Launch:
    """Read RANK, LOCAL_RANK and WORLD_SIZE, or Slurm's names for them; one process where there are none.

    Raises:
        EngineError: if a value is no number, or the rank lies outside the world.
    """
    env = os.environ if environment is None else environment

    def number(name: str, slurm: str, default: int) -> int:
        text = env.get(name) or (env.get(slurm) if "SLURM_PROCID" in env else None)
        try:
            return int(text) if text else default
        except ValueError:
            raise EngineError(
                f"{name}={text!r} is no number", remedy="launch with deepspeed, torchrun or srun", field=name
            ) from None

    launch = Launch(
        number("RANK", "SLURM_PROCID", 0),
        number("LOCAL_RANK", "SLURM_LOCALID", 0),
        number("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", 1),
    )
    if not 0 <= launch.rank < launch.world_size:
        raise EngineError(
            f"rank {launch.rank} lies outside a world of {launch.world_size}",
            remedy="set RANK and WORLD_SIZE together",
            field="RANK",
        )
    return launch
