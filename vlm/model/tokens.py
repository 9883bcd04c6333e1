# SPDX-License-Identifier: Apache-2.0
"""Tokenizers as vision-language models need them, and the token that stands for pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from aced_sdk.errors import ModelError
from vlm.data.chat import IMAGE

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_MAX_NEW_ROWS = 4096  # of embeddings, between those of the language model and the image token's
# What an earlier call or another machine left in a tokenizer's settings.
_LEFT_BEHIND = (
    "is_local",
    "local_files_only",
    "max_length",
    "pad_to_multiple_of",
    "stride",
    "truncation_side",
    "truncation_strategy",
)


def settle(tokenizer: PreTrainedTokenizerBase, end: str | None = None) -> None:
    """Set what answers need where a folder keeps it: batches are padded on the left, nothing is put behind a text.

    A saved tokenizer then gives the same tokens in plain transformers as here, alone and in batches.

    Args:
        tokenizer: changed in place.
        end: the token that pads if the tokenizer has none for it; None: the one that ends a text.

    Raises:
        ModelError: if the tokenizer puts tokens behind a text and cannot be kept from it.
    """
    held: Any = tokenizer
    if held.pad_token is None:
        held.pad_token = end or held.eos_token
    held.padding_side = held.init_kwargs["padding_side"] = "left"
    held.model_input_names = ["input_ids", "attention_mask"]
    for name in _LEFT_BEHIND:
        held.init_kwargs.pop(name, None)
    backend = getattr(held, "backend_tokenizer", None)
    if backend is not None:  # of the tokenizers library
        backend.no_padding()
        backend.no_truncation()
    words = held("a", add_special_tokens=False)["input_ids"]
    found, begin = held("a")["input_ids"], [held.bos_token_id]
    if found in (words, begin + words):
        return
    if backend is None:
        raise ModelError(
            "the tokenizer puts tokens behind a text, which would end a question before its answer",
            remedy="take a tokenizer of the tokenizers library, or set add_eos_token to false in tokenizer_config.json",
            field="language",
        )
    from tokenizers.processors import TemplateProcessing

    begins = found[:1] == begin
    backend.post_processor = TemplateProcessing(
        single=f"{held.bos_token} $A" if begins else "$A",
        pair=f"{held.bos_token} $A $B:1" if begins else "$A $B:1",
        special_tokens=[(held.bos_token, held.bos_token_id)] if begins else [],
    )


def add_image_token(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Make `<image>` one token, which no prediction prefers.

    Its row in the head is the mean of the others, so that its logit is the mean of theirs, which is never the largest.

    Raises:
        ModelError: if the tokenizer cannot hold such a token, or numbers it far beyond the language model's tokens.
    """
    tokenizer.add_tokens([IMAGE], special_tokens=True)
    index = tokenizer.convert_tokens_to_ids(IMAGE)
    if (
        index is None
        or index == tokenizer.unk_token_id
        or tokenizer.encode(f"a{IMAGE}b", add_special_tokens=False).count(index) != 1
    ):
        raise ModelError(
            f"the tokenizer has no free token for pictures: '{IMAGE}' does not become one token of its own",
            remedy=f"add '{IMAGE}' to its vocabulary as a special token, or take a tokenizer of the tokenizers library",
            field="language",
        )
    rows = lm.get_input_embeddings().weight.shape[0]
    last = max(tokenizer.get_vocab().values())
    if last > rows + _MAX_NEW_ROWS:
        raise ModelError(
            f"the tokenizer has tokens up to number {last}, and the language model has embeddings of {rows} tokens",
            remedy="take the tokenizer that belongs to the language model",
            field="language",
        )
    new = sorted({int(index), *range(rows, last + 1)})
    if last >= rows:
        lm.resize_token_embeddings(last + 1, mean_resizing=False)
    with torch.no_grad():
        for table in (lm.get_input_embeddings(), lm.get_output_embeddings()):
            old = [number for number in new if number < rows]
            mean = (table.weight[:rows].sum(0) - table.weight[old].sum(0)) / (rows - len(old))
            table.weight[new] = mean
    return int(index)
