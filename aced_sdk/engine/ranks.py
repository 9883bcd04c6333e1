# SPDX-License-Identifier: Apache-2.0
"""Communication between ranks. A failure on one rank is raised on all, so that no rank waits for a failed one."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from aced_sdk.engine.launch import Launch
from aced_sdk.errors import EngineError

_T = TypeVar("_T")


class Ranks:
    """Communicate with the other ranks. All ranks must call the methods in the same order.

    Args:
        launch: rank and world size. Several processes join a process group (gloo on CPUs, nccl on GPUs) if needed.
        device: device of this process.

    Raises:
        EngineError: if there are several processes and no MASTER_ADDR.
    """

    def __init__(self, launch: Launch, device: torch.device) -> None:
        self.rank, self.world_size = launch.rank, launch.world_size
        self._device = device
        if self.world_size > 1:
            join(launch, device)

    def sum(self, value: float) -> float:
        """Return the sum over all ranks, in float64."""
        if self.world_size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self._device)
        torch.distributed.all_reduce(total)
        return float(total)

    def first(self, value: _T) -> _T:
        """Return the value of rank 0."""
        if self.world_size == 1:
            return value
        values = [value]
        torch.distributed.broadcast_object_list(values, 0, device=self._device)
        return values[0]

    def together(self, action: Callable[[], _T]) -> _T:
        """Run an action without collectives; if it fails on any rank, raise on all ranks.

        Raises:
            EngineError: if it failed on another rank, with its message. A local error is raised unchanged.
        """
        try:
            result = action()
        except BaseException as error:  # other ranks must not wait after an interrupt either
            self._share(error)
            raise
        self._share(None)
        return result

    def in_first(self, action: Callable[[], None]) -> None:
        """Run an action on rank 0 only; if it fails, raise on all ranks."""
        self.together(action if self.rank == 0 else lambda: None)

    def _share(self, failure: BaseException | None) -> None:
        if self.world_size == 1 or not self.sum(float(failure is not None)):
            return
        words: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(words, failure and f"{type(failure).__name__}: {failure}")
        if failure is None:
            rank, text = next((rank, text) for rank, text in enumerate(words) if text is not None)
            raise EngineError(f"process {rank} failed: {text}", remedy=f"see the output of process {rank}")


def join(launch: Launch, device: torch.device) -> None:
    """Join the process group. A single process needs no address and opens no port.

    Raises:
        EngineError: if there are several processes and no MASTER_ADDR.
    """
    if torch.distributed.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if launch.world_size == 1:
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    elif "MASTER_ADDR" not in os.environ:
        raise EngineError(
            f"{launch.world_size} processes, and no MASTER_ADDR",
            remedy="launch with deepspeed or torchrun, or export MASTER_ADDR",
        )
    else:
        torch.distributed.init_process_group(backend, rank=launch.rank, world_size=launch.world_size)
