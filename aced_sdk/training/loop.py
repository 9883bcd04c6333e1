# SPDX-License-Identifier: Apache-2.0
"""The loop, from pairs to steps. It knows no method by name: IID, KD, I-ACID, H-ACID, ACED are values of a config."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path

import torch

from aced_sdk.config import DistillConfig, Independent, Joint
from aced_sdk.curation import COLLAPSE_REMEDY, Embeddings, doubts_of, score_quantiles, select, select_random
from aced_sdk.data import SuperBatch
from aced_sdk.engine import factor
from aced_sdk.engine.events import CheckpointSaved, Selected, StepDone, StepSkipped, Warned
from aced_sdk.errors import EngineError
from aced_sdk.training.parts import Parts
from aced_sdk.training.progress import Progress, keep, restore
from aced_sdk.training.scoring import score, scoring_size
from aced_sdk.training.step import Learned, can_accumulate, is_quiet, learn

_KEYS = 8  # names of pairs told with a skipped step


def train(config: DistillConfig, parts: Parts, resume_from: Path | None = None) -> Progress:
    """Take all steps that are left.

    Raises:
        ConfigError: if the student cannot be trained in micro-batches, and the config asks for them.
        EngineError: if losses stay non-finite, every step was skipped, or a checkpoint cannot be written or read.
    """
    engine, device, curation = parts.engine, parts.engine.device, config.curation
    can_accumulate(config, engine.module)
    done = Progress() if resume_from is None else restore(resume_from, parts)
    batches = parts.batches(done.position)
    scores_serve = config.engine.micro_batch is not None and curation.needs_student and scoring_size(curation) is None
    quiet: bool | None = None
    bad_in_a_row = 0
    try:
        while done.step < config.schedule.steps:
            started = time.perf_counter()
            super_batch, position = next(batches)
            waited = time.perf_counter() - started

            student = score(super_batch, parts.student, config, device) if curation.needs_student else None
            reference = parts.reference.rows(super_batch.rows, device) if parts.reference else None
            picked = select(curation, student, reference, parts.generator).cpu()
            drawn = picked
            if config.objective.needs_iid_batch:
                drawn = torch.cat([picked, select_random(len(picked), len(super_batch), parts.generator)])
            batch = super_batch[drawn]
            teachers = [teacher.rows(batch.rows, device) for teacher in parts.teachers]

            if quiet is None and scores_serve:
                quiet = is_quiet(engine, batch)
            known = student[drawn.to(device)] if student is not None and quiet else None
            learned = learn(config, engine, parts.objective, batch, teachers, known)
            rate = config.optimizer.learning_rate * factor(config.schedule, done.step)
            norm = engine.step(rate) if math.isfinite(learned.loss) else math.nan

            scored = done.scored + (len(super_batch) if student is not None else 0)
            done = replace(done, step=done.step + 1, position=position, scored=scored)
            if not math.isfinite(norm):
                bad_in_a_row += 1
                _skip(config, parts, done.step, batch, learned, bad_in_a_row)
            else:
                bad_in_a_row = 0
                distilled = done.distilled + len(drawn) - len(picked)
                done = replace(done, trained=done.trained + len(picked), distilled=distilled)
                parts.statistics.update(super_batch.rows[picked])
                if done.trained == len(picked) and (doubt := doubts_of(curation, student, reference)):
                    parts.emit(Warned(done.step, *doubt))
                if len(super_batch) > len(picked):
                    parts.emit(_selected(config, parts, done.step, super_batch, picked, student, reference))
                parts.emit(
                    StepDone(
                        step=done.step,
                        loss=learned.loss,
                        parts=learned.parts,
                        learning_rate=rate,
                        gradient_norm=norm,
                        trained=done.trained,
                        scored=done.scored,
                        seconds=time.perf_counter() - started,
                        data_seconds=waited,
                        scale=float(learned.student.scale),
                        bias=float(learned.student.bias),
                        distilled=done.distilled,
                    )
                )
                done = _warn_of_collapse(config, parts, done)
            regular = bad_in_a_row == 0 and done.step % config.engine.checkpoint_every == 0
            if regular or done.step == config.schedule.steps:
                parts.emit(CheckpointSaved(done.step, str(keep(config, parts, done))))
    finally:
        batches.close()
    if not done.trained:
        raise EngineError(
            f"nothing was trained: all of the {done.step} steps were skipped for a loss or gradient that is not finite",
            remedy="check the teachers' embeddings and the data, or lower optimizer.learning_rate",
        )
    return done


def _selected(
    config: DistillConfig,
    parts: Parts,
    step: int,
    super_batch: SuperBatch,
    picked: torch.Tensor,
    student: Embeddings | None,
    reference: Embeddings | None,
) -> Selected:
    rows, summary = super_batch.rows[picked], parts.statistics.summary()
    statistics = {
        "unique_coverage": summary.unique_coverage,
        "top_decile_share": summary.top_decile_share,
        "effective_pool_size": summary.effective_pool_size,
    }
    if parts.bad is not None:
        statistics["bad_share_selected"] = float(parts.bad[rows].float().mean())
        statistics["bad_share_candidates"] = float(parts.bad[super_batch.rows].float().mean())
    scores = score_quantiles(config.curation, student, reference, picked)
    return Selected(step, tuple(rows.tolist()), tuple(super_batch.rows.tolist()), statistics, scores)


def _warn_of_collapse(config: DistillConfig, parts: Parts, done: Progress) -> Progress:
    if done.collapsed or not isinstance(config.curation, Joint | Independent):
        return done
    cause = parts.statistics.collapsed(config.curation.collapse_level)
    if cause is None:
        return done
    parts.emit(Warned(done.step, cause, COLLAPSE_REMEDY))
    return replace(done, collapsed=True)


def _skip(config: DistillConfig, parts: Parts, step: int, batch: SuperBatch, learned: Learned, in_a_row: int) -> None:
    """Log a skipped step and its pairs: those with non-finite embeddings, or any of them."""
    what = "gradient" if math.isfinite(learned.loss) else "loss"
    whole = (torch.isfinite(learned.student.image) & torch.isfinite(learned.student.text)).all(dim=1).cpu()
    suspects = batch.rows if whole.all() else batch.rows[~whole]
    keys = tuple(parts.keys(suspects[:_KEYS]))
    parts.emit(StepSkipped(step, f"the {what} was not finite", in_a_row, keys))
    if in_a_row > config.engine.max_bad_steps:
        more = f" and {len(suspects) - 3} more" if len(suspects) > 3 else ""
        raise EngineError(
            f"the {what} was not finite in {in_a_row} steps in a row, up to step {step}, "
            f"whose pairs are {', '.join(keys[:3])}{more}",
            remedy="look at these pairs, lower optimizer.learning_rate, or resume from the last checkpoint with "
            "engine.precision fp32",
            field="optimizer.learning_rate",
        )
