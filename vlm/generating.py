# SPDX-License-Identifier: Apache-2.0
"""Captions and answers, decoded greedily in batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from aced_sdk.errors import DataError
from vlm.adapters import base_of
from vlm.pictures import Picture, open_picture

if TYPE_CHECKING:
    from transformers import LlavaProcessor

CAPTION_PROMPT = "What is this?"


def caption(
    model: Any,
    processor: LlavaProcessor,
    images: Sequence[Picture],
    prompt: str = CAPTION_PROMPT,
    max_new_tokens: int = 24,
    batch_size: int = 32,
) -> list[str]:
    """One caption for each picture.

    Args:
        model: a LLaVA model, with or without adapters.
        processor: its processor.
        images: paths or PIL pictures.
        prompt: what the model is asked; captions are best for the prompt it was tuned with.
        max_new_tokens: longest caption, tokens.
        batch_size: pictures decoded together.

    Raises:
        DataError: if a picture cannot be read.
    """
    return answer(model, processor, images, [prompt] * len(images), max_new_tokens, batch_size)


def answer(
    model: Any,
    processor: LlavaProcessor,
    images: Sequence[Picture | Sequence[Picture]],
    questions: Sequence[str],
    max_new_tokens: int = 24,
    batch_size: int = 32,
) -> list[str]:
    """One answer for each picture (or several pictures) and its question.

    Args:
        model: a LLaVA model, with or without adapters.
        processor: its processor.
        images: as many as questions; a path, a PIL picture, or a sequence of these.
        questions: texts.
        max_new_tokens: longest answer, tokens.
        batch_size: questions decoded together.

    Raises:
        DataError: if the numbers differ, or a picture cannot be read.
    """
    if len(images) != len(questions):
        raise DataError(
            f"there are {len(images)} pictures and {len(questions)} questions",
            remedy="give one question for each picture",
            field="questions",
        )
    base = base_of(model)
    sets: list[tuple[Picture, ...]] = [(one,) if isinstance(one, Picture) else tuple(one) for one in images]
    prompts = [_prompt(processor, question, len(pictures)) for question, pictures in zip(questions, sets, strict=True)]
    order = sorted(
        range(len(prompts)), key=lambda number: (len(sets[number]), len(prompts[number]))
    )  # like lengths pad little
    answers = [""] * len(prompts)
    was_training = base.training
    base.eval()
    try:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            texts = _decode(base, processor, [prompts[n] for n in chosen], [sets[n] for n in chosen], max_new_tokens)
            for number, text in zip(chosen, texts, strict=True):
                answers[number] = text
    finally:
        base.train(was_training)
    return answers


def _prompt(processor: LlavaProcessor, question: str, images: int) -> str:
    content = [{"type": "image"}] * images + [{"type": "text", "text": question}]
    return str(
        processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
    )


@torch.inference_mode()
def _decode(
    model: Any, processor: LlavaProcessor, prompts: list[str], pictures: list[tuple[Picture, ...]], max_new_tokens: int
) -> list[str]:
    images = [open_picture(source) for one in pictures for source in one]
    inputs = processor(images=images or None, text=prompts, padding=True, padding_side="left", return_tensors="pt").to(
        model.device
    )
    out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    texts = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]
