# SPDX-License-Identifier: Apache-2.0
"""VQA accuracy: an answer counts as far as the annotators gave it, after the official clean-up of both."""

from __future__ import annotations

import re
from collections.abc import Sequence

from aced_sdk.errors import EvaluationError

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(value) for value, word in enumerate(_NUMBERS)} | {"none": "0"}
_ARTICLES = frozenset(("a", "an", "the"))
# Apostrophes and colons stay: they tell possessives from plurals, and times.
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_RIGHT = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
    needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've
    somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
    that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've
    weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've
    why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
    you've
"""
# What lacks one apostrophe gets it back. The last entry stands in the official table the wrong way round, and so here.
_CONTRACTIONS = {
    word[: mark.start()] + word[mark.end() :]: word for word in _RIGHT.split() for mark in re.finditer("'", word)
} | {"somebody'd": "somebodyd"}


def vqa_normalised(text: str) -> str:
    """An answer as the official evaluation compares it.

    In this order: each punctuation mark (not apostrophes and colons) goes, and a space takes its place unless the mark
    stands beside a space somewhere or the text has a comma between digits; periods go unless a digit follows; lower
    case; number words to ten become digits; articles go; contractions get their apostrophe back.

    Source: https://visualqa.org/evaluation.html, and the evaluation code that it links.
    """
    text = re.sub(r"[\n\t]", " ", text).strip()
    bare = text
    for mark in _PUNCTUATION:
        together = f"{mark} " in text or f" {mark}" in text or re.search(r"\d,\d", text)
        bare = bare.replace(mark, "" if together else " ")
    bare = re.sub(r"\.(?!\d)", "", bare)
    words = [_DIGITS.get(word, word) for word in bare.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(text: str, annotators: Sequence[str]) -> float:
    """How far an answer agrees with people's: the mean of min(n / 3, 1), 0 to 1.

    n counts the same answer among all annotators but one, and the mean is over who is left out (10 choose 9 in VQAv2),
    as people's own accuracy is measured. Both sides are always cleaned by `vqa_normalised`, as lmms-eval does. The
    official code cleans people's answers in part only, trusting VQAv2's to be clean: their "two" is hit by no answer.

    Args:
        text: the model's answer.
        annotators: one answer for each annotator, repetitions included; four or more, or nothing can reach 1.

    Raises:
        EvaluationError: if there are fewer than four.

    Source: VQA, arXiv 1505.00468; VQAv2, arXiv 1612.00837.
    """
    people = len(annotators)
    if people < 4:
        raise EvaluationError(
            f"VQA accuracy needs the answers of at least four annotators, there are {people}",
            remedy="use metric='accuracy', or give all annotators' answers, repetitions included",
            field="answers",
        )
    mine = vqa_normalised(text)
    same = sum(vqa_normalised(one) == mine for one in annotators)
    without_a_match = (people - same) * min(same / 3, 1.0)
    without_another = same * min((same - 1) / 3, 1.0)
    return (without_a_match + without_another) / people
