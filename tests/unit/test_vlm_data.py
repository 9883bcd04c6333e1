# SPDX-License-Identifier: Apache-2.0
"""Conversations in, rows of tokens and scores out: no language model is run here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import vlm
from aced_sdk.errors import ConfigError, DataError, EvaluationError
from vlm.data.pictures import open_picture
from vlm.data.rows import IGNORED, Batches, Row, collate
from vlm.data.samples import Samples
from vlm.model.loss import attention_mask
from vlm.scoring.evaluate import deal, normalised, right


def picture(path: Path, colour: tuple[int, int, int] = (200, 30, 30)) -> Path:
    Image.new("RGB", (20, 16), colour).save(path)
    return path


def entry(
    key: str, image: str = "a.png", question: str = "<image>\nWhat colour is it?", answer: str = "red"
) -> dict[str, object]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": key, "image": image, "kind": "colour", "answers": ["red"], "conversations": turns}


def read(folder: Path, *entries: dict[str, object], **options: float) -> Samples:
    (folder / "data.json").write_text(json.dumps(entries))
    return vlm.load_llava(folder / "data.json", folder, **options)


def test_llava_json_becomes_conversations(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    samples = read(tmp_path, entry("one"), entry("two", question="Is it red?\n<image>", answer=" yes "))
    assert samples[0] == vlm.Sample(
        "one", (("What colour is it?", "red"),), (tmp_path / "a.png",), kind="colour", answers=("red",)
    )
    assert samples[1].turns == (("Is it red?", "yes"),)
    assert (len(samples), samples.skipped) == (2, ())


def test_rows_of_messages_become_the_same_conversations(tmp_path: Path) -> None:
    image = Image.open(picture(tmp_path / "a.png"))
    content = [{"type": "image"}, {"type": "text", "text": "What colour is it?"}]
    row = {
        "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "red"}],
        "images": [image],
    }
    (sample,) = vlm.load_messages([row])
    assert sample.turns == (("What colour is it?", "red"),)
    assert sample.images == (image,)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"question": "no marker"}, "'bad' has 0 <image> markers and 1 pictures"),
        ({"question": "<image><image>twice"}, "'bad' has 2 <image> markers and 1 pictures"),
        ({"answer": "  "}, "'bad' has an empty answer"),
        ({"question": "<image>"}, "'bad' has an empty question"),
    ],
)
def test_a_malformed_conversation_is_named(tmp_path: Path, change: dict[str, str], words: str) -> None:
    picture(tmp_path / "a.png")
    with pytest.raises(DataError, match=words):
        read(tmp_path, entry("good"), entry("bad", **change))


def test_turns_must_alternate(tmp_path: Path) -> None:
    broken = entry("bad") | {"conversations": [{"from": "gpt", "value": "red"}]}
    with pytest.raises(DataError, match=r"'bad' has the turns \['assistant'\]"):
        read(tmp_path, broken)
    with pytest.raises(DataError, match="'bad' is not in LLaVA's form"):
        read(tmp_path, {"id": "bad", "image": "a.png"})


def test_transparent_pictures_become_white(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert open_picture(tmp_path / "clear.png").getpixel((1, 1)) == (255, 255, 255)


ROWS = st.lists(
    st.tuples(st.integers(1, 9), st.lists(st.integers(1, 6), min_size=1, max_size=3)), min_size=1, max_size=6
).map(
    lambda shapes: [
        Row(
            ids=[7 + number] * (prefix + sum(parts)),
            targets=[IGNORED] * prefix + [5] * sum(parts),
            positions=[*range(prefix), *(prefix + place for part in parts for place in range(part))],
            segments=[0] * prefix + [index for index, part in enumerate(parts, 1) for _ in range(part)],
            pictures=[number],
            samples=len(parts),
        )
        for number, (prefix, parts) in enumerate(shapes)
    ]
)


@settings(max_examples=30, deadline=None)
@given(rows=ROWS)
def test_packing_keeps_every_token_and_hides_the_other_rows(rows: list[Row]) -> None:
    batch = collate(rows, pad=0)
    for number, row in enumerate(rows):
        mine = batch.owners == number
        assert batch.ids[mine].tolist() == row.ids
        assert batch.targets[mine].tolist() == row.targets
        assert batch.positions[mine].tolist() == row.positions
    assert int((batch.owners >= 0).sum()) == sum(len(row.ids) for row in rows)
    order = [picture for line in batch.owners.tolist() for picture in dict.fromkeys(line) if picture >= 0]
    assert batch.pictures == order
    seen = attention_mask(batch.segments, batch.owners, torch.float32)[:, 0] == 0
    owners, segments, positions = batch.owners, batch.segments, batch.positions
    for line in range(len(owners)):
        for place in torch.nonzero(owners[line] >= 0).flatten().tolist():
            visible = torch.nonzero(seen[line, place]).flatten()
            assert owners[line, visible].eq(owners[line, place]).all()
            assert set(segments[line, visible].tolist()) <= {0, int(segments[line, place])}
            assert sorted(positions[line, visible].tolist()) == list(range(int(positions[line, place]) + 1))


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 40), batch_size=st.integers(1, 12), seed=st.integers(0, 3))
def test_an_epoch_takes_no_row_twice(rows: int, batch_size: int, seed: int) -> None:
    data = [Row([number], [1], [0], [1], [], 1) for number in range(rows)]
    steps = rows // min(rows, batch_size)
    taken = [row.ids[0] for step in range(steps) for row in Batches(data, batch_size, str(seed)).at(step)]
    assert len(taken) == len(set(taken)) == steps * min(rows, batch_size)
    assert Batches(data, batch_size, str(seed)).at(0) == Batches(data, batch_size, str(seed)).at(0)


@settings(max_examples=50, deadline=None)
@given(pictures=st.lists(st.integers(0, 6), min_size=2, max_size=20), seed=st.integers(0, 5))
def test_nobody_is_dealt_its_own_picture(pictures: list[int], seed: int) -> None:
    images = [(f"{number}.png",) for number in pictures]
    if len(set(pictures)) == 1:
        with pytest.raises(EvaluationError, match="one picture alone"):
            deal(images, seed)
        return
    dealt = deal(images, seed)
    assert all(own != other for own, other in zip(images, dealt, strict=True))
    assert set(dealt) == set(images)
    assert dealt == deal(images, seed)


@pytest.mark.parametrize(
    ("said", "accepted", "verdict"),
    [
        ("Red.", ("red",), True),
        ("a  red apple", ("the red apple",), True),
        ("flag of France", ("flag of france", "french flag"), True),
        ("reddish", ("red",), False),
        ("", ("red",), False),
    ],
)
def test_answers_are_compared_without_case_and_articles(said: str, accepted: tuple[str, ...], verdict: bool) -> None:
    assert right(said, accepted) is verdict
    assert normalised(normalised(said)) == normalised(said)


def test_configs_name_the_field_at_fault(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="stages"):
        vlm.TuneConfig(stages=[])
    with pytest.raises(ConfigError, match=r"rank"):
        vlm.Lora(rank=0)
    with pytest.raises(ConfigError, match="an Adapt stage must be the last"):
        vlm.TuneConfig(stages=[vlm.Adapt(steps=1), vlm.Align(steps=1)])
    config = vlm.TuneConfig(stages=[vlm.Align(steps=3), vlm.Adapt(steps=4, lora=vlm.Lora(layers=("q", "v")))])
    config.to_yaml(tmp_path / "tune.yaml")
    assert vlm.TuneConfig.from_yaml(tmp_path / "tune.yaml") == config
