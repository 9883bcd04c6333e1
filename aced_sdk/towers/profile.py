# SPDX-License-Identifier: Apache-2.0
"""What a forward pass costs, counted from the operators that run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Profile:
    """Cost of one picture and one text. MACs are multiply-accumulates of matrix products and convolutions."""

    image_macs: int
    text_macs: int
    parameters: int
    image_parameters: int

    @property
    def macs(self) -> int:
        """MACs of one pair: one picture and one text."""
        return self.image_macs + self.text_macs


def profile_model(model: nn.Module, size: tuple[int, int], tokens: Tensor) -> Profile:
    """Count a forward pass of each tower at batch 1 on the model's own device."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    pixels = torch.zeros(1, 3, *size, device=device)
    image = _macs(lambda: model.encode_image(pixels))  # type: ignore[operator]
    text = _macs(lambda: model.encode_text(tokens[:1].to(device)))  # type: ignore[operator]
    model.train(was_training)
    visual: Any = model.visual
    return Profile(
        image_macs=image,
        text_macs=text,
        parameters=sum(p.numel() for p in model.parameters()),
        image_parameters=sum(p.numel() for p in visual.parameters()),
    )


def _macs(forward: object) -> int:
    # With gradients enabled attention takes its written-out path, whose products the counter knows; the fused
    # inference kernel would count as nothing.
    counter = FlopCounterMode(display=False)
    with torch.enable_grad(), counter:
        forward()  # type: ignore[operator]
    return int(counter.get_total_flops() // 2)
