# SPDX-License-Identifier: Apache-2.0
"""Captions whose HTML entities are nested deeply."""

from __future__ import annotations

import time

import pytest
from open_clip.tokenizer import SimpleTokenizer

from tests import tiny


@pytest.mark.parametrize(
    "text",
    [
        "&" + "amp;" * 1000,
        "&" + "&#97;mp;" * 500,
        "&" * 1000 + "num;" + "35;" * 999,
        "&\N{ESCAPE}[m" + "amp;\N{ESCAPE}[m" * 500,
        "\N{FULLWIDTH AMPERSAND}" + "\N{FULLWIDTH LATIN SMALL LETTER A}mp;" * 800,
        "&am\0p;" + "amp;" * 1000,
    ],
    ids=["suffixes", "letters", "numbers", "escapes", "wide", "control"],
)
def test_deeply_nested_entities_take_little_time(text: str) -> None:
    encoder = tiny.encoder()
    encoder.tokenize(["a picture"])
    began = time.process_time()
    encoder.tokenize([text] * 10)
    assert time.process_time() - began < 0.5  # 2 s without a bound


TEXTS = ["&amp;amp;amp;lt;b&quot; ", "R&amp;D; <p>&amp;amp;</p>\n", "caf&amp;eacute; Ã© ", "a;"]


@pytest.mark.parametrize("middle", TEXTS)
def test_other_texts_have_open_clips_tokens(middle: str) -> None:
    encoder = tiny.encoder()
    reference = SimpleTokenizer(context_length=encoder.context_length)
    for count in (1, 40, 80):
        text = "A picture. " + middle * count
        assert encoder.tokenizer.clean_fn(text) == reference.clean_fn(text)
    assert encoder.tokenize([text]).equal(reference([text]))
