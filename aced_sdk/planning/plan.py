# SPDX-License-Identifier: Apache-2.0
"""Estimate MACs, memory, disk and time of a run from its config and models."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from aced_sdk.cache import FrozenSource
from aced_sdk.config import DistillConfig
from aced_sdk.data import Pool
from aced_sdk.engine import pick_device, thread_limit
from aced_sdk.errors import ModelError
from aced_sdk.files import printable
from aced_sdk.towers import DualEncoder

_MAX_PIXELS = 64 * 256 * 256  # limit of pixels in the timed batch


@dataclass(frozen=True)
class Plan:
    """The estimated cost of a run. A backward pass counts as two forward passes.

    Attributes:
        pairs: size of the pool.
        trained: examples trained on.
        scored: examples scored by the student for selection.
        macs: MACs of all steps, including scoring.
        cost_over_iid: cost of a step relative to an IID step, with cached frozen embeddings.
        memory: bytes of weights, gradients and AdamW moments per device, without activations.
        disk: bytes of embedding caches, prepared pictures and checkpoints.
        seconds: time of all steps on this machine, extrapolated from a forward pass, without preparation.
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


def estimate(config: DistillConfig, pool: Pool, encoder: DualEncoder, frozen: Sequence[FrozenSource]) -> Plan:
    """Estimate a run without starting it.

    Args:
        config: the run.
        pool: the pairs.
        encoder: the student.
        frozen: the sources of frozen embeddings, without duplicates.

    Raises:
        ConfigError: if a step draws more pairs than the pool has.
        ModelError: if the student cannot embed a batch.
        DataError: if the shards lack stored embeddings that the config reads.
    """
    config.check_pool(len(pool))
    profile = encoder.profile()
    steps, curation = config.schedule.steps, config.curation
    trained = steps * curation.sub_batch
    scored = steps * curation.candidates if curation.needs_student else 0
    passes = _passes(config, encoder, trained=trained, scored=scored)
    height, width = encoder.preprocess_config.size
    per_pair = 3 * height * width + 4 * encoder.context_length if config.data.prepared else 0
    disk = len(pool) * (per_pair + sum(2 * 2 * source.width(pool) for source in frozen))
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
    """Cost of the run in forward passes of one pair at the student's size."""
    curation = config.curation
    cheap, share = 1.0, curation.cheap_fraction
    if curation.scoring_side is not None:
        cheap = encoder.profile(curation.scoring_side).macs / encoder.profile().macs
    batches = 2 if config.objective.needs_iid_batch else 1
    # Micro-batches need one more forward pass, unless scores at full size (of both batches) are reused.
    again = 1 if config.engine.micro_batch is not None and (scored == 0 or share > 0) else 0
    return scored * cheap + batches * trained * (3 + again) * (1 - share + share * cheap)


def _forward_seconds(encoder: DualEncoder, config: DistillConfig) -> float:
    """Seconds per example of a forward pass; the best of three.

    Raises:
        ModelError: if the pass fails, for example for lack of memory.
    """
    size = encoder.preprocess_config.size
    count = max(1, min(64, config.curation.sub_batch, _MAX_PIXELS // math.prod(size)))
    device = pick_device(config.engine, 0)
    best, training = float("inf"), encoder.training
    try:
        encoder = encoder.to(device).eval()  # do not update batch statistics
        images = torch.zeros(count, 3, *size, dtype=torch.uint8, device=device)
        tokens = encoder.tokenize(["a picture"]).repeat(count, 1).to(device)
        with torch.no_grad(), thread_limit(config.engine.threads):
            for _ in range(3):
                started = time.perf_counter()
                float(encoder(images, tokens).image.sum())  # `float` waits for the GPU
                best = min(best, time.perf_counter() - started)
    except (RuntimeError, MemoryError) as error:
        raise ModelError(
            f"the student cannot embed {count} pictures of {size[0]} x {size[1]}: {printable(error, 200)}",
            remedy="use smaller pictures or a smaller student, or a machine with more memory",
            field="student",
        ) from error
    finally:
        encoder.train(training)
    return best / count


def _size(count: int) -> str:
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"
