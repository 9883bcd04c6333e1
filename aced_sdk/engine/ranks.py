# SPDX-License-Identifier: Apache-2.0
"""Communication between ranks. A failure on one rank is raised on all, so that no rank waits for a failed one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NoReturn, TypeVar

import torch
from torch import distributed
from torch.distributed.rendezvous import rendezvous

from aced_sdk.engine.failures import Failures, another, described
from aced_sdk.engine.launch import Launch, master
from aced_sdk.errors import AcedError, EngineError
from aced_sdk.files import one_line

_T = TypeVar("_T")
_LIBRARIES = ("aced-sdk", "torch", "transformers", "deepspeed")
TIMEOUT_SECONDS = 600.0
_IN_USE = "EADDRINUSE"


class Ranks:
    """Communicate with the other ranks. All ranks must call the methods in the same order.

    Several ranks join a process group if they have not yet: gloo on CPUs, and nccl too where there is a GPU.

    Args:
        launch: rank and world size.
        device: device of this rank.
        timeout_seconds: a rank that does not answer for so long fails all. None: the timeout of the process group
            that exists, else 600 seconds.

    Raises:
        EngineError: if not all ranks can be reached, or the port is in use.
    """

    def __init__(self, launch: Launch, device: torch.device, timeout_seconds: float | None = None) -> None:
        self.rank, self.world_size = launch.rank, launch.world_size
        if self.world_size > 1:
            join(launch, device, timeout_seconds)
            # Values travel between CPUs where they can, so that no GPU is waited for.
            gloo = "gloo" in str(distributed.get_backend_config())
            self._device = torch.device("cpu") if gloo else device
            self._failures = Failures(self.rank, self.world_size)

    def sum(self, value: float) -> float:
        """Return the sum over all ranks, in float64."""
        return self._reduced(value, distributed.ReduceOp.SUM)

    def max(self, value: float) -> float:
        """Return the largest value of all ranks, in float64."""
        return self._reduced(value, distributed.ReduceOp.MAX)

    def _reduced(self, value: float, operation: Any) -> float:
        if self.world_size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self._device)
        distributed.all_reduce(total, operation)
        return float(total)

    def barrier(self) -> None:
        """Wait until all ranks are here, at most for the timeout."""
        self.sum(0)

    def first(self, value: _T) -> _T:
        """Return the value of rank 0."""
        if self.world_size == 1:
            return value
        values = [value]
        distributed.broadcast_object_list(values, 0, device=self._device)
        return values[0]

    def gather(self, value: _T) -> list[_T]:
        """Return the values of all ranks by rank."""
        values: list[Any] = [value] * self.world_size
        if self.world_size > 1:
            distributed.all_gather_object(values, value)
        return values

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
        """Run an action on rank 0 only; if it fails, raise on all ranks. It must end within the timeout."""
        self.together(action if self.rank == 0 else lambda: None)

    def only_first(self, action: Callable[[], None]) -> None:
        """Run an action on rank 0; the other ranks wait without a time limit, as long as rank 0 is alive.

        Call it inside `guarded`.
        """
        if self.world_size == 1:
            action()
        elif self.rank == 0:
            action()
            self._failures.note("first is done")
        else:
            self._failures.wait_for("first is done")

    def agree(self, values: Mapping[str, str], remedy: str) -> None:
        """Check that all ranks have the values of rank 0.

        Args:
            values: name to value, such as the fields of a config or the fingerprint of a pool.
            remedy: how to make them equal.

        Raises:
            EngineError: on all ranks, naming the first rank that differs, and what differs.
        """
        own, *others = self.gather(dict(values))
        for rank, other in enumerate(others, start=1):
            for name in [name for name in own | other if own.get(name) != other.get(name)]:
                here, there = (one_line(found.get(name, "nothing"), 80) for found in (other, own))
                cause = f"rank {rank} has another {one_line(name, 80)} than rank 0: {here} instead of {there}"
                error = EngineError(cause, remedy=remedy)
                error.reported_by = None if self.rank == rank else rank
                raise error

    def agree_on_versions(self) -> None:
        """Check that all ranks use the same versions of the libraries that matter.

        Raises:
            EngineError: on all ranks, naming the first rank that differs, and the library.
        """
        if self.world_size > 1:
            versions = {f"version of {name}": _version(name) for name in _LIBRARIES}
            self.agree(versions, "install the same versions on all machines")

    @contextmanager
    def guarded(self, report: Callable[[BaseException], None] | None = None) -> Iterator[None]:
        """Report a failure in the block once, and end the block on all ranks.

        Use it around all work over ranks. An error is raised unchanged on the rank that failed. The other ranks get
        an `EngineError` with its message and `reported_by`. A rank that was killed or does not answer is named by
        another rank. A rank that cannot leave the block after a failure elsewhere is ended with exit code 1.

        Args:
            report: called with the error on the rank that failed, before the other ranks end.
        """
        if self.world_size == 1:
            yield
            return
        with self._failures.guarded(report):
            yield
            self.barrier()  # rank 0 serves the store, so it must not leave before the others

    def _share(self, failure: BaseException | None) -> None:
        if self.world_size == 1 or not self.sum(float(failure is not None)):
            return
        texts = self.gather(None if failure is None else described(failure))
        rank, text = next((rank, text) for rank, text in enumerate(texts) if text is not None)
        if failure is None:
            raise another(rank, text)
        if rank != self.rank and isinstance(failure, Exception):
            defer(failure, rank, text)


def defer(failure: Exception, rank: int, text: str) -> NoReturn:
    """Raise a failure that `rank` reports already."""
    if isinstance(failure, AcedError):
        failure.reported_by = rank
        raise failure
    raise another(rank, text) from failure


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def join(launch: Launch, device: torch.device, timeout_seconds: float | None = None) -> None:
    """Join the process group. A single process needs no address and opens no port.

    Args:
        launch: rank and world size.
        device: device of this rank.
        timeout_seconds: the group's timeout; None: that of the existing group, or 600.

    Raises:
        EngineError: if the address is missing, the port is in use, or not all ranks arrive within the timeout.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if distributed.is_initialized():
        if timeout_seconds is not None:
            older = distributed.distributed_c10d._set_pg_timeout  # of torch before `set_timeout`
            getattr(distributed, "set_timeout", older)(timedelta(seconds=timeout_seconds))
        return
    seconds = TIMEOUT_SECONDS if timeout_seconds is None else timeout_seconds
    if launch.world_size == 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        store = distributed.HashStore()  # type: ignore[attr-defined]
        distributed.init_process_group(backend, store=store, rank=0, world_size=1)
        return
    host, port = master()
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    limit, started = timedelta(seconds=seconds), time.monotonic()
    try:
        store, _, _ = next(rendezvous("env://", launch.rank, launch.world_size, timeout=limit))
        distributed.init_process_group(
            backend, store=store, rank=launch.rank, world_size=launch.world_size, timeout=limit
        )
    except RuntimeError as error:
        if _IN_USE in str(error):
            raise EngineError(
                f"port {port} of {one_line(host, 80)} is in use",
                remedy="set MASTER_PORT to a free port, the same for all ranks",
                field="MASTER_PORT",
            ) from error
        raise EngineError(
            f"rank {launch.rank} waited {time.monotonic() - started:.0f} s at {one_line(host, 80)}:{port}, and the "
            f"{launch.world_size} ranks did not all arrive",
            remedy="check that all ranks were started, and that MASTER_ADDR and MASTER_PORT are the same for all",
            field="MASTER_ADDR",
        ) from error
