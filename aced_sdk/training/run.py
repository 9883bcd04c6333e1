# SPDX-License-Identifier: Apache-2.0
"""From a config to a trained, saved student."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aced_sdk.cache import (
    EmbeddingCache,
    default_directory,
    open_cache,
    stored_fingerprint,
    write_cache,
    write_stored,
)
from aced_sdk.config import DistillConfig, Frozen, Independent, Joint, StaticFilter, Stored
from aced_sdk.curation import DrawStatistics, static_filter
from aced_sdk.data import Decoding, Pool, Source, SuperBatches, prepare
from aced_sdk.data.source import Rows
from aced_sdk.engine import Callback, build_engine, pick_device, read_launch, step_of, thread_limit
from aced_sdk.engine.events import RunEnded, RunStarted, Warned
from aced_sdk.errors import CacheError, ConfigError, DataError, EngineError, UnsupportedError
from aced_sdk.files import one_line, printable
from aced_sdk.objectives import build_objective
from aced_sdk.towers import DualEncoder, build, check_size, load, names_weights, save
from aced_sdk.training.loop import train
from aced_sdk.training.parts import Parts, Trainee
from aced_sdk.training.progress import check_pool
from aced_sdk.training.step import can_accumulate

CONFIG = "config.yaml"
STUDENT = "student"
_SKIPPED = "look at the shards; data.max_bad_fraction bounds how many may be left out"
_LINES = "if each line is a caption of its own, set data.caption_lines to 'first'"
Watch = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        directory: config, events, checkpoints and the student's folder.
        student: the trained encoder; it can be named wherever a folder can (`aced.load(run.student)`).
        step: steps taken.
        metrics: trained, scored and distilled examples (the last those of a second batch), and the last held-out
            figures, task to metric to value.
    """

    directory: Path
    student: DualEncoder = field(repr=False)
    step: int
    metrics: dict[str, Any] = field(default_factory=dict)


def start(
    config: DistillConfig,
    listen: Callable[[DualEncoder], Sequence[Callback]] = lambda _: (),
    resume_from: Path | None = None,
    watch: Watch | None = None,
    facts: dict[str, Any] | None = None,
) -> Run:
    """Train from the beginning or from a checkpoint, and save `directory/student`.

    Args:
        config: the run.
        listen: from the student to the callbacks that hear every event; a callback may look at the student.
        resume_from: a checkpoint folder of this run.
        watch: hears of preparations (what, done, total).
        facts: told with `RunStarted`.
    """
    if read_launch().world_size > 1:
        raise UnsupportedError(
            "this version distils in one process, and several were launched",
            remedy="launch one process; exact curation across ranks is not there yet",
            field="engine",
        )
    if config.engine.kind == "deepspeed" and config.engine.zero_stage == 3:
        raise UnsupportedError(
            "ZeRO stage 3 cannot hold a dual encoder: DeepSpeed does not partition its 0-dim scale and bias",
            remedy="take stage 2; a dual encoder that is distilled is small",
            field="engine.zero_stage",
        )
    with thread_limit(config.engine.threads):
        return _start(config, listen, resume_from, watch or (lambda *_: None), facts or {})


def _start(
    config: DistillConfig,
    listen: Callable[[DualEncoder], Sequence[Callback]],
    resume_from: Path | None,
    watch: Watch,
    facts: dict[str, Any],
) -> Run:
    started = time.perf_counter()
    torch.manual_seed(config.seed)
    pool = Pool(config.data.shards, caption_lines=config.data.caption_lines)
    if resume_from is not None:
        check_pool(resume_from, pool.fingerprint)
    encoder = build(config.student, config.seed)
    # Mistakes of a config are raised before hours of caching.
    objective = build_objective(config.objective)
    can_accumulate(config, encoder)
    if isinstance(config.curation, Joint | Independent) and config.curation.scoring_size is not None:
        check_size(encoder, config.curation.scoring_size, field="curation.scoring_size")
    callbacks = list(listen(encoder))
    reference = frozen_embeddings(config.reference, pool, config, watch) if config.curation.needs_reference else None
    teachers = tuple(
        reference
        if reference is not None and teacher == config.reference
        else frozen_embeddings(teacher, pool, config, watch)
        for teacher in config.teachers
    )

    source: Source
    if config.data.prepared is not None:
        source = prepare(
            pool, encoder, config.data, config.data.prepared, lambda n, of: watch("resize pictures", n, of)
        )
    else:
        source = Decoding(pool, encoder, config.data)
    rows = _usable(config, pool, source, [cache for cache in (reference, *teachers) if cache is not None])
    usable = len(rows)
    rows = _drawable(config, rows, reference)
    bad = known_bad(pool)
    generator = torch.Generator().manual_seed(config.seed + 1)
    parts = Parts(
        engine=build_engine(Trainee(encoder), config.engine, config.optimizer),
        student=encoder,
        batches=lambda position: SuperBatches(source, config.curation.candidates, config.seed, position, rows),
        reference=None if isinstance(config.curation, StaticFilter) else reference,  # it has filtered the rows already
        teachers=teachers,
        objective=objective,
        statistics=DrawStatistics(len(pool)),
        pool=pool.fingerprint,
        bad=None if bad is None else torch.from_numpy(bad),
        keys=lambda rows: [one_line(pool.samples[int(row)].key) for row in rows],
        generator=generator,
        callbacks=callbacks,
    )
    encoder.train()
    facts = facts | {
        "pairs": len(rows),
        "student": "trained weights" if names_weights(config.student.architecture) else "new weights",
        "macs": encoder.profile().macs,
        "parameters": sum(p.numel() for p in encoder.parameters()),
    }
    parts.emit(RunStarted(step_of(resume_from) if resume_from else 0, config.schedule.steps, config.hash(), facts))
    if usable < len(pool) and resume_from is None:
        parts.emit(Warned(0, f"{len(pool) - usable} of {len(pool)} pairs are unusable and left out", _SKIPPED))
    if config.unused is not None:
        cause = f"the {config.unused} is not used by curation '{config.curation.method}' and this objective"
        parts.emit(Warned(0, cause, f"set {config.unused} to null, or choose a curation or objective that reads it"))
    several, read = pool.many_lines() if config.data.caption_lines == "join" else (0, 1)
    if several > read / 2:
        parts.emit(Warned(0, f"{several} of {read} captions have several lines and are read as one text", _LINES))
    done = train(config, parts, resume_from)
    if isinstance(source, Decoding) and source.bad:
        reasons = ", ".join(f"{count} {reason}" for reason, count in source.bad.most_common())
        cause = f"{source.bad.total()} of {source.seen} pairs were skipped as they were read: {reasons}"
        parts.emit(Warned(done.step, cause, _SKIPPED))
    encoder.eval()
    counts = {"trained": done.trained, "scored": done.scored, "distilled": done.distilled}
    encoder.trained_with = config.objective.trained_with
    _check_finite(encoder)
    save(encoder, config.directory / STUDENT, facts=student_facts(config, counts))
    parts.emit(RunEnded(done.step, time.perf_counter() - started, done.trained, done.scored))
    return Run(config.directory, encoder, done.step, dict(counts))


def _check_finite(encoder: DualEncoder) -> None:
    wrong = [name for name, tensor in encoder.model.named_parameters() if not tensor.isfinite().all()]
    if wrong:
        raise EngineError(
            f"the trained student has values that are not finite in {len(wrong)} weights, {printable(wrong[0])} first",
            remedy="lower optimizer.learning_rate and weight_decay, and resume from an older checkpoint or start again",
        )


def student_facts(config: DistillConfig, counts: dict[str, int]) -> dict[str, Any]:
    """What a student's manifest says of its making."""
    return {
        "config": config.hash(),
        "curation": config.curation.method,
        "seed": config.seed,
        **counts,
        "versions": {name: version(name) for name in ("torch", "open_clip_torch", "aced-sdk")},
    }


def frozen_embeddings(
    frozen: Frozen | Stored | None, pool: Pool, config: DistillConfig, watch: Watch
) -> EmbeddingCache:
    """The cached embeddings of a frozen model, or of those in the shards, made where they are missing."""
    if frozen is None:
        raise ConfigError("a frozen model is needed, and none is named", remedy="set reference", field="reference")
    write: Callable[..., EmbeddingCache]
    if isinstance(frozen, Stored):
        fingerprint, write = stored_fingerprint(frozen), partial(write_stored, frozen)
    else:
        encoder = load(frozen.model).to(pick_device(config.engine, 0))
        fingerprint, write = encoder.fingerprint(), partial(write_cache, encoder)
    directory = frozen.cache or default_directory(fingerprint, pool)
    try:
        return open_cache(directory, fingerprint, pool)
    except CacheError:
        # Absent or incomplete: write what is missing. A cache of something else is refused again.
        return write(pool, directory, config.data, progress=lambda n, of: watch("cache embeddings", n, of))


def known_bad(pool: Pool) -> np.ndarray[Any, np.dtype[np.bool_]] | None:
    """bool [N]: whose KEY.json says `"noisy": true`; None where no sample says anything."""
    marks = pool.marks("noisy")
    if all(mark is None for mark in marks):
        return None
    return np.array([mark is True for mark in marks])


def _usable(config: DistillConfig, pool: Pool, source: Source, caches: list[EmbeddingCache]) -> Rows:
    """Rows that are usable in the source and in every cache."""
    rows, total = source.usable(), len(pool)
    for cache in caches:
        rows = rows[cache.usable.numpy()[rows]]
    if total - len(rows) > config.data.max_bad_fraction * total:
        raise DataError(
            f"{total - len(rows)} of {total} pairs are unusable",
            remedy="repair the shards, or raise the bound if that is expected",
            field="data.max_bad_fraction",
        )
    return rows


def _drawable(config: DistillConfig, rows: Rows, reference: EmbeddingCache | None) -> Rows:
    """Rows that may be drawn: for a static filter only the top share."""
    if isinstance(config.curation, StaticFilter) and reference is not None:
        embeddings = reference.rows(torch.from_numpy(rows), torch.device("cpu"))
        kept = static_filter(embeddings, config.curation.share, config.curation.loss)
        rows = rows[np.sort(kept.cpu().numpy())]
    config.check_pool(len(rows))
    return rows
