# SPDX-License-Identifier: Apache-2.0
"""Conversations as chat templates take them; where their pictures are; texts that no tokenizer can read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlm.data.chat import IMAGE
from vlm.data.skips import Unusable

_MAX_TEXT = 2**20  # characters of a conversation


def check_words(name: str, turns: Sequence[tuple[str, str | None]], images: int, system: str = "") -> None:
    """Refuse texts that cannot be asked or learned.

    Args:
        name: of the conversation, for the error.
        turns: questions and answers; the answer to the last one may be None.
        images: pictures of the conversation.
        system: the system prompt.

    Raises:
        Unusable: for picture markers outside of questions or in another number than pictures, an unpaired surrogate,
            or more than 1 M characters.
    """
    questions = [question for question, _ in turns]
    others = [system, *(answer for _, answer in turns if answer is not None)]
    check_letters(name, [*questions, *others])
    if any(IMAGE in text for text in others):
        raise Unusable(
            f"{name} has an {IMAGE} marker in its words, outside of its questions",
            remedy=f"leave {IMAGE} out of answers and system prompts",
            reason="picture outside of a question",
        )
    if (markers := sum(question.count(IMAGE) for question in questions)) not in (0, images):
        raise Unusable(
            f"{name} has {markers} {IMAGE} markers in its words and {images} pictures",
            remedy="write one marker for each picture at its place, or none: then all are before the first question",
            reason="markers and pictures differ in number",
        )


def check_letters(name: str, texts: Sequence[str]) -> None:
    """Refuse texts that cannot be written as UTF-8, or are too long together.

    Raises:
        Unusable: for an unpaired surrogate, or more than 1 M characters.
    """
    if sum(map(len, texts)) > _MAX_TEXT:
        raise Unusable(
            f"{name} has more than {_MAX_TEXT:,} characters", remedy="shorten or remove it", reason="too long"
        )
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        raise Unusable(
            f"{name} has half a character (an unpaired surrogate) in its words",
            remedy="write the text as UTF-8 again",
            reason="unpaired surrogate",
        ) from None


def messages(turns: Sequence[tuple[str, str | None]], images: int, system: str = "") -> list[dict[str, Any]]:
    """A conversation as chat templates take it; without markers in the questions, its pictures come first.

    Args:
        turns: questions and answers; the answer to the last one may be None.
        images: pictures of the conversation.
        system: the system prompt.
    """
    written: list[dict[str, Any]] = [_message("system", system)] if system else []
    marked = any(IMAGE in question for question, _ in turns)
    for number, (question, answer) in enumerate(turns):
        text = question if marked or number else IMAGE * images + question
        written.append(_message("user", text))
        if answer is not None:
            written.append(_message("assistant", answer))
    return written


def _message(role: str, text: str) -> dict[str, Any]:
    *before, last = text.split(IMAGE)
    parts = [part for words in before for part in ({"type": "text", "text": words}, {"type": "image"})]
    parts.append({"type": "text", "text": last})
    return {"role": role, "content": [part for part in parts if part is parts[-1] or part.get("text") != ""]}


def pictures_of_turn(turns: Sequence[tuple[str, str]], turn: int) -> tuple[str, int | None]:
    """A question asked without the turns before it, and how many of the conversation's pictures it is asked with.

    It is asked with all pictures if the questions have no markers (None), else with those up to its own.

    Args:
        turns: questions and answers.
        turn: number of the question.
    """
    markers = [question.count(IMAGE) for question, _ in turns]
    question, before = turns[turn][0], sum(markers[:turn])
    if not any(markers):
        return question, None
    return (IMAGE * before + question if markers[turn] else question), before + markers[turn]
