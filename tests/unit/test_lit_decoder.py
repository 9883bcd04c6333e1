# SPDX-License-Identifier: Apache-2.0
"""A LiT-decoder learns to read a tower, ranks towers by what they hold, and refuses what it cannot score."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import encoder

import vlm
from aced_sdk.errors import ConfigError, DataError, EngineError, EvaluationError
from aced_sdk.towers import DualEncoder
from vlm.model.towers import open_tower
from vlm.probing import lit
from vlm.probing.lit import features, learn_tokens, turns

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220)}
CONFIG = vlm.LitDecoder(width=32, layers=1, heads=2, vocabulary=400, steps=60, batch_size=16, learning_rate=1e-2)


def samples(count: int, seed: int) -> list[vlm.Sample]:
    """A caption and a question about pictures of one colour."""
    noise = np.random.default_rng(seed)
    made = []
    for number in range(count):
        name, value = list(COLOURS.items())[number % 3]
        pixels = np.clip(np.array(value) + noise.integers(-20, 21, (16, 16, 3)), 0, 255).astype(np.uint8)
        image = (Image.fromarray(pixels),)
        made.append(vlm.Sample(f"{seed}-{number}-a", (("What colour is it?", name),), image, "colour"))
        made.append(vlm.Sample(f"{seed}-{number}-c", (("Describe it.", f"a plain {name} picture"),), image, "caption"))
    return made


def blind(own: DualEncoder) -> DualEncoder:
    """The same tower, in whose tokens no picture leaves a trace."""
    with torch.no_grad():
        own.model.visual.conv1.weight.zero_()  # type: ignore[union-attr, operator]
    return own


def test_it_learns_to_answer_and_to_caption_from_the_picture() -> None:
    held_out = samples(6, 1)
    model = vlm.lit_decoder(encoder(), samples(24, 0), CONFIG)
    said = model.answer([sample.images[0] for sample in held_out], [sample.turns[0][0] for sample in held_out])
    assert said == [sample.turns[0][1] for sample in held_out]


def test_the_tower_stays_as_it_was_and_equal_seeds_are_equal() -> None:
    own = encoder()
    before = own.fingerprint()
    quick = CONFIG.replace(steps=3)
    one, two, other = (vlm.lit_decoder(own, samples(6, 0), quick, seed).decoder.state_dict() for seed in (0, 0, 1))
    assert own.fingerprint() == before
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_a_tower_that_sees_is_ranked_above_one_that_does_not() -> None:
    towers = {"blind": blind(encoder()), "sees": encoder()}
    ranking = vlm.rank_encoders(towers, samples(24, 0), samples(9, 1), CONFIG, seeds=(0, 1))
    assert [one.name for one in ranking.encoders] == ["sees", "blind"]
    best, worst = (one.scores for one in ranking.encoders)
    assert best["accuracy"].mean == 1
    assert best["blind_accuracy"].mean < 0.7
    assert best["cider"].mean > 3 * best["blind_cider"].mean
    assert worst["accuracy"].mean <= 0.5
    lead = ranking.lead("sees", "blind")
    assert lead.values == tuple(a - b for a, b in zip(best["accuracy"].values, worst["accuracy"].values, strict=True))
    (first, *_) = ranking.encoders
    assert {kind: sorted(of) for kind, of in first.by_kind.items()} == {
        "caption": ["blind_cider", "cider"],
        "colour": ["accuracy", "blind_accuracy"],
    }
    assert first.by_kind["caption"]["cider"] == best["cider"]
    assert ranking.lead("sees", "blind", "accuracy", "colour") == lead
    with pytest.raises(EvaluationError, match=r"no cider of 'sees'.*'colour'.*None or one of colour, caption"):
        ranking.lead("sees", "blind", "cider", "colour")
    lines = ranking.table().splitlines()
    assert lines[0] == "| encoder | accuracy | cider | blind accuracy | blind cider |"
    assert lines[2].startswith("| sees | 100.0 ± 0.0 |")


def test_one_tower_for_each_seed() -> None:
    quick = CONFIG.replace(steps=2)
    taught, asked = samples(6, 0), samples(6, 1)
    both = [encoder(0), encoder(1)]
    ranking = vlm.rank_encoders({"two": both, "one": both[0]}, taught, asked, quick, seeds=(3, 4))
    scores = {one.name: one.scores["cider"].values for one in ranking.encoders}
    assert scores["two"][0] == scores["one"][0]
    with pytest.raises(ConfigError, match="names 2 encoders, and there are 3 seeds"):
        vlm.rank_encoders({"two": both}, taught, asked, quick, seeds=(0, 1, 2))


def test_tokens_give_any_text_back() -> None:
    held = turns(samples(3, 0))
    tokenizer = learn_tokens(held, CONFIG)
    for text in ("What colour is it?", "naïve 猫 😀", "  two  spaces"):
        assert tokenizer.decode(tokenizer.encode(text).ids).strip() == text.strip()
    assert tokenizer.get_vocab() == learn_tokens(held, CONFIG).get_vocab()


def test_features_are_the_towers_last_tokens() -> None:
    tower = open_tower(encoder())
    picture = samples(1, 0)[0].images[0]
    assert features(tower, [picture]).shape == (1, 5, 32)


def test_what_cannot_be_learned_or_scored_is_refused(tmp_path: Path) -> None:
    good = samples(3, 0)
    bare = vlm.Sample("bare", (("Why?", "So."),))
    long = vlm.Sample("long", (("Why?", "word " * 80),), good[0].images)
    with pytest.raises(DataError, match="'bare' has 0 pictures"):
        vlm.lit_decoder(encoder(), [*good, bare], CONFIG)
    with pytest.raises(DataError, match="tokens, more than 64") as caught:
        vlm.lit_decoder(encoder(), [*good, long], CONFIG)
    assert caught.value.field == "config.max_tokens"
    with pytest.raises(DataError, match="no conversations"):
        vlm.lit_decoder(encoder(), [], CONFIG)
    with pytest.raises(EvaluationError, match="3 held-out pictures are learned from"):
        vlm.rank_encoders({"a": encoder()}, good, good, CONFIG)
    with pytest.raises(ConfigError, match="0 encoders"):
        vlm.rank_encoders({}, good, samples(3, 1), CONFIG)
    with pytest.raises(ConfigError, match="seeds"):
        vlm.rank_encoders({"a": encoder()}, good, samples(3, 1), CONFIG, seeds=(1, 1))
    with pytest.raises(ConfigError, match="width of 32 does not divide into 3 heads"):
        CONFIG.replace(heads=3)
    with pytest.raises(DataError, match="do not fit into 128 places"):
        vlm.lit_decoder(encoder(), good, CONFIG.replace(steps=1)).answer(good[0].images, ["why " * 150])
    ranking = vlm.rank_encoders({"a": encoder()}, good, samples(3, 1), CONFIG.replace(steps=1), seeds=(0,))
    with pytest.raises(EvaluationError, match="no accuracy of 'b'"):
        ranking.lead("a", "b")


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_named(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    forward = lit._Decoder.forward

    def wrong(self: lit._Decoder, *inputs: torch.Tensor) -> torch.Tensor:
        loss = forward(self, *inputs)
        return loss * float("nan") if what == "loss" else loss + (loss - loss).sqrt()

    monkeypatch.setattr(lit._Decoder, "forward", wrong)
    with pytest.raises(EngineError, match=f"the decoder's {what} is not finite at step 1"):
        vlm.lit_decoder(encoder(), samples(3, 0), CONFIG.replace(steps=3))
