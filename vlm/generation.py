# SPDX-License-Identifier: Apache-2.0
"""Captions and answers, decoded greedily: in batches, or one word after the other."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Event
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aced_sdk.errors import ConfigError, DataError, ModelError
from aced_sdk.files import one_line
from vlm.data.chat import CAPTION_PROMPT, IMAGE
from vlm.data.conversation import check_words, messages
from vlm.data.pictures import Picture, check_fit, check_shapes, check_tokens, fitting, open_picture
from vlm.data.templates import prompt_text
from vlm.model.adapters import base_of
from vlm.model.decoding import decoding

if TYPE_CHECKING:
    from transformers import BatchFeature, LlavaProcessor

Question = str | Sequence[tuple[str, str] | str]
# The last word and the space before it may still change with the next token; Chinese and Japanese have no spaces.
_UNFINISHED = re.compile(r"\s*[^\s\u3000-\u9fff\uf900-\ufaff]*$")


@dataclass(frozen=True)
class Asked:
    """A question as the model is asked it.

    Attributes:
        turns: earlier questions with their answers, then the question with None; markers as in `vlm.Sample`.
        images: the pictures.
        system: system prompt.
    """

    turns: tuple[tuple[str, str | None], ...]
    images: tuple[Picture, ...]
    system: str = ""

    @property
    def question(self) -> str:
        """The words of the question."""
        return " ".join(self.turns[-1][0].replace(IMAGE, "").split())


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
    pictures = _listed(images, "images")
    return answer(model, processor, pictures, [prompt] * len(pictures), max_new_tokens, batch_size)


def answer(
    model: Any,
    processor: LlavaProcessor,
    images: Sequence[Picture | Sequence[Picture]],
    questions: Sequence[Question],
    max_new_tokens: int = 24,
    batch_size: int = 32,
) -> list[str]:
    """One answer for each picture (or several pictures) and its question.

    Args:
        model: a LLaVA model, with or without adapters.
        processor: its processor.
        images: as many as questions; a path, a PIL picture, or a list of these.
        questions: texts; or conversations, each a list of earlier (question, answer) pairs and then the question:
            `[("What is this?", "a cross"), "What colour?"]`. `<image>` in a question marks the place of a picture, one
            for each in their order; without any, all pictures are before the first question.
        max_new_tokens: longest answer, tokens.
        batch_size: questions decoded together.

    Raises:
        ConfigError: if `max_new_tokens` or `batch_size` is not above 0.
        DataError: if the numbers differ, pictures or questions have another form, a picture cannot be read, a
            question has another number of picture markers than pictures, or it is, with its pictures and the answer,
            longer than the language model reads: it is never cut.
        ModelError: if the processor, or its chat template, is not the model's.
    """
    return answers(model, processor, asked(images, questions), max_new_tokens, batch_size)


def answers(
    model: Any, processor: LlavaProcessor, questions: Sequence[Asked], max_new_tokens: int, batch_size: int
) -> list[str]:
    """`answer` for questions that `asked` made.

    Raises:
        ConfigError, DataError, ModelError: as `answer`.
    """
    check_positive(max_new_tokens=max_new_tokens, batch_size=batch_size)
    base = base_of(model)
    check_fit(base, processor)
    prompts = [_prompt(processor, one) for one in questions]
    order = sorted(
        range(len(prompts)), key=lambda number: (len(questions[number].images), len(prompts[number]))
    )  # like lengths pad little
    texts = [""] * len(prompts)
    was_training = base.training
    base.eval()
    try:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            pictures = [questions[number].images for number in chosen]
            made = _decode(base, processor, [prompts[number] for number in chosen], pictures, max_new_tokens)
            for number, text in zip(chosen, made, strict=True):
                texts[number] = text
    finally:
        base.train(was_training)
    return texts


def asked(images: Sequence[object], questions: Sequence[object]) -> list[Asked]:
    """Questions with their pictures, from what `answer` takes.

    Raises:
        DataError: if the numbers differ, or one has another form.
    """
    pictures, texts = _listed(images, "images"), _listed(questions, "questions")
    if len(pictures) != len(texts):
        raise DataError(
            f"there are {len(pictures)} pictures and {len(texts)} questions",
            remedy="give one question for each picture",
            field="questions",
        )
    return [_one(shown, question) for shown, question in zip(pictures, texts, strict=True)]


def _one(shown: Any, question: Any) -> Asked:
    """One question with its pictures.

    Raises:
        DataError: if either has another form.
    """
    if isinstance(shown, Picture):
        shown = (shown,)
    if not isinstance(shown, list | tuple) or not all(isinstance(picture, Picture) for picture in shown):
        raise DataError(
            f"the pictures of a question are a {type(shown).__name__}: {one_line(repr(shown))}",
            remedy="give the path of a file, a PIL picture, or a list of these",
            field="images",
        )
    turns = question if isinstance(question, list | tuple) else [question]
    *before, last = turns or [None]
    pairs = [turn for turn in before if isinstance(turn, list | tuple) and len(turn) == 2]
    texts = [last, *(text for pair in pairs for text in pair)]
    if len(pairs) < len(before) or not all(isinstance(text, str) for text in texts):
        raise DataError(
            f"a question is {one_line(repr(question))}",
            remedy="give a text, or a list of earlier (question, answer) pairs with the question as its last item",
            field="questions",
        )
    made = Asked((*((str(before), str(reply)) for before, reply in pairs), (str(last), None)), tuple(shown))
    check_words(f"the question '{one_line(made.question, 60)}'", made.turns, len(made.images))
    return made


def _listed(values: Any, field: str) -> list[Any]:
    """The items of a list or of another iterable.

    Raises:
        DataError: if it is one picture or text (its letters would be taken for paths), a mapping, a set or no iterable.
    """
    if isinstance(values, Picture | bytes | Mapping | Set) or not isinstance(values, Iterable):
        raise DataError(
            f"pictures and questions come as lists, and {field} is a {type(values).__name__}",
            remedy="write [picture], [question]",
            field=field,
        )
    return list(values)


def check_positive(**values: int) -> None:
    """Refuse arguments that are 0 or less.

    Raises:
        ConfigError: naming the first.
    """
    if bad := next((name for name, value in values.items() if value < 1), None):
        raise ConfigError(f"{bad} is {values[bad]}", remedy="give 1 or more", field=bad)


def _prompt(processor: LlavaProcessor, question: Asked) -> str:
    with fitting():
        prompt = prompt_text(processor, messages(question.turns, len(question.images), question.system))
        if prompt.count(processor.image_token) != len(question.images):
            raise ValueError(f"its chat template does not write {len(question.images)} pictures")
    return prompt


def stream_answer(
    model: Any,
    processor: LlavaProcessor,
    images: Picture | Sequence[Picture],
    question: Question,
    max_new_tokens: int = 24,
) -> Generator[str, None, None]:
    """The answer to one question, word by word while it is made; joined, it is what `answer` gives.

    It is made in a thread of its own, which ends with the answer, with an error, or with the `close()` of what is
    returned (which leaving a `for` loop over it comes to).

    Args:
        model: a LLaVA model, with or without adapters; not to be trained meanwhile.
        processor: its processor.
        images: a path, a PIL picture, or a list of these.
        question: a text or a conversation, as in `answer`.
        max_new_tokens: longest answer, tokens.

    Raises:
        ConfigError, DataError, ModelError: as `answer`; raised at once.
    """
    check_positive(max_new_tokens=max_new_tokens)
    base = base_of(model)
    check_fit(base, processor)
    one = _one(images, question)
    prompts = [_prompt(processor, one)]
    inputs = _inputs(processor, prompts, [one.images])
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
            made = pool.submit(_generate, model, processor.tokenizer, inputs, max_new_tokens, words)
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
    out = _generate(model, processor.tokenizer, inputs, max_new_tokens)
    return [_text(processor, ids) for ids in out[:, inputs["input_ids"].shape[1] :].tolist()]


def _inputs(processor: LlavaProcessor, prompts: list[str], pictures: list[tuple[Picture, ...]]) -> BatchFeature:
    """Token ids [N, L], padded on the left, and pixels [P, 3, H, W]; the same tokens that tuning reads."""
    images = [open_picture(source) for one in pictures for source in one]
    tokenizer = processor.tokenizer
    check_shapes(processor.image_processor, images)
    with fitting():
        check_tokens(processor, images)
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
def _generate(
    model: Any, tokenizer: Any, inputs: BatchFeature, max_new_tokens: int, words: _Words | None = None
) -> Tensor:
    """Token ids [N, L], the prompts' first."""
    greedy = copy(model)  # it shares the weights; the model's own settings stay as they are
    greedy.generation_config = decoding(model.generation_config.to_dict(), tokenizer, model.config.image_token_id)
    with fitting():
        ids: Tensor = greedy.generate(
            **inputs.to(model.device),
            max_new_tokens=max_new_tokens,
            return_dict_in_generate=False,
            streamer=words,
            logits_processor=[_check_scores],
        )
    return ids


def _check_scores(_ids: Tensor, scores: Tensor) -> Tensor:
    """The scores [N, V] of the next tokens as they are.

    Raises:
        ModelError: if a question has no finite best one; suppressed tokens have minus infinity.
    """
    if not bool(scores.amax(-1).isfinite().all()):
        raise ModelError(
            "the language model computes values that are not finite",
            remedy="load it in float32, or train it again with a lower learning rate",
            field="model",
        )
    return scores


def _text(processor: LlavaProcessor, ids: list[int]) -> str:
    with fitting():
        return str(processor.tokenizer.decode(ids, skip_special_tokens=True)).strip()
