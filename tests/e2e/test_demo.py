# SPDX-License-Identifier: Apache-2.0
"""The whole demo on a small slice of the real box, with the real language model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from aced_sdk.errors import ConfigError
from examples.quickstart.box import BoxConfig, build_box, fetch_models
from examples.quickstart.box.fetch import FetchError
from examples.quickstart.demo import run_demo
from examples.quickstart.settings import Settings

pytestmark = [pytest.mark.network, pytest.mark.slow, pytest.mark.timeout(900)]
METHODS = {"iid", "softmax_kd", "i_acid", "h_acid", "aced", "static", "trusted"}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Settings, dict[str, Any]]:
    try:
        build_box(BoxConfig(size="slice"))
        fetch_models()
    except FetchError as error:
        pytest.skip(f"the data box cannot be fetched: {error}")
    settings = Settings(
        directory=tmp_path_factory.mktemp("demo") / "demo",
        box="slice",
        seeds=(0, 1),
        steps=6,
        sub_batch=32,
        num_chunks=8,
        evaluate_every=3,
        reference_steps=20,
        align_steps=2,
        adapt_steps=2,
        questions=8,
    )
    return settings, run_demo(settings)


def test_summary_holds_every_figure(demo: tuple[Settings, dict[str, Any]]) -> None:
    settings, summary = demo
    assert json.loads((settings.directory / "summary.json").read_text()) == summary
    assert set(summary["methods"]) == METHODS
    drawn = settings.steps * settings.sub_batch * 5
    for name, figures in summary["methods"].items():
        assert figures["trained"] == settings.steps * settings.sub_batch
        assert figures["scored"] == (drawn if name in ("h_acid", "aced") else 0)
        assert 0 <= figures["zero_shot"] <= 1
        assert 0 <= figures["retrieval"] <= 1
        assert figures["zero_shot_deviation"] >= 0
    assert [sample["kind"] != "caption" for sample in summary["vlm"]["samples"]].count(True) == 8
    assert summary["onnx"]["max_abs_diff"] < 1e-4
    assert summary["onnx"]["zero_shot_onnx"] == pytest.approx(summary["onnx"]["zero_shot_torch"], abs=1e-6)
    assert set(summary["seconds"]) >= {"data", "reference", "distil", "vlm", "onnx"}


def test_what_it_ships_loads_with_the_other_tools_alone(demo: tuple[Settings, dict[str, Any]]) -> None:
    settings, _ = demo
    code = """
import sys, torch, open_clip
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
model, _, preprocess = open_clip.create_model_and_transforms("local-dir:" + sys.argv[1])
tokens = open_clip.get_tokenizer("local-dir:" + sys.argv[1])(["a red apple"])
model.eval()
print(tuple(model(preprocess(Image.new("RGB", (40, 30)))[None], tokens)[0].shape))
processor = AutoProcessor.from_pretrained(sys.argv[2])
vlm = AutoModelForImageTextToText.from_pretrained(sys.argv[2])
chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What colour is it?"}]}]
text = processor.apply_chat_template(chat, add_generation_prompt=True)
inputs = processor(images=[Image.new("RGB", (40, 30), "red")], text=text, return_tensors="pt")
print(vlm.generate(**inputs, max_new_tokens=2, do_sample=False).shape[0])
assert not {"aced_sdk", "vlm", "export"} & set(sys.modules)
"""
    command = [sys.executable, "-c", code, str(settings.directory / "student"), str(settings.directory / "vlm")]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")
    assert answer.returncode == 0, answer.stderr[-2000:]
    assert answer.stdout.split("\n")[:2] == ["(1, 128)", "1"]


def test_page_is_self_contained(demo: tuple[Settings, dict[str, Any]]) -> None:
    page = (demo[0].directory / "report.html").read_text(encoding="utf-8")
    for word in ("ACED", "Softmax-KD", "trusted", "licence", "ONNX"):
        assert word.lower() in page.lower()
    assert 'src="http' not in page
    assert "<script" not in page


def test_finished_work_is_kept(demo: tuple[Settings, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    settings, summary = demo

    def never(*_: object) -> None:
        raise AssertionError("a finished run was started again")

    monkeypatch.setattr("examples.quickstart.workers._Process", never)
    (settings.directory / "stages" / "distil.json").unlink()
    again = run_demo(settings)
    assert again["methods"] == summary["methods"]


def test_other_settings_are_refused(demo: tuple[Settings, dict[str, Any]]) -> None:
    with pytest.raises(ConfigError, match="other settings"):
        run_demo(demo[0].replace(steps=9))


def test_settings_file_is_in_the_folder(demo: tuple[Settings, dict[str, Any]]) -> None:
    path: Path = demo[0].directory / "settings.yaml"
    assert Settings.from_yaml(path) == demo[0]
