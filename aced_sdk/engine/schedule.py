# SPDX-License-Identifier: Apache-2.0
"""Learning-rate schedules."""

from __future__ import annotations

import math

from aced_sdk.config import Schedule


def factor(schedule: Schedule, step: int) -> float:
    """Return the factor on the peak learning rate in step `step` (0 is the first).

    The warm-up rises linearly to 1. Then `cosine` decays to 0, `rsqrt` decays as 1/sqrt(step), and `constant` is 1.
    `rsqrt` and `constant` decay linearly to 0 in the cool-down (arXiv 2106.04560, section 3.5).
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
