# SPDX-License-Identifier: Apache-2.0
"""Learning rate over a run."""

from __future__ import annotations

import math

from aced_sdk.config import Schedule


def factor(schedule: Schedule, step: int) -> float:
    """The factor on the peak learning rate in step `step` (0 is the first).

    Warm-up rises linearly to 1. `cosine` falls to 0 over the rest. `rsqrt` falls as 1/sqrt(step) from the end of the
    warm-up and `constant` stays; both fall linearly to 0 in the cool-down (arXiv 2106.04560, section 3.5).
    """
    total = schedule.steps
    warmup = round(schedule.warmup * total)
    if step < warmup:
        return (step + 1) / warmup
    if schedule.shape == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
    cooldown = round(schedule.cooldown * total)
    fall = min(1.0, (total - step) / cooldown) if cooldown else 1.0
    if schedule.shape == "constant":
        return fall
    return fall * math.sqrt(max(1, warmup) / max(1, warmup, step))
