# SPDX-License-Identifier: Apache-2.0
"""What a language model does inside of LLaVA, tried on a few tokens: it must do the same as by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aced_sdk.errors import UnsupportedError
from vlm.model.loss import attention_mask

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TOLERANCE = 1e-3  # of the largest value


@torch.no_grad()
def check_language(model: Any, lm: PreTrainedModel) -> None:
    """Compare a model with its language model, with packed conversations and with padded questions.

    Raises:
        UnsupportedError: naming what differs.
    """
    if "local" in (getattr(lm.config, "attention_layers", None) or ()):
        raise refused(lm, "attention over a window that it counts by itself")
    ids = torch.arange(4).unsqueeze(0) + 3
    logits = lm(input_ids=ids).logits
    tries: tuple[tuple[Callable[[], bool], str], ...] = (
        (lambda: _same(model, lm, ids, logits), "what it does to its logits"),
        (lambda: _packed(model), "conversations that share their pictures"),
        (lambda: _padded(model), "questions in a batch"),
    )
    for same, what in tries:
        try:
            held = same()
        except Exception as error:  # each kind of model fails in its own way
            raise refused(lm, f"{what} ({type(error).__name__}: {error!s:.200})") from error
        if not held:
            raise refused(lm, what)


def _same(model: Any, lm: PreTrainedModel, ids: Tensor, expected: Tensor) -> bool:
    """Whether the model has the logits of its language model.

    Gemma 2's cap is lost and let pass: it keeps their order, so that greedy answers are the same.
    """
    logits = model(input_ids=ids).logits
    if cap := getattr(lm.config, "final_logit_softcapping", None):
        logits = cap * torch.tanh(logits / cap)
    return _close(logits, expected)


def _packed(model: Any) -> bool:
    """Whether two texts behind one prefix have the hidden states that each has alone, as tuning needs."""
    language = model.model.language_model
    words, prefix, first, second = language.get_input_embeddings(), [3, 4], [5, 6, 3], [6, 4]
    segments = torch.tensor([[0, 0, 1, 1, 1, 2, 2]])
    out = language(
        inputs_embeds=words(torch.tensor([prefix + first + second])),
        attention_mask=attention_mask(segments, torch.zeros_like(segments), words.weight.dtype),
        position_ids=torch.tensor([[0, 1, 2, 3, 4, 2, 3]]),
        use_cache=False,
    ).last_hidden_state
    alone = [
        language(inputs_embeds=words(torch.tensor([prefix + text])), use_cache=False).last_hidden_state
        for text in (first, second)
    ]
    return _close(out, torch.cat([alone[0], alone[1][:, len(prefix) :]], dim=1))


def _padded(model: Any) -> bool:
    """Whether generation gives a question that is padded on the left the logits that it has alone."""
    short, long = [5, 3], [3, 4, 5, 6, 3]
    pad = len(long) - len(short)
    ids = torch.tensor([[0] * pad + short, long])
    mask = torch.tensor([[0] * pad + [1] * len(short), [1] * len(long)])
    options: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    options |= {"max_new_tokens": 2, "min_new_tokens": 2}
    both = model.generate(ids, attention_mask=mask, **options).logits
    alone = model.generate(ids[:1, pad:], attention_mask=mask[:1, pad:], **options).logits
    return all(_close(ours[:1], theirs) for ours, theirs in zip(both, alone, strict=True))


def _close(ours: Tensor, theirs: Tensor) -> bool:
    if not theirs.isfinite().all():  # an infinite tolerance would hold for everything
        return False
    return bool((ours - theirs).abs().max() <= _TOLERANCE * max(1.0, float(theirs.abs().max())))


def refused(lm: PreTrainedModel, what: str) -> UnsupportedError:
    """The error for a language model that LLaVA cannot hold."""
    return UnsupportedError(
        f"the language model is a '{lm.config.model_type}', and LLaVA has no place for {what}",
        remedy="take a Llama-, Qwen-, Gemma-, Mistral- or SmolLM-like model for text alone",
        field="language",
    )
