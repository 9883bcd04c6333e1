# SPDX-License-Identifier: Apache-2.0
"""Rank and world size of this process, from the environment of deepspeed, torchrun, accelerate, srun or mpirun."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from aced_sdk.errors import EngineError
from aced_sdk.files import printable

_OWN = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
_MPI = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE")
_SLURM = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS")
_TOGETHER = "launch with deepspeed, torchrun, accelerate, srun or mpirun, which set all of them"
# torchrun and deepspeed set these for the processes that they start, also when srun or mpirun starts them on each node
_INNER = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")


@dataclass(frozen=True)
class Launch:
    """Rank, local rank and world size of this process."""

    rank: int
    local_rank: int
    world_size: int


def read_launch(environment: Mapping[str, str] | None = None, local_rank: str | None = None) -> Launch:
    """Read the launch of this process; without launch variables, a single process.

    RANK, LOCAL_RANK and WORLD_SIZE are read first, then the variables of Open MPI, then those of a Slurm step.

    Args:
        environment: the variables; None: those of this process.
        local_rank: value of the option `--local_rank`, which some launchers add to the command line.

    Raises:
        EngineError: if the variables contradict each other, or there are several ranks and no valid address.
    """
    env = os.environ if environment is None else environment
    names = _names(env)
    rank, local, world = (_number(env, name, 1 if place == 2 else 0) for place, name in enumerate(names))
    if names == _OWN and (env.get("RANK") is None) != (env.get("WORLD_SIZE") is None):
        given, missing = ("RANK", "WORLD_SIZE") if "RANK" in env else ("WORLD_SIZE", "RANK")
        raise EngineError(f"{given} is set, and {missing} is not", remedy=_TOGETHER, field=missing)
    if local_rank is not None:
        option = _number({"--local_rank": local_rank}, "--local_rank", 0)
        if names[1] in env and option != local:
            raise EngineError(
                f"--local_rank is {option}, and {names[1]} is {local}", remedy="leave one of them out", field=names[1]
            )
        local = option
    if not 0 <= rank < world:
        raise EngineError(f"rank {rank} is invalid for a world size of {world}", remedy=_TOGETHER, field=names[0])
    if not 0 <= local < world:
        cause = f"local rank {local} is invalid for a world size of {world}"
        raise EngineError(cause, remedy=_TOGETHER, field=names[1])
    _check_step(env, names, rank, world)
    if world > 1:
        master(env)
    return Launch(rank, local, world)


def master(environment: Mapping[str, str] | None = None) -> tuple[str, int]:
    """Host and port of the process group.

    Raises:
        EngineError: if MASTER_ADDR or MASTER_PORT is missing or invalid.
    """
    env = os.environ if environment is None else environment
    address, port = env.get("MASTER_ADDR", "").strip(), env.get("MASTER_PORT", "").strip()
    for name, value, example in (("MASTER_ADDR", address, "the host of rank 0"), ("MASTER_PORT", port, "29500")):
        if not value:
            raise EngineError(
                f"several ranks were launched, and {name} is not set",
                remedy=f"export {name} ({example}) for all ranks, or launch with deepspeed or torchrun",
                field=name,
            )
    if "/" in address or any(c.isspace() for c in address):
        cause = f"MASTER_ADDR is {printable(address, 80)}, which is not a host"
        raise EngineError(cause, remedy="write a host name or an IP address alone", field="MASTER_ADDR")
    if not (port.isascii() and port.isdecimal() and 0 < int(port) < 65536):
        cause = f"MASTER_PORT is {printable(port, 80)}, which is not a port"
        raise EngineError(cause, remedy="write a number from 1 to 65535", field="MASTER_PORT")
    return address, int(port)


def _names(env: Mapping[str, str]) -> tuple[str, str, str]:
    """The variables that this launch is read from."""
    if "RANK" in env or "WORLD_SIZE" in env:
        return _OWN
    # A batch script of Slurm has a SLURM_PROCID too, but is no task of a step.
    return next((names for names in (_MPI, _SLURM) if names[0] in env and names[2] in env), _OWN)


def _number(env: Mapping[str, str], name: str, default: int) -> int:
    text = env.get(name)
    try:
        return default if text is None else int(text)
    except ValueError:
        cause = f"{name} is {printable(text, 80)!r}, which is not a number"
        raise EngineError(cause, remedy=_TOGETHER, field=name) from None


def _check_step(env: Mapping[str, str], names: tuple[str, str, str], rank: int, world: int) -> None:
    """Check RANK and WORLD_SIZE against the srun or mpirun that started this process."""
    if names != _OWN or any(name in env for name in _INNER):
        return
    for outer in (_MPI, _SLURM):
        if outer[0] not in env or outer[2] not in env or (tasks := _number(env, outer[2], 1)) == 1:
            continue
        for name, own, other in (("WORLD_SIZE", world, outer[2]), ("RANK", rank, outer[0])):
            if own != (found := tasks if name == "WORLD_SIZE" else _number(env, other, 0)):
                raise EngineError(
                    f"{name} is {own}, and {other} is {found}",
                    remedy="unset RANK, LOCAL_RANK and WORLD_SIZE, or start one launcher per node",
                    field=name,
                )
