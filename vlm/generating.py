# SPDX-License-Identifier: Apache-2.0
"""Captions and answers, decoded greedily: in batches, or one word after the other."""

from __future__ import annotations

import re
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from threading import Event
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aced_sdk.errors import ConfigError, DataError
from vlm.adapters import base_of
from vlm.chat import IMAGE
from vlm.pictures import Picture, check_fit, check_shapes, fitting, open_picture
from vlm.templates import prompt_text

if TYPE_CHECKING:
    from transformers import BatchFeature, LlavaProcessor

CAPTION_PROMPT = "What is this?"
# The last word and the space before it may still change with the next token; Chinese and Japanese have no spaces.
_UNFINISHED = re.compile(r"\s*[^\s\u3000-\u9fff\uf900-\ufaff]*$")


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
        ConfigError, DataError, ModelError: as `answer`.
    """
    _check_lists(images)
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
        ConfigError: if `max_new_tokens` or `batch_size` is not above 0.
        DataError: if the numbers differ, a picture cannot be read, a question has a picture marker in its words, or it
            is, with its pictures and the answer, longer than the language model reads: it is never cut.
        ModelError: if the processor, or its chat template, is not the model's.
    """
    check_numbers(images, questions)
    check_positive(max_new_tokens=max_new_tokens, batch_size=batch_size)
    base = base_of(model)
    check_fit(base, processor)
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


def check_numbers(images: Sequence[object], questions: Sequence[str]) -> None:
    """Refuse questions that are not as many as pictures, and one picture where several are expected.

    Raises:
        DataError: if they are not.
    """
    _check_lists(images, questions)
    if len(images) != len(questions):
        raise DataError(
            f"there are {len(images)} pictures and {len(questions)} questions",
            remedy="give one question for each picture",
            field="questions",
        )


def _check_lists(*values: object) -> None:
    """Refuse one picture or text where several are expected: letters of a path would be taken for paths.

    Raises:
        DataError: if there is one.
    """
    if any(isinstance(value, Picture) for value in values):
        raise DataError("pictures and questions come as lists", remedy="write [picture], [question]", field="images")


def check_positive(**values: int) -> None:
    """Refuse arguments that are 0 or less.

    Raises:
        ConfigError: naming the first.
    """
    if bad := next((name for name, value in values.items() if value < 1), None):
        raise ConfigError(f"{bad} is {values[bad]}", remedy="give 1 or more", field=bad)


def _prompt(processor: LlavaProcessor, question: str, images: int) -> str:
    if IMAGE in question:
        raise DataError(
            f"the question '{question[:60]}' has an {IMAGE} marker in its words",
            remedy="leave it out: the pictures stand before the question by themselves",
            field="questions",
        )
    content = [{"type": "image"}] * images + [{"type": "text", "text": question}]
    turn = [{"role": "user", "content": content}]
    with fitting():
        prompt = prompt_text(processor, turn)
        if prompt.count(processor.image_token) != images:
            raise ValueError(f"its chat template does not write {images} pictures")
    return prompt


def stream_answer(
    model: Any,
    processor: LlavaProcessor,
    images: Picture | Sequence[Picture],
    question: str,
    max_new_tokens: int = 24,
) -> Generator[str, None, None]:
    """The answer to one question, word by word while it is made; joined, it is what `answer` gives.

    It is made in a thread of its own, which ends with the answer, with an error, or with the `close()` of what is
    returned (which leaving a `for` loop over it comes to).

    Args:
        model: a LLaVA model, with or without adapters; not to be trained meanwhile.
        processor: its processor.
        images: a path, a PIL picture, or a sequence of these.
        question: text.
        max_new_tokens: longest answer, tokens.

    Raises:
        ConfigError, DataError, ModelError: as `answer`; raised at once.
    """
    check_positive(max_new_tokens=max_new_tokens)
    base = base_of(model)
    check_fit(base, processor)
    pictures = (images,) if isinstance(images, Picture) else tuple(images)
    prompts = [_prompt(processor, question, len(pictures))]
    inputs = _inputs(processor, prompts, [pictures])
    _check_room(base, inputs, prompts, max_new_tokens)
    return _stream(base, processor, inputs, max_new_tokens)


class _Stopped(BaseException):
    """Nobody reads the answer any more. It is no error of the model."""


class _Words:
    """What transformers streams tokens into: it hands on the text that can no longer change."""

    def __init__(self, processor: LlavaProcessor) -> None:
        self.pieces: SimpleQueue[str | None] = SimpleQueue()
        self.unwanted = Event()
        self._processor = processor
        self._ids: list[int] | None = None
        self._sent = 0

    def put(self, value: Tensor) -> None:
        if self.unwanted.is_set():
            raise _Stopped
        if self._ids is None:  # the prompt
            self._ids = []
            return
        self._ids += value.tolist()
        # always the whole text: pieces decoded alone lose their first space with some tokenizers
        text = _text(self._processor, self._ids)
        unfinished = _UNFINISHED.search(text)
        self._send(text[: unfinished.start()] if unfinished else text)

    def end(self) -> None:
        self._send(_text(self._processor, self._ids or []))

    def _send(self, text: str) -> None:
        if len(text) > self._sent:
            self.pieces.put(text[self._sent :])
            self._sent = len(text)


def _stream(
    model: Any, processor: LlavaProcessor, inputs: BatchFeature, max_new_tokens: int
) -> Generator[str, None, None]:
    words = _Words(processor)
    was_training = model.training
    model.eval()
    try:
        with ThreadPoolExecutor(max_workers=1) as pool:
            made = pool.submit(_generate, model, inputs, max_new_tokens, words)
            made.add_done_callback(lambda _: words.pieces.put(None))
            try:
                while (piece := words.pieces.get()) is not None:
                    yield piece
                made.result()  # raises what generation raised
            finally:
                words.unwanted.set()
    finally:
        model.train(was_training)


def _decode(
    model: Any, processor: LlavaProcessor, prompts: list[str], pictures: list[tuple[Picture, ...]], max_new_tokens: int
) -> list[str]:
    inputs = _inputs(processor, prompts, pictures)
    _check_room(model, inputs, prompts, max_new_tokens)
    out = _generate(model, inputs, max_new_tokens)
    return [_text(processor, ids) for ids in out[:, inputs["input_ids"].shape[1] :].tolist()]


def _inputs(processor: LlavaProcessor, prompts: list[str], pictures: list[tuple[Picture, ...]]) -> BatchFeature:
    """Token ids [N, L], padded on the left, and pixels [P, 3, H, W]; the same tokens that tuning reads."""
    images = [open_picture(source) for one in pictures for source in one]
    tokenizer = processor.tokenizer
    check_shapes(processor.image_processor, images)
    with fitting():
        # some chat templates write the beginning-of-text token themselves, and a second one would be new to the model
        begins = tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
        written = begins and prompts[0].startswith(tokenizer.bos_token)
        return processor(
            images=images or None,
            text=prompts,
            padding=True,
            padding_side="left",
            add_special_tokens=begins and not written,
            return_tensors="pt",
        )


def _check_room(model: Any, inputs: BatchFeature, prompts: list[str], max_new_tokens: int) -> None:
    """Refuse a question that the language model cannot read and answer within its positions.

    Raises:
        DataError: naming it.
    """
    with fitting():
        lengths, limit = inputs["attention_mask"].sum(1), int(model.config.text_config.max_position_embeddings)
    longest = int(lengths.argmax())
    if lengths[longest] + max_new_tokens > limit:
        words = " ".join(prompts[longest].replace(IMAGE, "").split())
        raise DataError(
            f"a question of {lengths[longest]} tokens with its pictures and {max_new_tokens} new ones do not fit into "
            f"the {limit} that the language model reads: '{words[:80]}'",
            remedy="shorten the question, show fewer pictures, or lower max_new_tokens",
            field="questions",
        )


@torch.inference_mode()
def _generate(model: Any, inputs: BatchFeature, max_new_tokens: int, words: _Words | None = None) -> Tensor:
    """Token ids [N, L], the prompts' first."""
    with fitting():
        ids: Tensor = model.generate(
            **inputs.to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            return_dict_in_generate=False,
            streamer=words,
        )
    return ids


def _text(processor: LlavaProcessor, ids: list[int]) -> str:
    with fitting():
        return str(processor.tokenizer.decode(ids, skip_special_tokens=True)).strip()
