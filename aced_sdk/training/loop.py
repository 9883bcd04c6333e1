# SPDX-License-Identifier: Apache-2.0
"""The loop, from pairs to steps. It knows no method by name: IID, KD, I-ACID, H-ACID, ACED are values of a config."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aced_sdk.cache import EmbeddingCache
from aced_sdk.config import DistillConfig
from aced_sdk.curation import DrawStatistics, select
from aced_sdk.data import SuperBatch, SuperBatches
from aced_sdk.engine import Callback, Engine, factor, load_checkpoint, save_checkpoint
from aced_sdk.engine.events import CheckpointSaved, Event, Selected, StepDone, StepSkipped
from aced_sdk.errors import EngineError
from aced_sdk.objectives import Objective
from aced_sdk.towers import DualEncoder, Embeddings


class Trainee(nn.Module):
    """The student as engines hold it: tensors in, tensors out."""

    def __init__(self, encoder: DualEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        out = self.encoder(images, tokens)
        return out.image, out.text, torch.as_tensor(out.scale), torch.as_tensor(out.bias)


@dataclass
class Progress:
    """How far a run is: totals since step 0."""

    step: int = 0
    position: int = 0
    trained: int = 0
    scored: int = 0


@dataclass
class Parts:
    """What the loop joins.

    Attributes:
        engine: holds a `Trainee`.
        batches: opens the stream of super-batches at a position.
        reference: embeddings to select by in each step, where the curation reads them.
        teachers: embeddings to distil from, in the numbering of the objective's terms.
        objective: embeddings of a sub-batch to its loss.
        statistics: draw counts of the pool.
        bad: per row of the pool whether its caption is known to be wrong; None where nobody knows.
        generator: noise of the selection.
        callbacks: hear every event.
    """

    engine: Engine
    batches: Callable[[int], SuperBatches]
    reference: EmbeddingCache | None
    teachers: tuple[EmbeddingCache, ...]
    objective: Objective
    statistics: DrawStatistics
    bad: Tensor | None
    generator: torch.Generator
    callbacks: list[Callback] = field(default_factory=list)

    def emit(self, event: Event) -> None:
        """Tell everyone who listens."""
        for callback in self.callbacks:
            callback(event)


def train(config: DistillConfig, parts: Parts, resume_from: Path | None = None) -> Progress:
    """Take all steps that are left.

    Raises:
        EngineError: if losses stay non-finite, or a checkpoint cannot be written or read.
    """
    engine, device = parts.engine, parts.engine.device
    done = Progress() if resume_from is None else _restore(resume_from, parts)
    batches = parts.batches(done.position)
    bad_in_a_row = 0
    try:
        while done.step < config.schedule.steps:
            started = time.perf_counter()
            super_batch, position = next(batches)
            waited = time.perf_counter() - started

            student = _score(super_batch, parts, config) if config.curation.needs_student else None
            reference = parts.reference.rows(super_batch.rows, device) if parts.reference else None
            picked = select(config.curation, student, reference, parts.generator).cpu()
            batch = super_batch[picked]
            teachers = [teacher.rows(batch.rows, device) for teacher in parts.teachers]

            image, text, scale, bias = engine.forward(batch.images.to(device), batch.tokens.to(device))
            terms = parts.objective(Embeddings(image, text, scale, bias), teachers[0] if teachers else None)
            rate = config.optimizer.learning_rate * factor(config.schedule, done.step)
            loss, norm = float(terms.total.detach()), math.nan
            if math.isfinite(loss):
                engine.backward(terms.total)
                norm = engine.step(rate)

            scored = done.scored + (len(super_batch) if student is not None else 0)
            done = replace(done, step=done.step + 1, position=position, scored=scored)
            if not math.isfinite(norm):
                bad_in_a_row += 1
                _skip(config, parts, done.step, loss, bad_in_a_row)
            else:
                bad_in_a_row = 0
                done = replace(done, trained=done.trained + len(batch))
                parts.statistics.update(batch.rows)
                if len(super_batch) > len(batch):
                    parts.emit(_selected(done.step, batch, super_batch, parts))
                parts.emit(
                    StepDone(
                        step=done.step,
                        loss=loss,
                        parts={name: float(value) for name, value in terms.parts.items()},
                        learning_rate=rate,
                        gradient_norm=norm,
                        trained=done.trained,
                        scored=done.scored,
                        seconds=time.perf_counter() - started,
                        data_seconds=waited,
                        scale=float(scale.detach()),
                        bias=float(bias.detach()),
                    )
                )
            regular = bad_in_a_row == 0 and done.step % config.engine.checkpoint_every == 0
            if regular or done.step == config.schedule.steps:
                parts.emit(_keep(config, parts, done))
    finally:
        batches.close()
    return done


@torch.no_grad()
def _score(batch: SuperBatch, parts: Parts, config: DistillConfig) -> Embeddings:
    """The student's embeddings of a super-batch, without gradient, in chunks."""
    engine, size = parts.engine, config.engine.scoring_batch
    engine.module.eval()
    outputs = [
        engine.forward(batch.images[i : i + size].to(engine.device), batch.tokens[i : i + size].to(engine.device))
        for i in range(0, len(batch), size)
    ]
    engine.module.train()
    _, _, scale, bias = outputs[0]
    return Embeddings(torch.cat([o[0] for o in outputs]), torch.cat([o[1] for o in outputs]), float(scale), float(bias))


def _selected(step: int, batch: SuperBatch, super_batch: SuperBatch, parts: Parts) -> Selected:
    summary = parts.statistics.summary()
    statistics = {
        "unique_coverage": summary.unique_coverage,
        "top_decile_share": summary.top_decile_share,
        "effective_pool_size": summary.effective_pool_size,
    }
    if parts.bad is not None:
        statistics["bad_share_selected"] = float(parts.bad[batch.rows].float().mean())
        statistics["bad_share_candidates"] = float(parts.bad[super_batch.rows].float().mean())
    return Selected(step, tuple(batch.rows.tolist()), tuple(super_batch.rows.tolist()), statistics)


def _skip(config: DistillConfig, parts: Parts, step: int, loss: float, in_a_row: int) -> None:
    what = "gradient" if math.isfinite(loss) else "loss"
    parts.emit(StepSkipped(step, f"the {what} was not finite", in_a_row))
    if in_a_row > config.engine.max_bad_steps:
        raise EngineError(
            f"the {what} was not finite in {in_a_row} steps in a row, up to step {step}",
            remedy="lower optimizer.learning_rate, or resume from the last checkpoint with engine.precision fp32",
            field="optimizer.learning_rate",
        )


def _keep(config: DistillConfig, parts: Parts, done: Progress) -> CheckpointSaved:
    state: dict[str, Any] = {"position": done.position, "trained": done.trained, "scored": done.scored}
    tensors = {"generator": parts.generator.get_state(), **parts.statistics.state_dict(), **_dropout(parts.engine)}
    target = save_checkpoint(config.directory, done.step, parts.engine, state, tensors, config.engine.keep_checkpoints)
    return CheckpointSaved(done.step, str(target))


def _dropout(engine: Engine) -> dict[str, Tensor]:
    """States of torch's own generators, which dropout in a tower draws from."""
    states = {"torch": torch.get_rng_state()}
    if engine.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(engine.device)
    return states


def _restore(folder: Path, parts: Parts) -> Progress:
    state, tensors = load_checkpoint(folder, parts.engine)
    parts.generator.set_state(tensors.pop("generator"))
    torch.set_rng_state(tensors.pop("torch"))
    cuda = tensors.pop("cuda", None)
    if cuda is not None and parts.engine.device.type == "cuda":
        torch.cuda.set_rng_state(cuda, parts.engine.device)
    parts.statistics.load_state_dict(tensors)
    return Progress(state["step"], state["position"], state["trained"], state["scored"])
