# SPDX-License-Identifier: Apache-2.0
"""VQA accuracy by its published rules, and what holds for caption scores whatever the words are."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vlm
from aced_sdk.errors import EvaluationError
from vlm.scoring.vqa import vqa_normalised


@pytest.mark.parametrize(
    ("said", "compared"),
    [
        # the rules of visualqa.org/evaluation.html, in its order
        ("RED", "red"),  # lower case
        ("yes.", "yes"),  # periods go
        ("3.5", "3.5"),  # but not from decimals
        ("U.S. flag", "us flag"),
        ("two dogs", "2 dogs"),  # number words
        ("none", "0"),
        ("ten", "10"),
        ("eleven", "eleven"),  # to ten
        ("a red the apple an", "red apple"),  # articles
        ("theatre", "theatre"),
        ("dont know", "don't know"),  # a missing apostrophe comes back
        ("don't know", "don't know"),
        ("couldntve", "couldntve"),  # two are too many
        ("couldn'tve", "couldn't've"),
        ("oclock", "o'clock"),
        ("its", "its"),  # a word of its own
        ("somebody'd", "somebodyd"),  # the official table's own slip
        ("t-shirt", "t shirt"),  # a space for punctuation
        ("black/white", "black white"),
        ("wait!", "wait"),
        ("a, b,c", "bc"),  # one comma is next to a space, so all commas are removed ("a" is an article)
        ("x, b,c", "x bc"),
        ("red, green", "red green"),  # none where one stands already
        ("girl's", "girl's"),  # apostrophes stay
        ("10:30", "10:30"),  # colons stay
        ("100,978", "100978"),  # no space for a comma between digits
        ("1,000 t-shirts", "1000 tshirts"),  # which the official code then grants to every mark of the text
        ("\tred\napple ", "red apple"),
        ("the", ""),
    ],
)
def test_answers_are_cleaned_by_the_official_rules(said: str, compared: str) -> None:
    assert vqa_normalised(said) == compared


@pytest.mark.parametrize(("same", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (7, 1.0), (10, 1.0)])
def test_accuracy_of_ten_annotators(same: int, accuracy: float) -> None:
    assert vlm.vqa_accuracy("Two.", ["two"] * same + ["a cat"] * (10 - same)) == pytest.approx(accuracy)


@given(people=st.lists(st.sampled_from(["red", "Red.", "2", "two", "cat"]), min_size=4, max_size=11))
def test_accuracy_is_the_mean_over_all_but_one(people: list[str]) -> None:
    clean = [vqa_normalised(one) for one in people]
    left = [min(rest.count("red") / 3, 1) for rest in combinations(clean, len(clean) - 1)]
    assert vlm.vqa_accuracy("a RED", people) == pytest.approx(sum(left) / len(left))


def test_three_annotators_are_too_few() -> None:
    with pytest.raises(EvaluationError, match=r"four annotators, there are 3.*field: answers"):
        vlm.vqa_accuracy("red", ["red"] * 3)


SENTENCES = st.lists(st.sampled_from(["red", "green", "blue", "cat", "dog"]), min_size=4, max_size=8).map(" ".join)


@settings(max_examples=50)
@given(groups=st.lists(st.lists(SENTENCES, min_size=1, max_size=3), min_size=1, max_size=6), data=st.data())
def test_caption_scores_in_general(groups: list[list[str]], data: st.DataObject) -> None:
    said = [data.draw(SENTENCES) for _ in groups]
    scores = vlm.caption_scores(said, groups)
    order = data.draw(st.permutations(range(len(groups))))
    assert vlm.caption_scores([said[n] for n in order], [groups[n][::-1] for n in order]) == pytest.approx(scores)
    assert all(0 <= value <= 1 + 1e-9 for name, value in scores.items() if name != "cider")
    assert 0 <= scores["cider"] <= 10 + 1e-9
    assert list(scores) == ["cider", "bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l"]
    said_by_people = vlm.caption_scores([group[0] for group in groups], groups)
    assert [said_by_people[name] for name in scores if name != "cider"] == pytest.approx([1] * 5, abs=1e-6)


def test_cider_by_hand() -> None:
    """Two pictures; "a" is said of both and weighs nothing."""
    scores = vlm.caption_scores(["red", "a blue"], [["a red"], ["a blue"]])
    # orders 1 and 2 of four: "red" matches to the full, no bigram was said, and one bigram is lacking in length
    first = 10 * math.exp(-1 / 72) * (1 + 0) / 4
    second = 10 * (1 + 1) / 4
    assert scores["cider"] == pytest.approx((first + second) / 2)


def test_one_picture_has_no_cider_and_texts_need_references() -> None:
    assert vlm.caption_scores(["a red cat sat"], [["a red cat sat"]])["cider"] == 0
    with pytest.raises(EvaluationError, match="1 captions and 2 sets"):
        vlm.caption_scores(["a"], [["a"], ["b"]])
    with pytest.raises(EvaluationError, match="caption 1 has no reference"):
        vlm.caption_scores(["a", "b"], [["a"], []])
    with pytest.raises(EvaluationError, match="0 captions"):
        vlm.caption_scores([], [])
