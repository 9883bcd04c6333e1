# SPDX-License-Identifier: Apache-2.0
"""The functions of the public API: distill, resume, plan, evaluate, cache_embeddings, index, load and report."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from os import PathLike, fspath
from pathlib import Path
from typing import Literal

import torch

from aced_sdk.cache import EmbeddingCache, FrozenModel, FrozenSource, default_directory
from aced_sdk.config import Data, DistillConfig, Engine, Frozen, FrozenConfig
from aced_sdk.config.base import unknown
from aced_sdk.data import Pool, open_indexes
from aced_sdk.data.shards import shard_paths
from aced_sdk.engine import (
    Callback,
    Ranks,
    checkpoints,
    newest_intact,
    pick_device,
    read_checkpoint_state,
    read_launch,
    step_of,
    thread_limit,
)
from aced_sdk.engine.events import Event, StepDone
from aced_sdk.errors import ConfigError, EngineError, UnsupportedError
from aced_sdk.evaluation import EvaluateEvery, evaluate, expand_names, load_task, open_task
from aced_sdk.files import alone, home, inside, one_line, printable
from aced_sdk.planning import Plan, estimate
from aced_sdk.reporting import JsonlWriter, read_events
from aced_sdk.reporting.run_bar import RunBar
from aced_sdk.reporting.run_report import report
from aced_sdk.towers import DualEncoder, load
from aced_sdk.training.events import Evaluated
from aced_sdk.training.run import CONFIG, STUDENT, Run, assemble, open_inputs, train_and_save

EVENTS = "events.jsonl"
_RESUME = ("never", "auto", "must")

__all__ = ["Plan", "Run", "cache_embeddings", "distill", "evaluate", "index", "load", "plan", "report", "resume"]


def distill(
    config: DistillConfig, callbacks: Sequence[Callback] = (), resume: Literal["never", "auto", "must"] = "never"
) -> Run:
    """Distil a student: select, train, evaluate and save.

    Missing embedding caches are written first. Events are passed to `callbacks` and logged to
    `directory/events.jsonl`. The trained student is saved to `directory/student` in open_clip's layout.

    SIGTERM or SIGUSR1 during training ends the run with a checkpoint after the current step.

    Args:
        config: the run. The methods (IID, KD, I-ACID, H-ACID, ACED) differ only in `curation` and `objective`.
        callbacks: called with each event (`aced_sdk.engine.events`, `aced_sdk.training.events`).
        resume: "never" refuses a directory that contains a run; "auto" resumes the run in the directory, or starts
            one; "must" resumes it. A changed `config` replaces `config.yaml`, with the warning of `aced.resume`.

    Raises:
        ConfigError: if the directory contains a run, or checkpoints or a folder `student` of another run.
        Interrupted: after SIGTERM or SIGUSR1.
        UnsupportedError: for several ranks.
        AcedError: if data, models or training fail; the error has a remedy.
    """
    if resume not in _RESUME:
        raise unknown("resume", resume, _RESUME, "resume")
    _check_ranks()
    directory = config.directory
    if resume == "must":
        _check_run(directory)
    # Lock before writing the config: another process may be preparing its run in this folder.
    with _alone(directory):
        if resume != "never" and _holds_run(directory):
            return _resume(config, callbacks)
        if resume == "must":
            raise _no_run(directory)
        _check_free(directory)
        config.to_yaml(directory / CONFIG)
        return _run(config, callbacks, None)


def _check_ranks() -> None:
    """Refuse several ranks before anything is written; rank 0 reports it.

    Raises:
        UnsupportedError: if several ranks were launched.
    """
    launch = read_launch()
    if launch.world_size > 1:
        error = UnsupportedError(
            f"{launch.world_size} ranks were launched, and this version distils on one",
            remedy="launch one process; distillation over ranks is planned for the next release",
            field="engine",
        )
        error.reported_by = None if launch.rank == 0 else 0
        raise error


def _holds_run(directory: Path) -> bool:
    """Whether the directory contains a config, and a run that has started."""
    return (directory / CONFIG).exists() and (_started(directory) or bool(checkpoints(directory)))


def _started(directory: Path) -> bool:
    events = inside(directory, EVENTS)
    return events.is_file() and any(row["event"] == "run_started" for row in read_events(events))


def _check_free(directory: Path) -> None:
    """Refuse a folder with files that a new run would mix with its own or replace.

    A run that failed before its first step may be started again.

    Raises:
        ConfigError: if the folder contains a run, checkpoints or a student.
    """
    if _holds_run(directory):
        raise ConfigError(
            f"{printable(directory)} holds a run already",
            remedy="resume it with aced.distill(config, resume='auto') or aced.resume(directory), or name another "
            "directory",
            field="directory",
        )
    old = checkpoints(directory)
    student = directory / STUDENT
    for path in (*old[-1:], *([student] if os.path.lexists(student) and not student.is_symlink() else [])):
        raise ConfigError(
            f"{printable(path)} is not of this run: a new run would mix with it or replace it",
            remedy="move it away, or name another directory",
            field="directory",
        )


@contextmanager
def _writable(directory: Path) -> Iterator[None]:
    """Raise a ConfigError that names the run's folder if a file in it cannot be read or written."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"cannot write to {printable(directory)}: {error.strerror}",
            remedy="check permissions and space",
            field="directory",
        ) from error


def resume(directory: str | Path, callbacks: Sequence[Callback] = ()) -> Run:
    """Resume a run from its newest intact checkpoint. The result is bit-identical to an uninterrupted run.

    Args:
        directory: the run's folder.
        callbacks: as for `distill`.

    Raises:
        EngineError: if the folder contains no run, or all checkpoints are damaged or of another model.
        Interrupted: after SIGTERM or SIGUSR1, as in `distill`.
        UnsupportedError: for several ranks.
        DataError: if the shards have changed since the run was started.

    Warns:
        UserWarning: if a newer checkpoint is damaged, the checkpoints are missing, or `config.yaml` was changed.
    """
    _check_ranks()
    directory = Path(directory)
    _check_run(directory)
    with _alone(directory):
        config = DistillConfig.from_yaml(inside(directory, CONFIG))
        return _resume(config, callbacks, directory)


def _check_run(directory: Path) -> None:
    if not os.path.isfile(directory / CONFIG):
        raise _no_run(directory)


def _no_run(directory: Path) -> EngineError:
    return EngineError(
        f"{printable(directory)} holds no run", remedy="start one with aced.distill(config)", field="directory"
    )


def _resume(config: DistillConfig, callbacks: Sequence[Callback], directory: Path | None = None) -> Run:
    """Resume a run from its newest intact checkpoint.

    Args:
        config: the run.
        callbacks: as for `distill`.
        directory: folder of the config, which may have been moved; None: `config` is new and is written to its folder.
    """
    found = config.directory if directory is None else directory
    resume_from = newest_intact(found)
    _warn_of_changes(found, config, resume_from)
    if directory is not None and os.path.realpath(config.directory) != os.path.realpath(directory):
        config = config.replace(directory=directory)  # the folder was moved
    return _run(config, callbacks, resume_from, new_config=directory is None)


def _warn_of_changes(directory: Path, config: DistillConfig, resume_from: Path | None) -> None:
    """Warn if the config was changed or the checkpoints are missing.

    Raises:
        EngineError: if the checkpoint was written by another run: its config hash is not in the event log.
    """
    events = inside(directory, EVENTS)
    started, saved = list[str](), False
    for row in read_events(events) if events.is_file() else ():
        saved = saved or row["event"] == "checkpoint_saved"
        if row["event"] == "run_started" and isinstance(row.get("config_hash"), str):
            started.append(row["config_hash"][:64])
    where = one_line(directory, 500)
    if resume_from is not None and started:
        own = read_checkpoint_state(resume_from).get("config")  # older checkpoints lack it
        if own is not None and own not in started:
            raise EngineError(
                f"the checkpoint {printable(resume_from)} was written by a run with another config",
                remedy="remove it, or resume the run that it is from",
                field="directory",
            )
    if started and started[0] != config.hash():
        warnings.warn(f"{where}: config.yaml is not the config that the run was started with", stacklevel=4)
    if resume_from is None and saved:
        warnings.warn(f"{where}: the run's checkpoints are gone; it starts again at step 0", stacklevel=4)


def _run(
    config: DistillConfig, callbacks: Sequence[Callback], resume_from: Path | None, new_config: bool = False
) -> Run:
    """Run to the end; with `new_config`, config.yaml is replaced once a step is taken: before, it may be refused."""
    events = config.directory / EVENTS
    with (
        JsonlWriter(events) as writer,
        RunBar(f"distil {config.directory.name}") as bar,
        thread_limit(config.engine.threads),
    ):
        writer.truncate_after(step_of(resume_from) if resume_from else -1)
        rows = [row for row in read_events(events) if row["event"] == "evaluated"]  # of an interrupted run
        metrics = {task: values for row in rows for task, values in row["metrics"].items()}

        def remember(event: Event) -> None:
            nonlocal new_config
            if isinstance(event, Evaluated):
                metrics.update(event.metrics)
            if new_config and isinstance(event, StepDone):
                config.to_yaml(config.directory / CONFIG)
                new_config = False

        inputs = open_inputs(config, resume_from, partial(bar.watch, "index the pool"))
        listeners: list[Callback] = [writer, bar, remember, *callbacks]
        evaluators = _evaluators(config, inputs.student, listeners)
        cost = estimate(config, inputs.pool, inputs.student, inputs.frozen)
        parts = assemble(config, inputs, bar.watch)
        del inputs  # frees the frozen models; training reads their cached embeddings
        parts.callbacks += [*evaluators, *listeners]
        run = train_and_save(config, parts, resume_from, {"plan": str(cost)})
    return replace(run, metrics=run.metrics | {"evaluation": metrics})


def _evaluators(config: DistillConfig, student: DualEncoder, listeners: Sequence[Callback]) -> list[Callback]:
    """The callback that evaluates during training; empty without tasks. The tasks are loaded now."""
    held_out = config.evaluation
    if not held_out.tasks or held_out.data_root is None:
        return []
    tasks = [
        load_task(name, held_out.data_root, student, max_unusable_fraction=held_out.max_unusable_fraction)
        for name in expand_names(held_out.tasks)
    ]
    return [EvaluateEvery(student, tasks, held_out.every or config.schedule.steps, listeners)]


def plan(config: DistillConfig) -> Plan:
    """Estimate the cost of a run and check its data, models and tasks, without starting it.

    Raises:
        ConfigError: if a step draws more pairs than the pool has.
        ModelError: if the student's architecture or a frozen model cannot be used.
        DataError: if the shards cannot be read.
        EvaluationError: if an evaluation task is missing or lacks a file.
    """
    inputs = open_inputs(config)
    if (root := config.evaluation.data_root) is not None:
        for name in expand_names(config.evaluation.tasks):
            open_task(name, root)
    return estimate(config, inputs.pool, inputs.student, inputs.frozen)


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Lock the run's folder for this process."""
    with ExitStack() as held:
        with _writable(directory):
            held.enter_context(alone(directory, "a run"))
        yield


def cache_embeddings(
    model: str | PathLike[str] | DualEncoder | FrozenConfig,
    data: Data | str | PathLike[str] | Sequence[str | PathLike[str]],
    directory: str | PathLike[str] | None = None,
    batch_size: int = 256,
    dtype: Literal["fp16", "bf16"] | None = None,
) -> EmbeddingCache:
    """Embed a pool with a frozen model. An interrupted call can be repeated: intact rows are kept.

    If several processes are launched (deepspeed, torchrun, srun), they share the shards, and each embeds on its own
    device.

    Args:
        model: folder or hub name of a dual encoder, the encoder itself (it stays on its device), or the config of a
            frozen source. `Stored` reads embeddings from the shards.
        data: the pool's `Data` config, or its shards.
        directory: output folder. Default: a folder in the cache home, named after model and pool.
        batch_size: pictures per forward pass.
        dtype: dtype of the stored embeddings. None: that of the existing cache, or fp16 for a new one.

    Raises:
        CacheError: if the directory contains a cache of another model or other shards, or cannot be written.
        DataError: if shards are missing or broken, or too many pairs are unusable.
        EngineError: if another process of the launch fails.
    """
    data, launch = _pool_config(data), read_launch()
    device = pick_device(Engine(), launch.local_rank)
    source: FrozenSource
    if isinstance(model, DualEncoder):
        device, source = next(model.parameters()).device, FrozenModel.of(model)
    else:
        config = model if isinstance(model, FrozenConfig) else Frozen(model=fspath(model))
        source = config.build().to(device)
    ranks = Ranks(launch, device)
    with ranks.guarded(), RunBar("cache embeddings") as bar:
        pool = index(data)
        target = Path(directory) if directory is not None else default_directory(source.fingerprint, pool)
        given = {"model": source.fingerprint, "data": data.hash(), "directory": str(target.absolute())}
        given |= {"dtype": str(dtype), "batch size": str(batch_size)}
        ranks.agree(given, remedy="call it with the same arguments in all processes")
        watch = partial(bar.watch, "cache embeddings")
        return source.write(pool, target, data, batch_size=batch_size, progress=watch, dtype=dtype, ranks=ranks)


def index(
    data: Data | str | PathLike[str] | Sequence[str | PathLike[str]], beside: bool = False, workers: int = 8
) -> Pool:
    """Index the shards of a pool that have no index yet, or have changed. The ranks of a launch share the work.

    Runs index their pools themselves; for a large pool, this call does it once, in parallel and ahead of time.

    Args:
        data: the pool's `Data` config, or its shards.
        beside: keep the indexes beside the shards (`0000.tar.index`), where other machines find them. False: in the
            cache home.
        workers: threads that index, in each process.

    Returns:
        The pool.

    Raises:
        DataError: if shards are missing or broken, or an index cannot be written beside its shard.
        EngineError: if another process of the launch fails, or sees other shards.
    """
    data = _pool_config(data)
    launch = read_launch()
    ranks = Ranks(launch, torch.device("cpu"))
    with ranks.guarded(), RunBar("index the pool") as bar:
        shards = [shard for group in shard_paths(data.shards) for shard in group]
        own, watch = shards[launch.rank :: launch.world_size], partial(bar.watch, "index the pool")
        ranks.together(lambda: open_indexes(own, watch, beside_shards=beside, workers=workers))
        pool = ranks.together(lambda: Pool(data.shards, caption_lines=data.caption_lines))
        ranks.agree({"pool": pool.fingerprint}, remedy="let all processes see the same files")
        if pool.unsaved:
            warnings.warn(
                f"{pool.unsaved} indexes cannot be written to {printable(home())}, so they are built at each opening; "
                "set ACED_HOME to a folder that can be written, or index beside the shards",
                stacklevel=2,
            )
        return pool


def _pool_config(data: Data | str | PathLike[str] | Sequence[str | PathLike[str]]) -> Data:
    if isinstance(data, Data):
        return data
    given = [data] if isinstance(data, str | PathLike) else data
    return Data(shards=tuple(fspath(shard) for shard in given))
