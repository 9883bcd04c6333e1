# SPDX-License-Identifier: Apache-2.0
"""Texts cut to the longest of their batch, wherever what is cut off cannot reach the embedding.

Context lengths are made for the longest caption (77 tokens), and most captions have a dozen. A causal tower that pools
at the end-of-text token never looks behind it, and a Hugging Face tower masks its padding: there the cut is exact, and
spares most of the text tower's work in training and scoring. Other towers (SigLIP's) read every place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_STEP = 8  # lengths are rounded up to a multiple, so that kernels and allocators see few different shapes


def lengths(model: nn.Module, tokens: Tensor) -> Tensor:
    """How many places of each text can reach its embedding.

    Args:
        model: an open_clip model.
        tokens: int64 [N, L].

    Returns:
        int64 [N], 1 to L.
    """
    from open_clip.hf_model import HFTextEncoder

    tower = _tower(model)
    if isinstance(tower, HFTextEncoder):
        config: Any = tower.config
        if config.pad_token_id is None:
            return torch.full((len(tokens),), tokens.shape[1], device=tokens.device)
        # Only a tail of padding is masked and may go. It can also be in front of the text, or inside it.
        places = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
        return (tokens.ne(config.pad_token_id) * places).amax(dim=1).clamp(min=1)
    if _mask(model) is None:
        return torch.full((len(tokens),), tokens.shape[1], device=tokens.device)
    if _pool(tower) == "argmax":
        return tokens.argmax(dim=1) + 1
    end: Any = tower.text_eos_id if tower is model else tower.eos_id
    return tokens.eq(end).int().argmax(dim=1) + 1  # where there is none, open_clip pools at the first place


def cut(model: nn.Module, tokens: Tensor, length: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Texts of at most `length` places (rounded up), and the tower's tables cut to that length.

    Args:
        model: an open_clip model.
        tokens: int64 [N, L].
        length: no less than the largest of `lengths`.

    Returns:
        int64 [N, L'], and {name inside `model`: tensor} for `replaced`, with gradient to the parameters.
    """
    length = min(tokens.shape[1], -(-length // _STEP) * _STEP)
    if length == tokens.shape[1]:
        return tokens, {}
    stand_ins = {}
    if (mask := _mask(model)) is not None:
        tower = _tower(model)
        prefix = "" if tower is model else "text."
        stand_ins[f"{prefix}attn_mask"] = mask[:length, :length]
        stand_ins[f"{prefix}positional_embedding"] = tower.positional_embedding[:length]
    return tokens[:, :length], stand_ins


def _mask(model: nn.Module) -> Tensor | None:
    """The causal mask [L, L] of open_clip's own tower, if it pools at the end of the text; None for all others."""
    from open_clip.transformer import TextTransformer

    tower = _tower(model)
    own = tower is model or (isinstance(tower, TextTransformer) and tower.cls_emb is None)
    mask: Any = tower.attn_mask if own else None
    return mask if own and _pool(tower) in ("argmax", "eos") else None


def _tower(model: nn.Module) -> Any:
    """Where the text tower's tables lie: in a module of its own, or in the model itself."""
    return getattr(model, "text", model)


def _pool(tower: Any) -> str:
    return str(getattr(tower, "text_pool_type", None) or tower.pool_type)
