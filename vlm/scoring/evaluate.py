# SPDX-License-Identifier: Apache-2.0
"""Scores of answers and captions, beside those with other samples' pictures: what the questions alone give away."""

from __future__ import annotations

import random
import re
import string
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from aced_sdk.errors import EvaluationError, UnsupportedError
from vlm.data.chat import IMAGE
from vlm.data.conversation import check_words, pictures_of_turn
from vlm.data.pictures import Picture, open_picture, same_picture
from vlm.data.samples import Sample, check_samples, readable
from vlm.data.skips import Skips
from vlm.generation import Asked, answers, check_positive
from vlm.scores import KindScore, ScoredAnswer, Scores
from vlm.scoring.captions import caption_scores
from vlm.scoring.vqa import vqa_accuracy

if TYPE_CHECKING:
    from transformers import LlavaProcessor

Metric = Literal["accuracy", "vqa", "captions"]


def evaluate(
    model: Any,
    processor: LlavaProcessor,
    data: Sequence[Sample],
    *,
    metric: Metric = "accuracy",
    blind: bool = True,
    limit: int | None = None,
    seed: int = 0,
    max_new_tokens: int | None = None,
    batch_size: int = 32,
    max_unusable_fraction: float = 0.02,
) -> Scores:
    """Ask every question of the data and score the answers.

    Each turn of a conversation is asked alone, after its system prompt, with the pictures shown up to it. An answer is
    right if it equals an accepted one without regard to case, punctuation and articles.

    Args:
        model: a LLaVA model, with or without adapters.
        processor: its processor.
        data: conversations; those without pictures are not asked blind.
        metric: what is measured beside accuracy, per kind and over all. `vqa`: VQA accuracy (`vlm.vqa_accuracy`), for
            single questions with all annotators' answers in `Sample.answers`. `captions`: CIDEr, BLEU and ROUGE-L
            (`vlm.caption_scores`) against the right answers; CIDEr's word weights are those of the kind, or of all.
        blind: also ask with pictures dealt to other samples, none to its own.
        limit: ask only so many conversations, drawn at random.
        seed: of the draw and the deal.
        max_new_tokens: longest answer, tokens; None: 12, or 40 for captions.
        batch_size: questions decoded together.
        max_unusable_fraction: largest fraction of the conversations that may be left out because their words or a
            picture cannot be read; they are counted in `Scores.reasons`.

    Raises:
        ConfigError, DataError, ModelError: as `answer`; ConfigError also for a limit below 1; DataError also if more
            than `max_unusable_fraction` are left out.
        EvaluationError: if there is nothing to ask, only one picture to deal, or annotators' answers are missing.
        UnsupportedError: for another metric.
    """
    if metric not in _METRICS:
        raise UnsupportedError(
            f"there is no metric '{metric}'; CIDEr, BLEU and ROUGE-L are metric='captions', METEOR is left out",
            remedy=f"use one of {', '.join(_METRICS)}",
            field="metric",
        )
    check_positive(limit=1 if limit is None else limit)
    chosen = list(data)
    check_samples(chosen)
    if limit is not None and limit < len(chosen):
        chosen = random.Random(seed).sample(chosen, limit)
    kept, skips = list[Sample](), Skips()
    for sample in chosen:
        with skips.counting():
            for turn in range(len(sample.turns)):
                _question(sample, turn)
            for image in sample.images:
                if not isinstance(image, str | Path):
                    open_picture(image)
            kept.append(sample)
    if chosen:
        chosen = list(readable(kept, skips, len(chosen), max_unusable_fraction))
    asked = [
        (sample, question, reply, turn) for sample in chosen for turn, (question, reply) in enumerate(sample.turns)
    ]
    if not asked:
        raise EvaluationError("there is nothing to ask", remedy="check the data", field="data")
    if metric == "vqa" and (bare := next((s for s in chosen if len(s.turns) > 1 or len(s.answers) < 4), None)):
        raise EvaluationError(
            f"VQA accuracy needs one question and the answers of at least four annotators, '{bare.key}' has "
            f"{len(bare.turns)} and {len(bare.answers)}",
            remedy="use metric='accuracy', or give all annotators' answers, repetitions included",
            field="metric",
        )
    longest = (40 if metric == "captions" else 12) if max_new_tokens is None else max_new_tokens
    questions = [_question(sample, turn) for sample, _, _, turn in asked]
    said = answers(model, processor, questions, longest, batch_size)
    unseen: list[str | None] = [None] * len(asked)
    if shown := [number for number, one in enumerate(questions) if blind and one.images]:
        dealt = deal([questions[number].images for number in shown], seed)
        others = [_shown_instead(questions[number], pictures) for number, pictures in zip(shown, dealt, strict=True)]
        for number, text in zip(shown, answers(model, processor, others, longest, batch_size), strict=True):
            unseen[number] = text
    scored, exact, references = [], [], []
    for (sample, question, reply, turn), text, other in zip(asked, said, unseen, strict=True):
        more = sample.answers if turn == len(sample.turns) - 1 else ()
        accepted = tuple(dict.fromkeys((reply, *more)))
        blind_right = None if other is None else right(other, accepted)
        scored.append(
            ScoredAnswer(sample.key, sample.kind, question, accepted, text, right(text, accepted), other, blind_right)
        )
        exact.append(text in accepted)
        # people's answers keep their repetitions: both metrics count them
        references.append(more if metric == "vqa" or reply in more else (reply, *more))
    by_kind: dict[str, list[int]] = defaultdict(list)
    for number, one in enumerate(scored):
        by_kind[one.kind].append(number)

    def score(numbers: Sequence[int]) -> KindScore:
        count, some, right_ones = len(numbers), [scored[n] for n in numbers], [references[n] for n in numbers]
        measure = _METRICS[metric]
        dealt = [pair for pair in zip(some, right_ones, strict=True) if pair[0].blind_answer is not None]
        return KindScore(
            count,
            sum(one.right for one in some) / count,
            sum(exact[n] for n in numbers) / count,
            sum(bool(one.blind_right) for one, _ in dealt) / len(dealt) if dealt else None,
            measure([one.answer for one in some], right_ones),
            measure([str(one.blind_answer) for one, _ in dealt], [of for _, of in dealt]) if dealt else None,
        )

    kinds = {kind: score(numbers) for kind, numbers in sorted(by_kind.items())}
    return Scores(score(range(len(scored))), kinds, scored, dict(skips.reasons))


def _question(sample: Sample, turn: int) -> Asked:
    """One turn of a conversation, asked alone.

    Raises:
        DataError: if the conversation has words that cannot be read.
    """
    check_words(f"conversation '{sample.key}'", sample.turns, len(sample.images), sample.system)
    question, shown = pictures_of_turn(sample.turns, turn)
    return Asked(((question, None),), sample.images[:shown], sample.system)


def _shown_instead(one: Asked, pictures: Sequence[Picture]) -> Asked:
    """The question about other pictures; where they have places in its words, repeated or cut to as many."""
    count = len(one.images) if IMAGE in one.turns[0][0] else len(pictures)
    return replace(one, images=tuple(islice(cycle(pictures), count)))


def _no_more(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """What `accuracy` adds to itself."""
    return {}


def _vqa(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Mean VQA accuracy."""
    return {"vqa": sum(map(vqa_accuracy, texts, references)) / len(texts)}


_METRICS: dict[str, Callable[[Sequence[str], Sequence[Sequence[str]]], dict[str, float]]] = {
    "accuracy": _no_more,
    "vqa": _vqa,
    "captions": caption_scores,
}


def deal(images: Sequence[tuple[Picture, ...]], seed: int) -> list[tuple[Picture, ...]]:
    """Another sample's pictures for each sample: a random cycle through the different ones, so that none gets its own.

    Where samples have several pictures, two neighbours in the cycle may have one in common; such a sample changes its
    pictures with the first sample that mends it.

    Raises:
        EvaluationError: if all samples have the same pictures, or one's cannot be dealt to any other.
    """
    different = {tuple(same_picture(one) for one in pictures): pictures for pictures in images}
    keys = list(different)
    if len(keys) < 2:
        raise EvaluationError(
            "one picture alone cannot be shuffled", remedy="give more samples, or set blind=False", field="blind"
        )
    random.Random(f"{seed} deal").shuffle(keys)
    following = dict(zip(keys, keys[1:] + keys[:1], strict=True))
    for key in keys:
        if set(key).isdisjoint(following[key]):
            continue
        for other in keys:
            if set(key).isdisjoint(following[other]) and set(other).isdisjoint(following[key]):
                following[key], following[other] = following[other], following[key]
                break
        else:
            raise EvaluationError(
                f"some pictures are in so many samples that those of {different[key]} cannot be shuffled",
                remedy="give more samples, or set blind=False",
                field="blind",
            )
    return [different[following[tuple(same_picture(one) for one in pictures)]] for pictures in images]


def right(text: str, accepted: Sequence[str]) -> bool:
    """Whether a text is one of the accepted ones after `normalised`."""
    return normalised(text) in {normalised(one) for one in accepted}


def normalised(text: str) -> str:
    """Lower case, without punctuation, articles and needless spaces."""
    bare = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(word for word in re.split(r"\s+", bare) if word and word not in ("a", "an", "the"))
