# SPDX-License-Identifier: Apache-2.0
"""Caption scores against those of the COCO caption evaluation code.

The numbers come from pycocoevalcap 1.2 (PyPI) over the same texts: its PTBTokenizer (Stanford CoreNLP 3.4.1, Java 17),
then Cider(), Bleu(4) and Rouge(). Nothing of it runs here.
"""

from __future__ import annotations

import pytest

from vlm.scoring.captions import caption_scores, tokens

Captions = list[tuple[str, list[str]]]

MADE_UP: Captions = [
    (
        "A man riding a wave on a surfboard.",
        [
            "A man rides a wave on top of a surfboard.",
            "A surfer riding a large wave in the ocean.",
            "The man is surfing on a big wave.",
        ],
    ),
    (
        "a cat's sitting on the laptop",
        [
            "A cat sits on a laptop computer.",
            "The cat is lying on a man's laptop.",
            "A cat that doesn't want to leave the keyboard.",
        ],
    ),
    (
        "two dogs playing with a red frisbee",
        [
            "Two dogs play with a frisbee in a park.",
            "A black-and-white dog and a brown dog fight over a red frisbee.",
            "Two dogs are playing.",
        ],
    ),
    (
        "a plate of food",
        [
            "A half-eaten sandwich on a white plate.",
            "A plate with a sandwich, fries and a pickle.",
            "Lunch: a sandwich & fries for $5.00",
        ],
    ),
    (
        "a stop sign at the corner of the street",
        ['A sign that says "STOP" on the corner...', "A red stop sign at a street corner."],
    ),
    ("a clock a clock a clock a clock", ["A clock that reads 10:30 a.m.", "The clock tower isn't lit."]),
    ("train", ["A train at the station.", "A long train pulls into the station in the U.S."]),
    (
        "a group of people standing around a table with a birthday cake on it and many many candles burning",
        ["People around a table with a cake.", "A birthday party with 1,000 candles!"],
    ),
    ("", ["An empty room.", "Nothing to see here; an empty room with white walls."]),
    ("a woman in a red dress", ["a woman in a red dress", "A woman wearing a red dress (with white dots)."]),
    (
        "they can't see it, won't they?",
        ["They cannot see what they're doing.", "They'll never see it, they've no lights."],
    ),
    (
        "a giraffe standing next to a tree",
        ["A giraffe standing next to a tree.", "A giraffe stands next to a tall tree.", "Giraffe near a tree."],
    ),
]
# names of pictures in the quickstart's box; what is said is the name, cut, shuffled or another one
NAMES: Captions = [
    ("woman guard: dark skin tone", ["flag: North Macedonia"]),
    ("high speed rail", ["high speed rail"]),
    ("clapping hands: medium-dark skin tone", ["clapping hands: medium-dark skin tone"]),
    ("thermometer mercury cold", ["thermometer mercury cold"]),
    ("man juggling: medium-dark skin tone", ["man juggling: medium-dark skin tone"]),
    ("woman walking: medium-light skin tone", ["ng component css"]),
    ("man firefighter: medium-light skin tone", ["empty wood bucket handle"]),
    ("cat with tears of joy", ["cat with tears of joy"]),
    ("silhouette in busts", ["busts in silhouette"]),
    ("alignment horizontal top", ["alignment horizontal top"]),
    ("man mountain", ["man mountain biking"]),
    ("person biking: medium skin tone", ["person biking: medium skin tone"]),
    ("women with bunny ears", ["guard: dark skin tone"]),
    ("woman running: medium-dark skin tone", ["woman gesturing NO: medium-light skin tone"]),
    ("white exclamation", ["white exclamation mark"]),
    ("person in motorized wheelchair: light skin tone", ["bow tie ribbon"]),
    ("Cape flag: Verde", ["flag: Cape Verde"]),
    ("overcast day", ["overcast day drizzle"]),
    ("partly cloudy day smoke", ["partly cloudy day smoke"]),
    ("man construction worker: medium-dark skin", ["man construction worker: medium-dark skin tone"]),
    ("google cloud run", ["google cloud run"]),
    ("woman biking: dark skin tone", ["woman biking: dark skin tone"]),
    ("face fear screaming in", ["face screaming in fear"]),
    ("woman office", ["woman office worker"]),
    ("mode up close", ["close up mode"]),
    ("family: woman, girl", ["freezing line column"]),
    ("first quarter moon face", ["first quarter moon face"]),
    ("preview close one", ["all seeing eye"]),
]
SCORES = {
    "made up": {
        "cider": 1.823297575736819,
        "bleu_1": 0.7023809523725907,
        "bleu_2": 0.5634844071450325,
        "bleu_3": 0.4228355610905195,
        "bleu_4": 0.3366047875561533,
        "rouge_l": 0.5544854554748545,
    },
    "names": {
        "cider": 4.852982463551291,
        "bleu_1": 0.6851851851788409,
        "bleu_2": 0.6138826042849331,
        "bleu_3": 0.5732977262827192,
        "bleu_4": 0.5540228353904143,
        "rouge_l": 0.6286794990092254,
    },
    "both": {
        "cider": 3.9415605442696915,
        "bleu_1": 0.6927083333297255,
        "bleu_2": 0.590438751595696,
        "bleu_3": 0.4990513571723899,
        "bleu_4": 0.43343066584025,
        "rouge_l": 0.6064212859489142,
    },
}


@pytest.mark.parametrize(("name", "captions"), [("made up", MADE_UP), ("names", NAMES), ("both", MADE_UP + NAMES)])
def test_scores_are_those_of_the_coco_code(name: str, captions: Captions) -> None:
    scores = caption_scores([said for said, _ in captions], [right for _, right in captions])
    assert scores == pytest.approx(SCORES[name], rel=0, abs=1e-12)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        # the Java tokeniser's own output for these
        ("A man's dog doesn't like the cat.", "a man 's dog does n't like the cat"),
        (
            "Two people can't see what they're doing, aren't they?",
            "two people ca n't see what they 're doing are n't they",
        ),
        ("I cannot believe it's not butter!", "i can not believe it 's not butter"),
        (
            "A black-and-white photo of a 3.5 inch floppy; it won't work.",
            "a black-and-white photo of a 3.5 inch floppy it wo n't work",
        ),
        ("The time is 10:30 a.m. in the U.S.", "the time is 10:30 a.m. in the u.s."),
        ('A sign that says "STOP" on the corner...', "a sign that says stop on the corner"),
        ("1,000 balloons, 50% off & $5.00 each", "1,000 balloons 50 % off & $ 5.00 each"),
        ("the girl is gonna eat pizza with a 's' on it", "the girl is gon na eat pizza with a 's on it"),
        ("an x-ray t-shirt, rock 'n' roll o'clock", "an x-ray t-shirt rock 'n' roll o'clock"),
        ("The dogs' bowl -- empty.", "the dogs bowl empty"),
    ],
)
def test_words_are_cut_as_in_the_penn_treebank(text: str, words: str) -> None:
    assert " ".join(tokens(text)) == words
