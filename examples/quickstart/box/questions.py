# SPDX-License-Identifier: Apache-2.0
"""Questions with short answers, decided from metadata and pixels alone, in LLaVA's JSON form.

Skin tone and gender are never asked about, and pictures whose label names them are left out.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .pictures import Candidate
from .render import Picture

KINDS = ("name", "group", "colour", "yes_no")
_QUESTIONS = {"name": "What is this?", "group": "What kind of thing is it?", "colour": "What colour is it?"}
_WITH_ARTICLE = {
    "face": "a face",
    "hand": "a hand",
    "person": "a person",
    "animal": "an animal",
    "plant": "a plant",
    "food": "food",
    "place": "a place",
    "vehicle": "a vehicle",
    "symbol": "a symbol",
    "flag": "a flag",
}
_SKIN = ("person", "hand")


@dataclass(frozen=True)
class Question:
    """One question about the picture of `row`."""

    row: Candidate
    kind: str
    question: str
    answer: str

    def to_llava(self) -> dict[str, Any]:
        """LLaVA's conversation form, with the kind and the accepted answers beside it."""
        return {
            "id": f"{self.row.key}-{self.kind}",
            "image": f"images/{self.row.key}.png",
            "kind": self.kind,
            "answers": [self.answer],
            "conversations": [
                {"from": "human", "value": f"<image>\n{self.question}"},
                {"from": "gpt", "value": self.answer},
            ],
        }


def ask(
    rows: Iterable[Candidate],
    pictures: Mapping[str, Picture],
    count: int,
    rng: random.Random,
    known: set[str] | None = None,
) -> list[Question]:
    """About `count` questions, the four kinds alike, answers as even as the pictures allow.

    Args:
        rows: emoji to ask about, already without the gendered and toned ones.
        known: answers that `name` may have; None allows every label.
    """
    usable = sorted((row for row in rows if row.meaning and row.key in pictures), key=lambda row: row.key)
    each = count // len(KINDS)
    by_kind: dict[str, dict[str, list[Question]]] = {kind: defaultdict(list) for kind in KINDS}
    for row in usable:
        word, name, colour = row.meaning and row.meaning.word, as_answer(row.caption), pictures[row.key].colour
        if known is None or name in known:
            by_kind["name"][name].append(Question(row, "name", _QUESTIONS["name"], name))
        if word:
            by_kind["group"][word].append(Question(row, "group", _QUESTIONS["group"], word))
        if colour and word not in _SKIN:
            by_kind["colour"][colour].append(Question(row, "colour", _QUESTIONS["colour"], colour))
    questions = [q for kind in ("name", "group", "colour") for q in evenly(by_kind[kind], each, rng)]
    return questions + _yes_no(usable, each, rng)


def as_answer(label: str) -> str:
    """A label in an answer's words: "flag: France" -> "flag of france", "keycap: 1" -> "keycap 1"."""
    return label.lower().replace("flag: ", "flag of ").replace(": ", " ")


def evenly(by_answer: Mapping[str, Sequence[Question]], count: int, rng: random.Random) -> list[Question]:
    """At most `count` questions, taken in turns from the answers."""
    piles = [rng.sample(list(pile), len(pile)) for _, pile in sorted(by_answer.items())]
    rng.shuffle(piles)
    taken: list[Question] = []
    while piles and len(taken) < count:
        for pile in piles[: count - len(taken)]:
            taken.append(pile.pop())
        piles = [pile for pile in piles if pile]
    return taken


def _yes_no(rows: Sequence[Candidate], count: int, rng: random.Random) -> list[Question]:
    """As many yes as no to each "Is this a ...?", so that the question alone tells nothing."""
    by_word: dict[str, list[Candidate]] = defaultdict(list)
    for row in rows:
        if row.meaning and row.meaning.word:
            by_word[row.meaning.word].append(row)
    asked = [word for word in _WITH_ARTICLE if word in by_word]
    questions: list[Question] = []
    for number, word in enumerate(asked):
        share, rest = divmod(count // 2, len(asked))
        each = min(share + (number < rest), len(by_word[word]))
        yes = rng.sample(by_word[word], each)
        no = rng.sample([row for other, pile in sorted(by_word.items()) if other != word for row in pile], each)
        text = f"Is this {_WITH_ARTICLE[word]}?"
        questions += [Question(row, "yes_no", text, "yes") for row in yes]
        questions += [Question(row, "yes_no", text, "no") for row in no]
    return questions


def write_images(folder: Path, questions: Iterable[Question], pictures: Mapping[str, Picture]) -> int:
    """The pictures asked about, as `folder`/KEY.png; returns how many."""
    folder.mkdir(parents=True, exist_ok=True)
    keys = {question.row.key for question in questions}
    for key in keys:
        (folder / f"{key}.png").write_bytes(pictures[key].png)
    return len(keys)
