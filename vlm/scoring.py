# SPDX-License-Identifier: Apache-2.0
"""Accuracy of answers, beside the accuracy with other samples' pictures: what the questions alone give away."""

from __future__ import annotations

import random
import re
import string
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from aced_sdk.errors import EvaluationError, UnsupportedError
from vlm.data import Sample
from vlm.generating import answer
from vlm.pictures import Picture, same_picture

if TYPE_CHECKING:
    from transformers import LlavaProcessor


@dataclass(frozen=True)
class ScoredAnswer:
    """One question.

    Attributes:
        key: the conversation's name.
        kind: its kind.
        question: what was asked.
        expected: right answers.
        answer: what the model said.
        right: whether that is one of them after `normalised`.
        blind_answer: what it said about another sample's picture; None if that was not asked.
        blind_right: whether that is right for the own picture.
    """

    key: str
    kind: str
    question: str
    expected: tuple[str, ...]
    answer: str
    right: bool
    blind_answer: str | None
    blind_right: bool | None


@dataclass(frozen=True)
class KindScore:
    """Shares in 0..1 over `count` questions; `exact` demands the very characters, `blind` is None if not asked."""

    count: int
    accuracy: float
    exact: float
    blind: float | None


@dataclass(frozen=True)
class Scores:
    """Scores over all questions (`total`), per kind, and every answer."""

    total: KindScore
    kinds: dict[str, KindScore]
    samples: list[ScoredAnswer]

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.total.accuracy

    @property
    def blind(self) -> float | None:
        """Share of right answers with another sample's picture."""
        return self.total.blind

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)


def evaluate(
    model: Any,
    processor: LlavaProcessor,
    data: Sequence[Sample],
    *,
    metric: str = "accuracy",
    blind: bool = True,
    limit: int | None = None,
    seed: int = 0,
    max_new_tokens: int = 12,
    batch_size: int = 32,
) -> Scores:
    """Ask every question of the data and score the answers.

    Each turn of a conversation is asked alone. An answer is right if it equals an accepted one without regard to case,
    punctuation and articles.

    Args:
        model: a LLaVA model, with or without adapters.
        processor: its processor.
        data: conversations with pictures.
        metric: `accuracy`; others are not there yet.
        blind: also ask with pictures dealt to other samples, none to its own.
        limit: ask only so many conversations, drawn at random.
        seed: of the draw and the deal.
        max_new_tokens: longest answer, tokens.
        batch_size: questions decoded together.

    Raises:
        EvaluationError: if there is nothing to ask, or only one picture to deal.
        UnsupportedError: for another metric.
    """
    if metric != "accuracy":
        raise UnsupportedError(
            f"there is no metric '{metric}' in this version", remedy="use metric='accuracy'", field="metric"
        )
    chosen = list(data)
    if limit is not None and limit < len(chosen):
        chosen = random.Random(seed).sample(chosen, limit)
    asked = [
        (sample, question, reply, turn) for sample in chosen for turn, (question, reply) in enumerate(sample.turns)
    ]
    if not asked or not all(sample.images for sample in chosen):
        raise EvaluationError(
            "there is nothing to ask, or a conversation without a picture", remedy="check the data", field="data"
        )
    questions = [question for _, question, _, _ in asked]
    said = answer(model, processor, [sample.images for sample, *_ in asked], questions, max_new_tokens, batch_size)
    unseen: Sequence[str | None] = [None] * len(asked)
    if blind:
        dealt = deal([sample.images for sample, *_ in asked], seed)
        unseen = answer(model, processor, dealt, questions, max_new_tokens, batch_size)
    scored, exact = [], []
    for (sample, question, reply, turn), text, other in zip(asked, said, unseen, strict=True):
        accepted = (reply, *(a for a in sample.answers if turn == len(sample.turns) - 1 and a != reply))
        blind_right = None if other is None else right(other, accepted)
        scored.append(
            ScoredAnswer(sample.key, sample.kind, question, accepted, text, right(text, accepted), other, blind_right)
        )
        exact.append(text in accepted)
    by_kind: dict[str, list[int]] = defaultdict(list)
    for number, one in enumerate(scored):
        by_kind[one.kind].append(number)
    kinds = {kind: _score(scored, exact, numbers) for kind, numbers in sorted(by_kind.items())}
    return Scores(_score(scored, exact, range(len(scored))), kinds, scored)


def _score(scored: Sequence[ScoredAnswer], exact: Sequence[bool], numbers: Sequence[int]) -> KindScore:
    count = len(numbers)
    blind = [scored[n].blind_right for n in numbers if scored[n].blind_right is not None]
    return KindScore(
        count,
        sum(scored[n].right for n in numbers) / count,
        sum(exact[n] for n in numbers) / count,
        sum(map(bool, blind)) / count if blind else None,
    )


def deal(images: Sequence[tuple[Picture, ...]], seed: int) -> list[tuple[Picture, ...]]:
    """Another sample's pictures for each sample: a random cycle through the different ones, so that none gets its own.

    Raises:
        EvaluationError: if all samples have the same pictures.
    """
    different = {tuple(same_picture(one) for one in pictures): pictures for pictures in images}
    keys = list(different)
    if len(keys) < 2:
        raise EvaluationError(
            "one picture alone cannot be shuffled", remedy="give more samples, or set blind=False", field="blind"
        )
    random.Random(f"{seed} deal").shuffle(keys)
    following = dict(zip(keys, keys[1:] + keys[:1], strict=True))
    return [different[following[tuple(same_picture(one) for one in pictures)]] for pictures in images]


def right(text: str, accepted: Sequence[str]) -> bool:
    """Whether a text is one of the accepted ones after `normalised`."""
    return normalised(text) in {normalised(one) for one in accepted}


def normalised(text: str) -> str:
    """Lower case, without punctuation, articles and needless spaces."""
    bare = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(word for word in re.split(r"\s+", bare) if word and word not in ("a", "an", "the"))
