# SPDX-License-Identifier: Apache-2.0
"""Embeddings of N pairs by one dual encoder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Embeddings:
    """Embeddings of N pairs by one dual encoder, with that encoder's own temperature.

    Attributes:
        image: [N, D], L2-normalised rows.
        text: [N, D], L2-normalised rows; row i belongs to image i.
        scale: the factor on cosine similarities (not its logarithm); a 0-dim tensor while it is being learned.
        bias: added to scale * cosine in the sigmoid form; 0 for a softmax-trained model.
        trained_with: loss that the encoder was trained with; None: sigmoid if it has a bias, else softmax.
    """

    image: torch.Tensor
    text: torch.Tensor
    scale: float | torch.Tensor
    bias: float | torch.Tensor = 0.0
    trained_with: Literal["sigmoid", "softmax"] | None = None

    def __len__(self) -> int:
        return int(self.image.shape[0])

    def __getitem__(self, rows: torch.Tensor) -> Embeddings:
        """The same encoder's embeddings of the pairs `rows` (int64 [K])."""
        return replace(self, image=self.image[rows], text=self.text[rows])
