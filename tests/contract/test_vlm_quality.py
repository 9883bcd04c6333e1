# SPDX-License-Identifier: Apache-2.0
"""The benchmark of captioning and VQA: one model from build to page, and what a second call does not do again."""

from __future__ import annotations

import json
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
from vlm.data import Sample

COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220)}


def asked(folder: Path, kind: str) -> tuple[Sample, ...]:
    samples = []
    for colour, value in COLOURS.items():
        path = folder / f"{kind}-{colour}.png"
        Image.new("RGB", (16, 16), value).save(path)
        samples.append(Sample(f"{kind}-{colour}", (("what is this ?", colour),), (path,), kind))
    return tuple(samples)


def test_one_model_from_build_to_page(tmp_path: Path) -> None:
    exam = Exam(*(asked(tmp_path, kind) for kind in ("train", "questions", "name", "easy")))
    seen, words = student(tmp_path / "student"), language(tmp_path / "language")
    config = tuning(1, 2, seed=0, precision="fp32", threads=1)
    first = run(seen, words, exam, config, tmp_path / "run")
    assert {part: len(first["scores"][part]["samples"]) for part in first["scores"]} == {
        "questions": 3,
        "captions": 3,
        "easy_vqa": 3,
    }
    assert 0 <= first["accuracy"] <= 1
    assert first["samples"] > 0
    with pytest.raises(ConfigError, match="measured with other config"):
        run(seen, words, exam, tuning(1, 3, seed=0, precision="fp32", threads=1), tmp_path / "run")
    events = sha256(tmp_path / "run/tuning/events.jsonl")
    assert run(seen, words, exam, config, tmp_path / "run") == json.loads(json.dumps(first))
    assert sha256(tmp_path / "run/tuning/events.jsonl") == events
    model, processor = vlm.load(tmp_path / "run/model")
    assert vlm.answer(model, processor, [exam.train[0].images[0]], ["what is this ?"])
    html = page.write(tmp_path / "page.html", "Held out", exam, first).read_text(encoding="utf-8")
    assert html.count('class="card"') == 9
    assert "what is this ?" in html


def test_easy_vqa_is_read_by_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "home_folder", lambda: tmp_path)
    folder = tmp_path / "models" / EASY_VQA.name / "easy_vqa/data/test"
    folder.mkdir(parents=True)
    questions = [
        ["what color is the shape?", "blue", 7],
        ["is there a circle?", "no", 7],
        ["what shape is it?", "circle", 8],
    ]
    (folder / "questions.json").write_text(json.dumps(questions))
    samples = easy_vqa("test")
    assert [sample.kind for sample in samples] == ["easy colour", "easy yes or no", "easy shape"]
    assert samples[2].images == (folder / "images/8.png",)
    (folder / "questions.json").write_text("torn")
    with pytest.raises(DataError, match="cannot be read"):
        easy_vqa("test")
