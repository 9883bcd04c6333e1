# SPDX-License-Identifier: Apache-2.0
"""What goes wrong around a vision-language model says what it is and what to do."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import vlm
from aced_sdk import towers
from aced_sdk.config import Engine, Student
from aced_sdk.errors import ConfigError, DataError, EngineError, EvaluationError, ModelError, UnsupportedError
from vlm.adapters import check_saved, snapshot

sys.path.insert(0, str(Path(__file__).parents[1] / "contract"))
from test_vlm import config, language, samples, student


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("parts")
    return student(folder / "student"), language(folder / "language")


@pytest.fixture
def model(folders: tuple[Path, Path]) -> Any:
    return vlm.build(vision=folders[0], language=folders[1])


def test_a_tower_that_llava_cannot_hold_names_the_two_roads(folders: tuple[Path, Path]) -> None:
    architecture = {
        "embed_dim": 16,
        "vision_cfg": {"timm_model_name": "resnet10t", "timm_pool": "avg", "timm_proj": "linear", "image_size": 32},
        "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    encoder = towers.build(Student(architecture=architecture), seed=0)
    with pytest.raises(UnsupportedError, match=r"CLIP or SigLIP ViT.*FastViT.*FastVlm.*field: vision"):
        vlm.build(vision=encoder, language=folders[1])


@pytest.mark.parametrize("files", [(), ("one.gguf", "two.gguf"), ("notes.txt",)])
def test_a_folder_that_is_no_language_model(folders: tuple[Path, Path], tmp_path: Path, files: tuple[str, ...]) -> None:
    for name in files:
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="GGUF files"):
        vlm.build(folders[0], tmp_path)


def test_a_torn_gguf_file(folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACED_HOME", str(tmp_path / "home"))
    (tmp_path / "torn.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    with pytest.raises(ModelError, match=r"cannot read torn\.gguf"):
        vlm.build(folders[0], tmp_path / "torn.gguf")
    assert not list((tmp_path / "home").rglob("aced_language.json"))


def test_a_layer_that_is_not_there(folders: tuple[Path, Path]) -> None:
    with pytest.raises(ModelError, match="2 layers, and none is number -7"):
        vlm.build(*folders, feature_layer=-7)


def test_unreadable_pictures_are_counted_up_to_the_bound(tmp_path: Path) -> None:
    entries = []
    for number in range(10):
        path = tmp_path / f"{number}.png"
        Image.effect_noise((60, 60), 50).save(path)
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "noise"}]
        entries.append({"id": str(number), "image": path.name, "conversations": turns})
    whole = (tmp_path / "3.png").read_bytes()
    (tmp_path / "3.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "data.json").write_text(json.dumps(entries))
    read = vlm.load_llava(tmp_path / "data.json", tmp_path, max_bad_fraction=0.1)
    assert (len(read), len(read.skipped)) == (9, 1)
    assert "conversation '3'" in read.skipped[0]
    (tmp_path / "4.png").unlink()
    with pytest.raises(DataError, match=r"2 of 10 conversations cannot be used.*conversation '3'"):
        vlm.load_llava(tmp_path / "data.json", tmp_path, max_bad_fraction=0.1)


def test_a_conversation_longer_than_the_model_reads(model: Any, tmp_path: Path) -> None:
    long = vlm.Sample("long one", (("what is it ? " * 60, "red"),), samples()[0].images)
    with pytest.raises(DataError, match=r"'long one' has \d+ tokens, the language model reads 128"):
        vlm.tune(*model, [long], config(), directory=tmp_path)


def test_another_config_or_other_data_do_not_go_on(model: Any, folders: tuple[Path, Path], tmp_path: Path) -> None:
    vlm.tune(*model, samples(), vlm.TuneConfig(stages=[vlm.Align(steps=1)]), directory=tmp_path)
    other = vlm.TuneConfig(stages=[vlm.Align(steps=2)])
    with pytest.raises(ConfigError, match="a tuning run with other stages"):
        vlm.tune(*model, samples(), other, directory=tmp_path)
    with pytest.raises(ConfigError, match="a tuning run with other data"):
        vlm.tune(*model, samples(1), vlm.TuneConfig(stages=[vlm.Align(steps=1)]), directory=tmp_path)


def test_known_limits_are_told_before_the_start(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sharded = config(engine=Engine(kind="deepspeed", zero_stage=3))
    with pytest.raises(UnsupportedError, match=r"field: engine\.zero_stage"):
        vlm.tune(*model, samples(), sharded, directory=tmp_path / "a")
    with monkeypatch.context() as launched:
        for name, value in (("RANK", "0"), ("WORLD_SIZE", "2")):
            launched.setenv(name, value)
        with pytest.raises(UnsupportedError, match="2 were launched"):
            vlm.tune(*model, samples(), config(), directory=tmp_path / "a")
    result = vlm.tune(*model, samples(), config(), directory=tmp_path / "b")
    with pytest.raises(UnsupportedError, match="has adapters already"):
        vlm.tune(result.model, model[1], samples(), config(), directory=tmp_path / "c")
    with pytest.raises(UnsupportedError, match=r"no metric 'meteor'.*METEOR is left out.*accuracy, vqa, captions"):
        vlm.evaluate(*model, samples(), metric="meteor")
    assert not (tmp_path / "a").exists()


def test_losses_that_stay_non_finite_stop_the_run_and_leave_the_weights(model: Any, tmp_path: Path) -> None:
    llava, _ = model
    with torch.no_grad():
        llava.lm_head.weight[5] = float("inf")
    before = llava.model.multi_modal_projector.linear_1.weight.clone()
    with pytest.raises(EngineError, match=r"4 steps in a row were not finite.*field: stages\.0\.learning_rate"):
        vlm.tune(*model, samples(), config(align=9), directory=tmp_path)
    assert torch.equal(llava.model.multi_modal_projector.linear_1.weight, before)


def test_an_artefact_that_lost_its_training_is_refused(model: Any, tmp_path: Path) -> None:
    llava, _ = model
    llava.requires_grad_(False)
    llava.model.multi_modal_projector.requires_grad_(True)
    start = snapshot(llava)
    weights = tmp_path / "weights.safetensors"
    save_file(start, weights)
    with pytest.raises(EngineError, match="the projector is as it was before training"):
        check_saved(weights, llava, start)
    with torch.no_grad():
        llava.model.multi_modal_projector.linear_1.bias += 1
    with pytest.raises(EngineError, match="not the trained one"):
        check_saved(weights, llava, start)
    save_file(snapshot(llava), weights)
    check_saved(weights, llava, start)
    emptied = load_file(weights)
    emptied["model.multi_modal_projector.linear_2.weight"] = torch.empty(0)
    save_file(emptied, weights)
    with pytest.raises(EngineError, match=r"linear_2\.weight' is not the trained one"):
        check_saved(weights, llava, start)


def test_a_torn_checkpoint_is_named(folders: tuple[Path, Path], tmp_path: Path) -> None:
    plan = vlm.TuneConfig(stages=[vlm.Align(steps=2)])
    vlm.tune(*vlm.build(*folders), samples(), plan, directory=tmp_path)
    (weights,) = tmp_path.rglob("weights.safetensors")
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(EngineError, match="cannot be read"):
        vlm.tune(*vlm.build(*folders), samples(), plan, directory=tmp_path)


def test_questions_without_pictures_cannot_be_scored(model: Any) -> None:
    with pytest.raises(EvaluationError, match="nothing to ask"):
        vlm.evaluate(*model, [])
    with pytest.raises(EvaluationError, match="one picture alone"):
        vlm.evaluate(*model, samples()[:2])
    with pytest.raises(EvaluationError, match=r"four annotators, 'red0' has 1 and 0.*field: metric"):
        vlm.evaluate(*model, samples(), metric="vqa")
    with pytest.raises(DataError, match="1 pictures and 2 questions"):
        vlm.answer(*model, samples()[0].images, ["a", "b"])


def test_saving_apart_needs_an_adapter_and_loading_a_model(model: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no adapter to keep apart"):
        vlm.save(*model, tmp_path / "m", merge=False)
    assert not (tmp_path / "m").exists()
    with pytest.raises(ModelError, match="holds no model"):
        vlm.load(tmp_path)
