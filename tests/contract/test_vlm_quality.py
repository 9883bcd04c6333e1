# SPDX-License-Identifier: Apache-2.0
"""The benchmark of captioning and VQA: one model from build to page, and what a second call does not do again."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

import vlm
from aced_sdk.errors import ConfigError, DataError
from aced_sdk.files import sha256
from benchmarks.vlm_quality import data, page
from benchmarks.vlm_quality.data import EASY_VQA, Exam, easy_vqa
from benchmarks.vlm_quality.run import run, tuning
from tests.contract.test_vlm import language, student
from vlm.data.samples import Sample

COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220)}


def asked(folder: Path, kind: str) -> tuple[Sample, ...]:
    samples = []
    for colour, value in COLOURS.items():
        path = folder / f"{kind}-{colour}.png"
        Image.new("RGB", (16, 16), value).save(path)
        samples.append(Sample(f"{kind}-{colour}", (("what is this ?", colour),), (path,), kind))
    return tuple(samples)


def tiny_tuning(steps: int) -> vlm.TuneConfig:
    return tuning(1, steps, batch_size=16, conversations_per_row=4, seed=0, precision="fp32", threads=1)


def test_one_model_from_build_to_page(tmp_path: Path) -> None:
    exam = Exam(*(asked(tmp_path, kind) for kind in ("train", "questions", "name", "easy")))
    seen, words = student(tmp_path / "student"), language(tmp_path / "language")
    config = tiny_tuning(2)
    first = run(seen, words, exam, config, tmp_path / "run")
    assert {part: len(first["scores"][part]["samples"]) for part in first["scores"]} == {
        "questions": 3,
        "captions": 3,
        "easy_vqa": 3,
    }
    assert 0 <= first["accuracy"] <= 1
    assert first["samples"] > 0
    with pytest.raises(ConfigError, match="measured with other config"):
        run(seen, words, exam, tiny_tuning(3), tmp_path / "run")
    events = sha256(tmp_path / "run/tuning/events.jsonl")
    assert run(seen, words, exam, config, tmp_path / "run") == json.loads(json.dumps(first))
    assert sha256(tmp_path / "run/tuning/events.jsonl") == events
    model, processor = vlm.load(tmp_path / "run/model")
    assert vlm.answer(model, processor, [exam.train[0].images[0]], ["what is this ?"])
    html = page.write(tmp_path / "page.html", "Held out", exam, first).read_text(encoding="utf-8")
    assert html.count('class="card"') == 9
    assert "what is this ?" in html


def test_held_out_pictures_are_captioned_in_the_words_of_the_answers(tmp_path: Path) -> None:
    shards = tmp_path / "unseen_style_x/test"
    shards.mkdir(parents=True)
    (shards.parent / "classnames.txt").write_text("Zebra\nflag: France\n")
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "a.cls").write_text("1")
    with tarfile.open(shards / "0.tar", "w") as tar:
        for name in ("a.png", "a.cls"):
            tar.add(tmp_path / name, name)
    (sample,) = data.labelled(shards.parent, tmp_path / "pictures")
    assert sample.turns == (("What is this?", "flag of france"),)
    assert sample.images[0].read_bytes() == (tmp_path / "a.png").read_bytes()


def test_easy_vqa_is_read_by_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "home_folder", lambda: tmp_path)
    folder = tmp_path / "models" / EASY_VQA.name / "easy_vqa/data/test"
    folder.mkdir(parents=True)
    questions = [
        ["what color is the shape?", "blue", 7],
        ["is there a circle?", "no", 7],
        ["what shape is it?", "circle", 8],
        ["what is the color of the circle?", "red", 8],
    ]
    (folder / "questions.json").write_text(json.dumps(questions))
    samples = easy_vqa("test")
    assert [sample.kind for sample in samples] == ["easy colour", "easy yes or no", "easy shape", "easy colour"]
    assert samples[2].images == (folder / "images/8.png",)
    (folder / "questions.json").write_text("torn")
    with pytest.raises(DataError, match="cannot be read"):
        easy_vqa("test")
