# SPDX-License-Identifier: Apache-2.0
"""Vision-language models of an attacker, and altered exports of honest ones."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import export
from aced_sdk.errors import AcedError
from export.onnx.vlm_vision import check_vlm_vision
from tests.security.exports import command
from tests.security.sandbox import canary, run


def vlm_config() -> dict[str, Any]:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = CLIPVisionConfig(image_size=16, patch_size=8, **sizes)
    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(vocab_size=8, **sizes), image_token_index=7)
    return dict(config.to_dict())


@pytest.fixture(scope="module")
def made_vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA model of transformers, of one layer each."""
    from transformers import CLIPImageProcessor, LlavaConfig, LlavaForConditionalGeneration

    place = tmp_path_factory.mktemp("llava") / "vlm"
    LlavaForConditionalGeneration(LlavaConfig(**vlm_config())).save_pretrained(place)
    size = {"height": 16, "width": 16}
    CLIPImageProcessor(size=size, crop_size=size).save_pretrained(place)
    return place


def change(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def export_vlm(folder: str, target: str) -> None:
    """As a user would who answers yes to whatever is asked."""
    import sys

    sys.stdin = io.StringIO("y\n" * 10)
    export.vlm_vision_to_onnx(folder, target)


def code(vlm: Path, tmp_path: Path) -> None:
    _, source = canary(tmp_path)
    for name in ("modeling_own.py", "processing_own.py"):
        (vlm / name).write_text(source + "class Own: pass\n")
    auto = {"AutoModelForImageTextToText": "modeling_own.Own", "AutoConfig": "modeling_own.Own"}
    change(vlm / "config.json", model_type="own", auto_map=auto)
    change(
        vlm / "preprocessor_config.json",
        auto_map={"AutoImageProcessor": "processing_own.Own"},
        image_processor_type="Own",
    )


def code_of_the_processor(vlm: Path, tmp_path: Path) -> None:
    code(vlm, tmp_path)
    change(vlm / "config.json", model_type="llava", auto_map=None)


def pickled(vlm: Path, tmp_path: Path) -> None:
    import torch

    class Runs:
        def __reduce__(self) -> tuple[Any, ...]:
            return exec, (canary(tmp_path)[1],)

    (vlm / "model.safetensors").unlink()
    torch.save({"a": Runs()}, vlm / "pytorch_model.bin")


def indexed(vlm: Path, tmp_path: Path) -> None:
    shutil.move(vlm / "model.safetensors", tmp_path / "outside.safetensors")
    from safetensors import safe_open

    with safe_open(tmp_path / "outside.safetensors", framework="pt") as file:
        names = dict.fromkeys(file.keys(), "../outside.safetensors")
    (vlm / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def linked(vlm: Path, tmp_path: Path) -> None:
    shutil.move(vlm / "model.safetensors", tmp_path / "outside.safetensors")
    (vlm / "model.safetensors").symlink_to(tmp_path / "outside.safetensors")


VLMS: dict[str, Callable[[Path, Path], object]] = {
    "code": code,
    "code of the processor": code_of_the_processor,
    "a pickle": pickled,
    "an index": indexed,
    "a link": linked,
    "a pipe": lambda vlm, _: ((vlm / "config.json").unlink(), os.mkfifo(vlm / "config.json")),
    "layers": lambda vlm, _: change(vlm / "config.json", vision_config={"num_hidden_layers": 10**9}),
    "pictures": lambda vlm, _: change(vlm / "preprocessor_config.json", size={"height": 10**6, "width": 10**6}),
    "a feature layer of nobody": lambda vlm, _: change(vlm / "config.json", vision_feature_layer=99),
    "no object": lambda vlm, _: (vlm / "preprocessor_config.json").write_text("[]"),
    "depth": lambda vlm, _: (vlm / "config.json").write_text('{"a":' * 5000 + "1" + "}" * 5000),
}  # fmt: skip


@pytest.mark.parametrize("name", VLMS)
def test_vision_language_models(made_vlm: Path, tmp_path: Path, name: str) -> None:
    vlm = Path(shutil.copytree(made_vlm, tmp_path / "vlm"))
    VLMS[name](vlm, tmp_path)
    outcome = run(export_vlm, str(vlm), str(tmp_path / "out"), seconds=60, mib=4000)
    assert outcome.refused("ModelError")
    assert not canary(tmp_path)[0].exists()
    assert not (tmp_path / "out").exists()


def test_altered_exports_of_vision_language_models(made_vlm: Path, tmp_path: Path) -> None:
    export.vlm_vision_to_onnx(made_vlm, tmp_path / "o")
    manifest = tmp_path / "o/export.json"
    whole = manifest.read_text()
    values = json.loads(whole)
    for altered in (
        values | {"tokens": 9},
        {key: value for key, value in values.items() if key != "digest"},
        values | {"self": 1},
        [values],
    ):
        manifest.write_text(json.dumps(altered))
        assert isinstance(command("--verify", str(tmp_path / "o")), AcedError), altered
    manifest.write_text(whole)
    (tmp_path / "o/onnx/vision_encoder.onnx").unlink()
    (tmp_path / "o/onnx/vision_encoder.onnx").symlink_to("/dev/zero")
    assert run(check_vlm_vision, str(tmp_path / "o"), seconds=10).refused("ExportError", "leads out of the folder")
