# SPDX-License-Identifier: Apache-2.0
"""Open the inputs of a run, assemble the loop, train, and save the student."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aced_sdk.cache import FrozenSource, open_or_write
from aced_sdk.config import DistillConfig
from aced_sdk.curation import DrawStatistics, Selector
from aced_sdk.data import Decoding, Order, Pool, RowSet, Source, SuperBatches, build_order, prepare
from aced_sdk.data.order import Listed
from aced_sdk.data.rowset import Rows
from aced_sdk.engine import build_engine, pick_device, step_of
from aced_sdk.engine.events import Warned
from aced_sdk.errors import DataError, EngineError, UnsupportedError
from aced_sdk.files import printable
from aced_sdk.objectives import WeightedLosses
from aced_sdk.towers import DualEncoder, build, check_size, names_weights, save
from aced_sdk.training.components import build_losses, build_selector, build_sources
from aced_sdk.training.events import RunEnded, RunStarted
from aced_sdk.training.filtering import best_rows, usable_rows
from aced_sdk.training.loop import train
from aced_sdk.training.parts import Parts, Trainee
from aced_sdk.training.progress import check_pool
from aced_sdk.training.step import can_accumulate

CONFIG = "config.yaml"
STUDENT = "student"
_SKIPPED = "check the shards; data.max_unusable_fraction limits the unusable pairs"
_MOST_LISTED = 2**24  # rows; their list takes 64 MB
_LINES = "if each line is a separate caption, set data.caption_lines to 'first'"
Watch = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        directory: folder of config, events, checkpoints and student.
        student: the trained encoder. It can be passed wherever a folder can (`aced.load(run.student)`).
        step: steps taken.
        metrics: `trained`, `scored` and `distilled` examples, and the last held-out metrics as `evaluation`, task to
            metric to value.
    """

    directory: Path
    student: DualEncoder = field(repr=False)
    step: int
    metrics: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Inputs:
    """The inputs of a run, opened and checked before anything is computed.

    Attributes:
        pool: the pairs.
        student: the encoder to train.
        reference: source of the reference's embeddings; None if curation does not use them.
        teachers: sources of the teachers' embeddings, by index.
        selector: selects sub-batches.
        objective: computes the loss of a sub-batch.
    """

    pool: Pool
    student: DualEncoder
    reference: FrozenSource | None
    teachers: tuple[FrozenSource, ...]
    selector: Selector
    objective: WeightedLosses

    @property
    def frozen(self) -> list[FrozenSource]:
        """The sources of different embeddings."""
        named = (self.reference, *self.teachers)
        return list({source.fingerprint: source for source in named if source is not None}.values())


def open_inputs(
    config: DistillConfig, resume_from: Path | None = None, progress: Callable[[int, int], None] | None = None
) -> Inputs:
    """Open the pool, load all models and check the config, before embeddings are cached.

    Args:
        config: the run.
        resume_from: a checkpoint folder of this run.
        progress: called with the number of shards indexed, and of those to index.

    Raises:
        UnsupportedError: for ZeRO stage 3.
        ConfigError: if the config does not match the student or the pool, or names a component that cannot be used.
        DataError: if the shards cannot be read, or have changed since the checkpoint.
        ModelError: if a model cannot be loaded.
    """
    if config.engine.kind == "deepspeed" and config.engine.zero_stage == 3:
        raise UnsupportedError(
            "ZeRO stage 3 cannot hold a dual encoder: DeepSpeed does not partition its 0-dim scale and bias",
            remedy="use stage 2; distilled dual encoders are small",
            field="engine.zero_stage",
        )
    pool = Pool(config.data.shards, caption_lines=config.data.caption_lines, progress=progress)
    config.check_pool(len(pool))
    open_order(config, pool)  # checks lanes and weights
    if resume_from is not None:
        check_pool(resume_from, pool.fingerprint)
    student = build(config.student, config.seed)
    can_accumulate(config, student)
    if config.curation.scoring_side is not None:
        check_size(student, config.curation.scoring_side, field="curation.scoring_size")
    selector = build_selector(config.curation)
    reference, teachers = build_sources(config)
    objective = build_losses(config, student, teachers, pool)
    return Inputs(pool, student, reference, teachers, selector, objective)


def assemble(config: DistillConfig, inputs: Inputs, watch: Watch) -> Parts:
    """Build the components of the loop: cached embeddings, source of pairs and engine.

    Args:
        config: the run.
        inputs: from `open_inputs`.
        watch: called with the progress of preparations (what, done, total).

    Raises:
        CacheError: if a cache cannot be written, or belongs to another model or pool.
        DataError: if too many pairs are unusable.
        ConfigError: if a step draws more pairs than are usable.
    """
    pool, student, data = inputs.pool, inputs.student, config.data
    device, progress = pick_device(config.engine, 0), partial(watch, "cache embeddings")
    caches = {
        frozen: open_or_write(frozen, pool, data, device, progress)
        for frozen in dict.fromkeys((inputs.reference, *inputs.teachers))
        if frozen is not None
    }
    reference = None if inputs.reference is None else caches[inputs.reference]
    source: Source
    if data.prepared is not None:
        source = prepare(pool, student.processor, data, data.prepared, partial(watch, "resize pictures"))
    else:
        source = Decoding(pool, student.processor, data)
    rows = usable = usable_rows(len(pool), source, list(caches.values()))
    _check_usable(config, usable)
    selector = inputs.selector
    if selector.keep_fraction < 1 and reference is not None:
        rows = best_rows(usable, reference, selector)
    config.check_pool(len(rows))
    order, allowed = _order_of(config, pool, rows)
    return Parts(
        engine=build_engine(Trainee(student), config.engine, config.optimizer),
        student=student,
        order=order,
        batches=lambda state: SuperBatches(source, order, config.curation.candidates, state, allowed),
        selector=selector,
        reference=reference if config.curation.needs_reference and not config.curation.filters_pool else None,
        teachers=tuple(caches[teacher] for teacher in inputs.teachers),
        objective=inputs.objective,
        statistics=DrawStatistics(len(pool)),
        pool=pool,
        source=source,
        rows=rows,
        usable=len(usable),
        generator=torch.Generator().manual_seed(config.seed + 1),
    )


def train_and_save(
    config: DistillConfig, parts: Parts, resume_from: Path | None = None, facts: dict[str, Any] | None = None
) -> Run:
    """Train from step 0 or from a checkpoint, and save the student to `directory/student`.

    Args:
        config: the run.
        parts: from `assemble`.
        resume_from: a checkpoint folder of this run.
        facts: logged with `RunStarted`.

    Raises:
        EngineError: as `train`, or if the trained student has non-finite weights.
        ModelError: if the student cannot be saved.
    """
    started = time.perf_counter()
    torch.manual_seed(config.seed)
    student = parts.student
    student.train()
    first = step_of(resume_from) if resume_from else 0
    parts.emit(RunStarted(first, config.schedule.steps, config.hash(), (facts or {}) | _facts(config, parts)))
    for cause, remedy in _warnings(config, parts, resumed=resume_from is not None):
        parts.emit(Warned(0, cause, remedy))
    done = train(config, parts, resume_from)
    skipped = parts.source.skipped
    if skipped:
        reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.most_common())
        cause = f"{skipped.total()} of {parts.source.seen} pairs were skipped while reading: {reasons}"
        parts.emit(Warned(done.step, cause, _SKIPPED))
    student.eval()
    counts = {"trained": done.trained, "scored": done.scored, "distilled": done.distilled}
    student.trained_with = config.objective.trained_with
    _check_finite(student)
    save(student, config.directory / STUDENT, facts=student_facts(config, counts))
    parts.emit(RunEnded(done.step, time.perf_counter() - started, done.trained, done.scored))
    return Run(config.directory, student, done.step, dict(counts))


def _facts(config: DistillConfig, parts: Parts) -> dict[str, Any]:
    return {
        "pairs": len(parts.rows),
        "student": "trained weights" if names_weights(config.student.architecture) else "new weights",
        "macs": parts.student.profile().macs,
        "parameters": sum(p.numel() for p in parts.student.parameters()),
    }


def _warnings(config: DistillConfig, parts: Parts, resumed: bool) -> Iterator[tuple[str, str]]:
    """Cause and remedy of each warning at the start of a run."""
    pairs = len(parts.pool)
    if parts.usable < pairs and not resumed:
        yield f"{pairs - parts.usable} of {pairs} pairs are unusable and left out", _SKIPPED
    if (unused := config.unused) is not None:
        cause = f"the {unused} is not used by curation '{config.curation.method}' and this objective"
        yield cause, f"set {unused} to null, or choose a curation or objective that reads it"
    several, read = parts.pool.many_lines() if config.data.caption_lines == "join" else (0, 1)
    if several > read / 2:
        yield f"{several} of {read} captions have several lines and are read as one text", _LINES


def _check_finite(encoder: DualEncoder) -> None:
    wrong = [name for name, tensor in encoder.model.named_parameters() if not tensor.isfinite().all()]
    if wrong:
        raise EngineError(
            f"the trained student has non-finite values in {len(wrong)} weights, {printable(wrong[0])} first",
            remedy="lower optimizer.learning_rate and weight_decay, and resume from an older checkpoint or start again",
        )


def student_facts(config: DistillConfig, counts: dict[str, int]) -> dict[str, Any]:
    """Facts about the training for the manifest of the student."""
    return {
        "config": config.hash(),
        "curation": config.curation.method,
        "seed": config.seed,
        **counts,
        "versions": {name: version(name) for name in ("torch", "open_clip_torch", "aced-sdk")},
    }


def open_order(config: DistillConfig, pool: Pool, ends: Rows | None = None) -> Order:
    """The order of a run.

    Args:
        config: the run.
        pool: the pairs.
        ends: int64 [shards], the row after the last one of each shard; default: those of the pool.

    Raises:
        ConfigError: if its lanes fit neither the batches nor the shards.
    """
    bounds = [0, *(pool.shard_ends if ends is None else ends).tolist()]
    shard_rows = [range(start, end) for start, end in pairwise(bounds)]
    return build_order(config.data, shard_rows, pool.sources, config.curation.candidates, config.seed)


def _order_of(config: DistillConfig, pool: Pool, rows: RowSet) -> tuple[Order, RowSet]:
    """The order of the rows that may be drawn, and the rows that the stream does not skip.

    Up to `_MOST_LISTED` rows are listed, so that each is read once per epoch. If there are more, others are skipped in
    the order of the whole pool, and lanes reach the end of an epoch at different times.
    """
    if len(rows) == rows.pairs or len(rows) > _MOST_LISTED:
        return open_order(config, pool), rows
    listed = rows.listed()
    ends = np.searchsorted(listed, pool.shard_ends)
    return Listed(open_order(config, pool, ends), listed), RowSet(len(pool))


def _check_usable(config: DistillConfig, usable: RowSet) -> None:
    missing = usable.pairs - len(usable)
    if missing > config.data.max_unusable_fraction * usable.pairs:
        raise DataError(
            f"{missing} of {usable.pairs} pairs are unusable",
            remedy="repair the shards, or raise the limit if this is expected",
            field="data.max_unusable_fraction",
        )
