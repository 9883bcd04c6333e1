# SPDX-License-Identifier: Apache-2.0
"""What a forward pass costs, counted from the operators that run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Profile:
    """Cost of one picture and one text. MACs are multiply-accumulates of matrix products and convolutions."""

    image_macs: int
    text_macs: int
    parameters: int

    @property
    def macs(self) -> int:
        """MACs of one pair: one picture and one text."""
        return self.image_macs + self.text_macs


def profile_model(model: nn.Module, image: Callable[[], object], text: Callable[[], object]) -> Profile:
    """Count one call of each tower, `image` and `text`, both on a single example and in evaluation mode."""
    image_macs, text_macs = _macs(image), _macs(text)
    return Profile(
        image_macs=image_macs,
        text_macs=text_macs,
        parameters=sum(p.numel() for p in model.parameters()),
    )


def _macs(forward: Callable[[], object]) -> int:
    # With gradients enabled attention takes its written-out path, whose products the counter knows; the fused
    # inference kernel would count as nothing.
    counter = FlopCounterMode(display=False)
    with torch.enable_grad(), counter:
        forward()
    return int(counter.get_total_flops() // 2)
