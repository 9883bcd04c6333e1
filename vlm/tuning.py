# SPDX-License-Identifier: Apache-2.0
"""Tuning: align the projector, then adapt the language model. The vision tower is frozen throughout."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aced_sdk.config import Optimizer, Schedule
from aced_sdk.engine import (
    Callback,
    Event,
    Launch,
    Learned,
    Ranks,
    Snapshot,
    Step,
    StopSignal,
    TrainingEngine,
    build_engine,
    load_checkpoint,
    newest_intact,
    pick_device,
    read_launch,
    stop_signals,
    take_steps,
    thread_limit,
)
from aced_sdk.engine.events import CheckpointSaved, StepDone, StepSkipped
from aced_sdk.errors import EngineError, UnsupportedError
from aced_sdk.reporting import JsonlWriter, Progress
from aced_sdk.reporting.progress import say
from vlm.binding import binding, claim
from vlm.config import Adapt, Align, TuneConfig
from vlm.data.pictures import Features, check_fit
from vlm.data.rows import Batch, Batches, Row, Rows, collate, make_rows, shares
from vlm.data.samples import Sample
from vlm.data.skips import Skips
from vlm.model.adapters import base_of, check_adapters, check_saved, has_adapter, prepare, shown, snapshot, table
from vlm.model.language import reads
from vlm.model.loss import AnswerLoss
from vlm.model.writing import check_adapter_savable, check_savable

if TYPE_CHECKING:
    from transformers import LlavaProcessor, PreTrainedModel


@dataclass(frozen=True)
class StageStarted(Event):
    """A stage is about to take its first step, anew or after a resume.

    Attributes:
        stage: its number, 0 is the first.
        kind: `align` or `adapt`.
        parameters: per part of the model, how many are trained and how many frozen.
        rows: rows of the data.
        done: steps of this stage that an earlier run took.
    """

    stage: int
    kind: str
    parameters: dict[str, dict[str, int]]
    rows: int
    done: int


@dataclass(frozen=True)
class TuneResult:
    """What tuning made.

    Attributes:
        model: the tuned model; a PeftModel after an Adapt stage. The model that was given is changed in place too.
        directory: checkpoints and events.
        parameters: per stage, per part of the model, how many parameters were trained and how many frozen.
        losses: per stage, the loss of every step taken in this call, per answer token.
        samples: conversations trained on in this call.
        tokens: tokens read in this call, padding not counted.
        seconds: wall time of this call.
        skipped: one message for each conversation that was left out.
    """

    model: Any
    directory: Path
    parameters: tuple[dict[str, dict[str, int]], ...]
    losses: tuple[tuple[float, ...], ...]
    samples: int
    tokens: int
    seconds: float
    skipped: tuple[str, ...] = ()


@dataclass
class _Run:
    """What the stages of one call have in common."""

    config: TuneConfig
    directory: Path
    rows: Rows
    features: Features
    pad: int
    ranks: Ranks
    log: JsonlWriter | None
    callbacks: list[Callback] = field(default_factory=list)
    step: int = 0
    samples: int = 0
    tokens: int = 0
    parameters: list[dict[str, dict[str, int]]] = field(default_factory=list)
    losses: list[tuple[float, ...]] = field(default_factory=list)

    def emit(self, event: Event) -> None:
        """Pass an event to all callbacks, on rank 0."""

        def call() -> None:
            for callback in self.callbacks:
                callback(event)

        self.ranks.in_first(call)


def tune(
    model: PreTrainedModel,
    processor: LlavaProcessor,
    data: Sequence[Sample],
    config: TuneConfig,
    *,
    directory: str | Path,
    callbacks: Sequence[Callback] = (),
) -> TuneResult:
    """Train the stages one after the other. Called again with the same arguments, continue where it stopped.

    The loss is the mean over the assistant's words of a whole batch, however it is cut into micro-batches and shared
    out between ranks. In a launch of several ranks, all call this with the same arguments. Only rank 0 writes, reports
    and calls `callbacks`. A failure on one rank ends all, and so does a rank that does not answer for
    `config.engine.timeout_seconds`.

    Args:
        model: what `build` or `load` gave; changed in place.
        processor: its processor.
        data: conversations. Up to `config.max_unusable_fraction` are left out if too long or without a target.
        config: stages and engine.
        directory: checkpoints, `events.jsonl` and `tune.json`.
        callbacks: receive every event.

    Raises:
        ConfigError: if the directory holds a run of another config or other data.
        DataError: if too many conversations are too long or teach nothing, or a picture cannot be read.
        ModelError: if the model or the processor cannot be saved; nothing is trained then.
        EngineError: if losses stay non-finite, what was saved is not what was trained, or another rank fails.
        Interrupted: after SIGTERM or SIGUSR1; a checkpoint is written before.
        UnsupportedError: for several processes or ZeRO without DeepSpeed, QLoRA at stage 3, and a model with adapters.
    """
    launch = read_launch()
    _check_engine(config, launch)
    ranks = Ranks(launch, pick_device(config.engine, launch.local_rank), config.engine.timeout_seconds)
    with ranks.guarded():
        ranks.agree_on_versions()
        return _tune(ranks, model, processor, data, config, Path(directory), callbacks)


def _tune(
    ranks: Ranks,
    model: PreTrainedModel,
    processor: LlavaProcessor,
    data: Sequence[Sample],
    config: TuneConfig,
    folder: Path,
    callbacks: Sequence[Callback],
) -> TuneResult:
    base = base_of(model)
    if has_adapter(base):
        raise UnsupportedError(
            "the model has adapters already",
            remedy="save it with vlm.save(..., merge=True) and tune what vlm.load gives",
            field="model",
        )
    check_fit(base, processor)
    started = time.perf_counter()
    limit = reads(base.config.text_config)
    skips = Skips()
    rows, pictures = make_rows(
        data, processor, base.config.image_seq_length, config.conversations_per_row, limit, skips
    )
    skips.check(len(data), config.max_unusable_fraction)
    for stage in config.stages:
        if isinstance(stage, Adapt) and stage.lora:
            check_adapters(base, stage.lora)
    mine = binding(config, rows, base)
    ranks.agree(
        config.flat() | {name: str(mine[name]) for name in ("data", "tower")},
        "call vlm.tune with the same arguments on every rank",
    )
    ranks.in_first(lambda: check_savable(base, processor))
    ranks.in_first(lambda: claim(folder, mine))
    features = Features(base, processor, pictures, config.feature_cache_mb)
    total = sum(stage.steps for stage in config.stages)
    tuned: Any = base
    with (
        JsonlWriter(folder / "events.jsonl") if ranks.rank == 0 else nullcontext() as log,
        Progress("tune", total) as bar,
        thread_limit(config.engine.threads),
        torch.random.fork_rng(),
        stop_signals() as stop,
    ):
        if skips.messages and ranks.rank == 0:
            say(f"tune: {len(skips.messages)} of {len(data)} conversations are left out: {skips}")
        run = _Run(config, folder, rows, features, int(processor.tokenizer.pad_token_id), ranks, log)
        run.callbacks += [*callbacks, *([log] if log else [])]
        run.callbacks.append(lambda event: bar.advance(loss=event.loss) if isinstance(event, StepDone) else None)
        for number, stage in enumerate(config.stages):
            tuned = prepare(base, stage, config.seed)
            if tuned is not base:
                ranks.in_first(partial(check_adapter_savable, tuned))
            run.losses.append(tuple(_train_stage(run, number, stage, base, stop)))
    base.requires_grad_(False).eval()
    return TuneResult(
        tuned,
        folder,
        tuple(run.parameters),
        tuple(run.losses),
        run.samples,
        run.tokens,
        time.perf_counter() - started,
        tuple(skips.messages),
    )


def _check_engine(config: TuneConfig, launch: Launch) -> None:
    """Refuse what the plain engine cannot do, and 4-bit weights at stage 3."""
    four_bits = any(isinstance(stage, Adapt) and stage.lora and stage.lora.qlora for stage in config.stages)
    if config.engine.zero_stage == 3 and four_bits:
        raise UnsupportedError(
            "QLoRA does not run under ZeRO stage 3, which cannot share out 4-bit weights",
            remedy="set engine.zero_stage to 2, or leave out qlora=True",
            field="engine.zero_stage",
        )
    if config.engine.kind == "single" and launch.world_size > 1:
        raise UnsupportedError(
            f"the plain engine is for one process, and {launch.world_size} were launched",
            remedy="set engine.kind to 'deepspeed'",
            field="engine.kind",
        )
    if config.engine.kind == "single" and config.engine.zero_stage > 0:
        raise UnsupportedError(
            f"the plain engine has no ZeRO stage {config.engine.zero_stage}",
            remedy="set engine.kind to 'deepspeed'",
            field="engine.kind",
        )


def _train_stage(run: _Run, number: int, stage: Align | Adapt, model: PreTrainedModel, stop: StopSignal) -> list[float]:
    """Take the steps of one stage that are left; returns their losses."""
    config = run.config
    optimizer = Optimizer(learning_rate=stage.learning_rate, weight_decay=stage.weight_decay, clip_norm=stage.clip_norm)
    schedule = Schedule(steps=stage.steps, warmup=stage.warmup, cooldown=0)
    model.train()
    model.model.vision_tower.eval()
    module = AnswerLoss(model)
    start = snapshot(module)
    run.parameters.append(table(model))
    engine = build_engine(module, config.engine, optimizer)
    model.model.vision_tower.to(engine.device)
    folder = run.directory / f"stage-{number}-{stage.stage}"
    done = _restore(folder, engine)
    run.step += done
    if run.ranks.rank == 0:
        say(f"tune: stage {number}, {stage.stage}, {stage.steps - done} steps\n{shown(run.parameters[-1])}")
    if run.log is not None and done < stage.steps:
        run.log.truncate_after(run.step)  # events after the checkpoint are logged again
    run.emit(StageStarted(run.step, number, stage.stage, run.parameters[-1], len(run.rows), done))
    tuning = _Tuning(run, number, stage, engine, folder, start, run.step - done, trained=done > 0)
    take_steps(tuning, engine, schedule, stage.learning_rate, config.engine, done, stop)
    run.step = tuning.before + stage.steps
    engine.release()
    return tuning.losses


class _Tuning:
    """The steps of one stage, for `take_steps`."""

    def __init__(
        self,
        run: _Run,
        number: int,
        stage: Align | Adapt,
        engine: TrainingEngine,
        folder: Path,
        start: Mapping[str, str],
        before: int,
        trained: bool,
    ) -> None:
        self.run = run
        self.number = number
        self.stage = stage
        self.engine = engine
        self.folder = folder
        self.start = start
        self.before = before  # steps of earlier stages
        self.trained = trained  # whether a step of this stage was taken, in an earlier call too
        self.losses: list[float] = []
        self.batches = Batches(run.rows, stage.batch_size, f"{run.config.seed} {number}")

    def learn(self, number: int) -> Learned:
        self.chosen = self.batches.at(number - 1)
        torch.manual_seed(_dropout_seed(self.run.config.seed, self.number, number - 1, self.run.ranks.rank))
        return Learned(_accumulate(self.run, self.engine, self.chosen, self.stage.micro_batch))

    def taken(self, step: Step) -> None:
        run, name = self.run, self.stage.stage
        run.samples += sum(row.samples for row in self.chosen)
        run.tokens += sum(len(row.ids) for row in self.chosen)
        self.losses.append(step.loss)
        self.trained = True
        run.emit(
            StepDone(
                step=self.before + step.number,
                loss=step.loss,
                parts={name: step.loss},
                learning_rate=step.learning_rate,
                gradient_norm=step.gradient_norm,
                trained=run.samples,
                seconds=step.seconds,
                data_seconds=0.0,
            )
        )

    def skipped(self, step: Step, in_a_row: int) -> None:
        reason = f"the gradient norm is {step.gradient_norm}, the loss {step.loss}"
        self.run.emit(StepSkipped(self.before + step.number, reason, in_a_row))
        if step.number == self.stage.steps and not self.trained:
            raise self._untrained(step)

    def snapshot(self) -> Snapshot:
        return Snapshot(self.folder, {"stage": self.number}, check=partial(check_saved, start=self.start))

    def saved(self, number: int, folder: Path) -> None:
        self.run.emit(CheckpointSaved(self.before + number, str(folder)))

    def _untrained(self, step: Step) -> EngineError:
        return EngineError(
            f"nothing was trained: all {step.number} steps of stage {self.number} so far were skipped because of a "
            "non-finite loss or gradient",
            remedy="check the pictures and the model's weights, or use engine.precision='fp32'",
            field=f"stages.{self.number}",
        )

    def diverged(self, step: Step, in_a_row: int) -> EngineError:
        if not self.trained:
            return self._untrained(step)
        return EngineError(
            f"{in_a_row} steps in a row were not finite, the last is number {step.number} of stage {self.number}",
            remedy="lower the learning rate, or use engine.precision='fp32'",
            field=f"stages.{self.number}.learning_rate",
        )


def _restore(folder: Path, engine: TrainingEngine) -> int:
    """Steps that the newest intact checkpoint of a stage has done; 0 without one."""
    found = engine.ranks.together(lambda: newest_intact(folder))
    if found is None:
        return 0
    state, _ = load_checkpoint(found, engine)
    return int(state["step"])


def _dropout_seed(seed: int, stage: int, step: int, rank: int) -> int:
    """Dropout as a function of step and process alone, so that a resumed run needs no generator state of any device."""
    return random.Random(f"{seed} {stage} {step}" + (f" {rank}" if rank else "")).getrandbits(63)


def _accumulate(run: _Run, engine: TrainingEngine, chosen: Sequence[Row], micro: int | None) -> float:
    """Forward and backward over this process's rows of one step; returns the mean loss over all answer tokens."""
    ranks = run.ranks
    tokens = sum(row.trained_tokens for row in chosen)
    parts = shares(chosen, micro, ranks.rank, ranks.world_size)
    total = 0.0
    for number, rows in enumerate(parts, start=1):
        inputs = ranks.together(partial(_inputs, collate(rows, run.pad), run.features, engine.device))
        summed: Tensor = engine.forward(*inputs)
        engine.backward(summed * (ranks.world_size / tokens), last=number == len(parts))  # engines take the mean
        total += float(summed.detach())
    return ranks.sum(total) / tokens


def _inputs(batch: Batch, features: Features, device: torch.device) -> tuple[Tensor, ...]:
    tensors = (features.of(batch.pictures), batch.ids, batch.targets, batch.positions, batch.segments, batch.owners)
    return tuple(tensor.to(device) for tensor in tensors)
