# SPDX-License-Identifier: Apache-2.0
"""Scores of a vision-language model, as returned by `vlm.evaluate` and listed in model cards."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


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
        blind_answer: what it said about another sample's picture; None if that was not asked, or there is no picture.
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
    """Scores over some questions, shares in 0..1.

    Attributes:
        count: questions.
        accuracy: fraction of right answers.
        exact: share of answers that are right to the very character.
        blind: `accuracy` with other samples' pictures, over the questions with pictures; None if that was not asked.
        metrics: what `metric` adds: `vqa`, or the keys of `vlm.caption_scores`.
        blind_metrics: the same with other samples' pictures; None if that was not asked.
    """

    count: int
    accuracy: float
    exact: float
    blind: float | None
    metrics: dict[str, float] = field(default_factory=dict)
    blind_metrics: dict[str, float] | None = None


@dataclass(frozen=True)
class Scores:
    """Scores over all questions (`total`), per kind, and every answer.

    Attributes:
        reasons: conversations that were left out, by reason.
    """

    total: KindScore
    kinds: dict[str, KindScore]
    samples: list[ScoredAnswer]
    reasons: dict[str, int] = field(default_factory=dict)

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
