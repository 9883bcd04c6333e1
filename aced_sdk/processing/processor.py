# SPDX-License-Identifier: Apache-2.0
"""Pictures and texts to tensors, without a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from PIL import Image
from torch import Tensor

from aced_sdk.processing.plain.inputs import MAX_CHARACTERS, check_lengths, text_batches
from aced_sdk.processing.transforms import Preprocess


class Processor:
    """Convert pictures and texts to the inputs of a dual encoder.

    Args:
        preprocess: geometry and normalisation of pictures.
        tokenizer: texts to token ids, int64 [N, context_length]; raises `ModelError` if it fails.
        context_length: tokens of a text.
    """

    def __init__(self, preprocess: Preprocess, tokenizer: Callable[[list[str]], Tensor], context_length: int) -> None:
        self.preprocess_config = preprocess
        self.context_length = context_length
        self._tokenizer = tokenizer
        self._resize = preprocess.resizer()

    def resize(self, image: Image.Image) -> Tensor:
        """A picture at the tower's size, before normalisation: uint8 [3, H, W]."""
        return self._resize(image)

    def tokenize(self, texts: str | Iterable[str]) -> Tensor:
        """Token ids, int64 [N, context_length], padded and cut as the text tower expects.

        Raises:
            InputError: if something is no text, or has more than 10,000 characters.
            ModelError: if the tokenizer fails.
        """
        read = [text for _, batch in text_batches(texts, 1024) for text in batch]
        if not read:
            return torch.empty(0, self.context_length, dtype=torch.int64)
        check_lengths(read, MAX_CHARACTERS)
        return self._tokenizer(read)
