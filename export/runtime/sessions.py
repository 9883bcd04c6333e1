# SPDX-License-Identifier: Apache-2.0
"""onnxruntime sessions with bounds on memory and time."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from aced_sdk.files import memory_limit, printable
from aced_sdk.processing.plain.inputs import at_least_one
from export.runtime.errors import EncoderError, FolderError, InputError

SECONDS_PER_ROW = 60.0
_MEMORY_SHARE = 0.75  # of the memory that this process may take, for all its graphs

_RUNNING: dict[int, tuple[float, Any]] = {}  # runs in progress: when each must end, and its RunOptions
_watch = Thread()


def session_options(threads: int | None, precision: str) -> Any:
    """onnxruntime.SessionOptions for a graph of this precision.

    Raises:
        InputError: if `threads` is below 1 or too large.
    """
    options = onnxruntime.SessionOptions()
    if threads is not None:
        at_least_one(threads=threads)
        most = max(64, os.cpu_count() or 1)
        if threads > most:  # onnxruntime's wait for each other by spinning: some hundred on few cores never get ready
            raise InputError(f"threads is {threads}", remedy=f"give at most {most}", field="threads")
        options.intra_op_num_threads = threads
    if precision == "fp16":
        # The layout passes above this level only serve float32, and some of them crash on half precision.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    _bound_memory()
    options.add_session_config_entry("session.use_env_allocators", "1")
    return options


@cache
def _bound_memory() -> None:
    """Give the CPU sessions of this process one memory arena of bounded size; larger tensors are an error."""
    kind, memory = onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, onnxruntime.OrtMemType.DEFAULT
    onnxruntime.create_and_register_allocator(
        onnxruntime.OrtMemoryInfo("Cpu", kind, 0, memory),
        onnxruntime.OrtArenaCfg({"max_mem": int(_MEMORY_SHARE * memory_limit())}),
    )


def known_providers(providers: Sequence[str] | None) -> list[str]:
    """The providers, or the CPU's for None.

    Raises:
        InputError: if onnxruntime has one of them not.
    """
    chosen = list(providers) if providers is not None else ["CPUExecutionProvider"]
    there = onnxruntime.get_available_providers()
    for name in chosen:
        if name not in there:
            raise InputError(
                f"onnxruntime has no provider '{name}' here", remedy=f"take from: {', '.join(there)}", field="providers"
            )
    return chosen


def open_session(path: Path, options: Any, providers: Sequence[str]) -> Any:
    """An onnxruntime.InferenceSession of a file that `check_graph_file` has passed.

    Constants are not folded: an export has none to fold, and a file could make loading compute for hours.

    Raises:
        FolderError: if onnxruntime cannot load the file.
        InputError: if a provider does not start.
    """
    try:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=list(providers), disabled_optimizers=["ConstantFolding"]
        )
    except Exception as error:  # onnxruntime's errors share no base class
        raise FolderError(
            f"onnxruntime cannot load {printable(path)}: {printable(error)}", remedy="export the student again"
        ) from error
    for name in providers:
        if name not in session.get_providers():  # onnxruntime only warns, and continues without it
            raise InputError(
                f"onnxruntime cannot start '{name}' here",
                remedy="install its driver and libraries, or leave it out",
                field="providers",
            )
    return session


def check_ends(session: Any, part: str, inputs: Mapping[str, tuple[str | int, ...]], outputs: Collection[str]) -> None:
    """Compare a session's inputs and outputs with what the folder's other files say.

    Args:
        session: of the graph.
        part: its name, for the error.
        inputs: type and the sizes after the batch, by name.
        outputs: names; each is a float32 tensor.

    Raises:
        FolderError: if they differ.
    """
    takes = {one.name: (one.type, *one.shape[1:]) for one in session.get_inputs()}
    gives = {one.name: one.type for one in session.get_outputs()}
    if takes != inputs or gives != dict.fromkeys(outputs, "tensor(float)"):
        raise FolderError(
            f"the {part} graph takes {printable(takes)} and gives {printable(gives)}, not what its folder says",
            remedy="export the student again",
        )


def run_session(
    session: Any, part: str, outputs: Sequence[str], inputs: Mapping[str, NDArray[Any]]
) -> list[NDArray[np.float32]]:
    """The outputs as float32. A run that takes longer than a minute for each row is stopped between two nodes.

    Raises:
        EncoderError: if onnxruntime cannot run it: a wrong shape, a missing input, no memory, no time.
    """
    options = onnxruntime.RunOptions()
    rows = max((len(values) for values in inputs.values()), default=1)
    _start_watch()
    _RUNNING[id(options)] = time.monotonic() + SECONDS_PER_ROW * max(1, rows), options
    try:
        return [np.asarray(value, np.float32) for value in session.run(list(outputs), dict(inputs), options)]
    except Exception as error:  # onnxruntime's errors share no base class
        raise EncoderError(
            f"onnxruntime cannot run the {part} graph: {printable(error)}",
            remedy="give what preprocess or tokenize gives; if memory or time is short, a smaller batch",
            field="inputs",
        ) from error
    finally:
        del _RUNNING[id(options)]


def _start_watch() -> None:
    """One thread for all runs: a timer for each would take longer than the run of a small graph."""
    global _watch
    if not _watch.is_alive():  # the first time, or after a fork
        _watch = Thread(target=_stop_late_runs, name="onnx-watch", daemon=True)
        _watch.start()


def _stop_late_runs() -> None:
    while True:
        time.sleep(1)
        now = time.monotonic()
        for end, options in list(_RUNNING.values()):
            if now > end:
                options.terminate = True
