# SPDX-License-Identifier: Apache-2.0
"""The loss over the assistant's words, with the vocabulary's logits computed at those places alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vlm.data.rows import IGNORED

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration


class AnswerLoss(nn.Module):
    """A LLaVA model as engines hold it during tuning: tensors in, the summed loss out.

    The vision tower is no part of it: its features come from outside. Each process runs the tower on pictures of its
    own, so an engine must not share it out between processes, whose exchanges would wait for one another.

    Args:
        model: its projector, language model and head are held, under the names that they have in it.
    """

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        super().__init__()
        self.image_token = model.config.image_token_id
        self.model: Any = nn.Module()
        self.model.model = nn.Module()
        self.model.model.multi_modal_projector = model.model.multi_modal_projector
        self.model.model.language_model = model.model.language_model
        self.model.lm_head = model.lm_head
        part: Any
        for part in self.modules():  # ZeRO stage 3 needs every parameter in every backward: no layer is left out
            if hasattr(part, "layerdrop"):
                part.layerdrop = 0.0

    def forward(
        self, features: Tensor, ids: Tensor, targets: Tensor, positions: Tensor, segments: Tensor, owners: Tensor
    ) -> Tensor:
        """The cross-entropy summed over all places that have a target; a scalar in float32.

        Args:
            features: [P, N, D], the tower's, picture by picture in the order of their tokens.
            ids: int64 [R, L].
            targets: int64 [R, L].
            positions: int64 [R, L].
            segments: int64 [R, L].
            owners: int64 [R, L].
        """
        parts = self.model.model
        words = parts.language_model.get_input_embeddings()(ids)
        projected = parts.multi_modal_projector(features).flatten(0, 1).to(words.dtype)
        words = words.masked_scatter((ids == self.image_token).unsqueeze(-1), projected)
        out = parts.language_model(
            inputs_embeds=words,
            attention_mask=attention_mask(segments, owners, words.dtype),
            position_ids=positions,
            use_cache=False,
        )
        wanted = targets != IGNORED
        logits = self.model.lm_head(out.last_hidden_state[wanted])
        return functional.cross_entropy(logits.float(), targets[wanted], reduction="sum")


def attention_mask(segments: Tensor, owners: Tensor, dtype: torch.dtype) -> Tensor:
    """What each place may see, as a term on the attention logits [R, 1, L, L].

    A place sees what comes before it in its own continuation, and its own row's prefix.
    """
    length = segments.shape[1]
    before = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    mine = segments.unsqueeze(2) == segments.unsqueeze(1)
    prefix = (segments == 0).unsqueeze(1)
    seen = before & (owners.unsqueeze(2) == owners.unsqueeze(1)) & (mine | prefix)
    return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min).unsqueeze(1)
