# SPDX-License-Identifier: Apache-2.0
"""The functions of the public API: distill, resume, plan, evaluate, cache_embeddings, load and report."""

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

from aced_sdk.cache import EmbeddingCache, FrozenModel, FrozenSource, default_directory
from aced_sdk.config import Data, DistillConfig, Engine, Frozen, FrozenConfig
from aced_sdk.data import Pool
from aced_sdk.engine import (
    Callback,
    checkpoints,
    newest_intact,
    pick_device,
    read_checkpoint_state,
    step_of,
    thread_limit,
)
from aced_sdk.engine.events import Event
from aced_sdk.errors import ConfigError, EngineError
from aced_sdk.evaluation import EvaluateEvery, evaluate, expand_names, load_task, open_task
from aced_sdk.files import alone, inside, one_line, printable
from aced_sdk.planning import Plan, estimate
from aced_sdk.reporting import JsonlWriter, read_events
from aced_sdk.reporting.run_bar import RunBar
from aced_sdk.reporting.run_report import report
from aced_sdk.towers import DualEncoder, load
from aced_sdk.training.events import Evaluated
from aced_sdk.training.run import CONFIG, STUDENT, Run, assemble, open_inputs, train_and_save

EVENTS = "events.jsonl"

__all__ = ["Plan", "Run", "cache_embeddings", "distill", "evaluate", "load", "plan", "report", "resume"]


def distill(config: DistillConfig, callbacks: Sequence[Callback] = ()) -> Run:
    """Distil a student: select, train, evaluate and save.

    Missing embedding caches are written first. Events are passed to `callbacks` and logged to
    `directory/events.jsonl`. The trained student is saved to `directory/student` in open_clip's layout.

    Args:
        config: the run. The methods (IID, KD, I-ACID, H-ACID, ACED) differ only in `curation` and `objective`.
        callbacks: called with each event (`aced_sdk.engine.events`, `aced_sdk.training.events`).

    Raises:
        ConfigError: if the directory contains a run, or checkpoints or a folder `student` of another run.
        AcedError: if data, models or training fail; the error has a remedy.
    """
    # Lock before writing the config: another process may be preparing its run in this folder.
    with _alone(config.directory):
        _check_free(config.directory)
        config.to_yaml(config.directory / CONFIG)
        return _run(config, callbacks, None)


def _check_free(directory: Path) -> None:
    """Refuse a folder with files that a new run would mix with its own or replace.

    A run that failed before its first step may be started again.

    Raises:
        ConfigError: if the folder contains a run, checkpoints or a student.
    """
    events = inside(directory, EVENTS)
    started = events.is_file() and any(row["event"] == "run_started" for row in read_events(events))
    old = checkpoints(directory)
    if (directory / CONFIG).exists() and (started or old):
        raise ConfigError(
            f"{printable(directory)} holds a run already",
            remedy="continue it with aced.resume(directory), or name another directory",
            field="directory",
        )
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
        DataError: if the shards have changed since the run was started.

    Warns:
        UserWarning: if a newer checkpoint is damaged, the checkpoints are missing, or `config.yaml` was changed.
    """
    directory = Path(directory)
    if not os.path.isfile(directory / CONFIG):
        raise EngineError(
            f"{printable(directory)} holds no run", remedy="start one with aced.distill(config)", field="directory"
        )
    with _alone(directory):
        config = DistillConfig.from_yaml(inside(directory, CONFIG))
        resume_from = newest_intact(directory)
        _warn_of_changes(directory, config, resume_from)
        if os.path.realpath(config.directory) != os.path.realpath(directory):
            config = config.replace(directory=directory)  # the folder was moved
        return _run(config, callbacks, resume_from)


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
        warnings.warn(f"{where}: config.yaml is not the config that the run was started with", stacklevel=3)
    if resume_from is None and saved:
        warnings.warn(f"{where}: the run's checkpoints are gone; it starts again at step 0", stacklevel=3)


def _run(config: DistillConfig, callbacks: Sequence[Callback], resume_from: Path | None) -> Run:
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
            if isinstance(event, Evaluated):
                metrics.update(event.metrics)

        inputs = open_inputs(config, resume_from)
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
    """Embed a pool with a frozen model, shard by shard. An interrupted call can be repeated: complete shards are kept.

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
    """
    if not isinstance(data, Data):
        given = [data] if isinstance(data, str | PathLike) else data
        data = Data(shards=tuple(fspath(shard) for shard in given))
    pool = Pool(data.shards, caption_lines=data.caption_lines)
    source: FrozenSource
    if isinstance(model, DualEncoder):
        source = FrozenModel.of(model)
    else:
        config = model if isinstance(model, FrozenConfig) else Frozen(model=fspath(model))
        source = config.build().to(pick_device(Engine(), 0))
    target = Path(directory) if directory is not None else default_directory(source.fingerprint, pool)
    with RunBar("cache embeddings") as bar:
        return source.write(pool, target, data, batch_size, partial(bar.watch, "cache embeddings"), dtype)
