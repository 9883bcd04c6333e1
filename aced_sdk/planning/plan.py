# SPDX-License-Identifier: Apache-2.0
"""MACs, memory, disk and time of a run, from its config and the shapes of its models."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from aced_sdk.cache import stored_width
from aced_sdk.config import DistillConfig, Frozen, Independent, Joint, Stored
from aced_sdk.data import Pool
from aced_sdk.engine import pick_device, thread_limit
from aced_sdk.errors import ModelError
from aced_sdk.evaluation import expand_names, open_task
from aced_sdk.files import printable
from aced_sdk.towers import DualEncoder, build, check_size, load

_MAX_PIXELS = 64 * 256 * 256  # of the pictures that are embedded for an estimate


@dataclass(frozen=True)
class Plan:
    """A run before it starts. One backward pass counts as two forward passes.

    Attributes:
        pairs: size of the pool.
        trained: examples that steps will train on.
        scored: examples that the student will score for selection.
        macs: of all steps together, scoring included.
        cost_over_iid: cost of a step as a multiple of a step without curation, frozen embeddings cached.
        memory: bytes of weights, gradients and AdamW moments on one device; activations come on top.
        disk: bytes of embedding caches, prepared pictures and checkpoints.
        seconds: of all steps on this machine, extrapolated from a timed forward pass; preparation comes on top.
    """

    pairs: int
    trained: int
    scored: int
    macs: int
    cost_over_iid: float
    memory: int
    disk: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.pairs:,} pairs; {self.trained:,} examples trained, {self.scored:,} scored; "
            f"{self.macs / 1e12:.3g} TMACs, {self.cost_over_iid:.2f} x an IID step; "
            f"{_size(self.memory)} of weights and optimizer per device; "
            f"{_size(self.disk)} on disk; about {self.seconds / 60:.1f} min of steps on this machine"
        )


def plan(config: DistillConfig) -> Plan:
    """Estimate a run without starting it.

    Raises:
        ConfigError: if a step draws more pairs than the pool has.
        ModelError: if the student's architecture or a frozen model cannot be used.
        DataError: if the shards cannot be read.
        EvaluationError: if an evaluation task is missing or lacks a file.
    """
    pool = Pool(config.data.shards, caption_lines=config.data.caption_lines)
    config.check_pool(len(pool))
    if (root := config.evaluation.data_root) is not None:
        for name in expand_names(config.evaluation.tasks):
            open_task(name, root)
    encoder = build(config.student, config.seed)
    profile = encoder.profile()
    steps, curation = config.schedule.steps, config.curation
    trained = steps * curation.sub_batch
    scored = steps * curation.candidates if curation.needs_student else 0
    passes = _passes(config, encoder, trained=trained, scored=scored)
    # One cache for each model and for each reading of stored embeddings, wherever it lies.
    caches = {frozen.replace(cache=None) for frozen in _frozen(config)}
    widths = [stored_width(f, pool) if isinstance(f, Stored) else load(f.model).embedding_dim for f in caches]
    height, width = encoder.preprocess_config.size
    per_pair = 3 * height * width + 4 * encoder.context_length if config.data.prepared else 0
    disk = len(pool) * (per_pair + sum(2 * 2 * dim for dim in widths))
    return Plan(
        pairs=len(pool),
        trained=trained,
        scored=scored,
        macs=round(profile.macs * passes),
        cost_over_iid=passes / (3 * trained),
        memory=16 * profile.parameters,
        disk=disk + config.engine.keep_checkpoints * 12 * profile.parameters,
        seconds=_forward_seconds(encoder, config) * passes,
    )


def _passes(config: DistillConfig, encoder: DualEncoder, *, trained: int, scored: int) -> float:
    """Forward passes of one pair at the student's own size that the run costs, a backward pass counted as two."""
    curation = config.curation
    cheap, share = 1.0, 0.0
    if isinstance(curation, Joint | Independent) and curation.scoring_size is not None:
        check_size(encoder, curation.scoring_size, field="curation.scoring_size")
        cheap = encoder.profile(curation.scoring_size).macs / encoder.profile().macs
        share = curation.scoring_share
    batches = 2 if config.objective.needs_iid_batch else 1
    # Micro-batches embed once more, unless the scores at full size serve as that pass; a second batch was scored too.
    again = 1 if config.engine.micro_batch is not None and (scored == 0 or share > 0) else 0
    return scored * cheap + batches * trained * (3 + again) * (1 - share + share * cheap)


def _frozen(config: DistillConfig) -> list[Frozen | Stored]:
    named = [config.reference if config.curation.needs_reference else None, *config.teachers]
    return [frozen for frozen in named if frozen is not None]


def _forward_seconds(encoder: DualEncoder, config: DistillConfig) -> float:
    """Seconds of one example's forward pass in a batch; the best of three.

    Raises:
        ModelError: if the pass fails, for want of memory.
    """
    size = encoder.preprocess_config.size
    count = max(1, min(64, config.curation.sub_batch, _MAX_PIXELS // math.prod(size)))
    device = pick_device(config.engine, 0)
    best = float("inf")
    try:
        encoder = encoder.to(device)
        images = torch.zeros(count, 3, *size, dtype=torch.uint8, device=device)
        tokens = encoder.tokenize(["a picture"]).repeat(count, 1).to(device)
        with torch.no_grad(), thread_limit(config.engine.threads):
            for _ in range(3):
                started = time.perf_counter()
                float(encoder(images, tokens).image.sum())  # a GPU answers before it is done; its number waits
                best = min(best, time.perf_counter() - started)
    except (RuntimeError, MemoryError) as error:
        raise ModelError(
            f"the student cannot embed {count} pictures of {size[0]} x {size[1]}: {printable(error, 200)}",
            remedy="use smaller pictures or a smaller student, or a machine with more memory",
            field="student",
        ) from error
    return best / count


def _size(count: int) -> str:
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"
