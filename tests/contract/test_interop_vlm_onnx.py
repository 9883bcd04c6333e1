# SPDX-License-Identifier: Apache-2.0
"""What a vision-language model sees, in onnxruntime: the graph gives transformers' own image features."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import tiny
import torch
import typer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from typer.testing import CliRunner

import export
import vlm
from aced_sdk import towers
from aced_sdk.config import Student
from aced_sdk.errors import ConfigError, ModelError, UnsupportedError
from aced_sdk.files import sha256
from export.cli import register
from export.runtime.parity import pictures


def language(folder: Path) -> Path:
    """A language model of a few words."""
    known = ["<unk>", "<|im_end|>", "<|im_start|>", "user", "assistant", "system", "a", "picture"]
    raw = Tokenizer(models.WordLevel({word: number for number, word in enumerate(known)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>"]
    )
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def build(folder: Path, student: Path, **options: Any) -> Path:
    """A saved vision-language model around a student."""
    model, processor = vlm.build(vision=student, language=language(folder / "language"), **options)
    return vlm.save(model, processor, folder / "vlm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("llava")
    return build(place, towers.save(tiny.encoder(), place / "student"))


def compare(folder: Path, target: Path) -> onnx.ModelProto:
    """The graph beside transformers alone, several batch sizes; the graph."""
    report = export.vlm_vision_to_onnx(folder, target)
    manifest = json.loads((target / "export.json").read_text())
    file = target / manifest["report"]["graphs"][0]["file"]
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    prepare = AutoImageProcessor.from_pretrained(target)  # what it needs lies beside the graph
    pixels = prepare(images=[image.convert("RGB") for image in pictures()], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        want = np.stack([feature.numpy() for feature in model.get_image_features(pixels).pooler_output])
    want = want.reshape(len(want), -1, want.shape[-1])
    session = onnxruntime.InferenceSession(str(file))
    for count in (1, 4, len(pixels)):
        (got,) = session.run([manifest["output"]], {manifest["input"]: pixels[:count].numpy()})
        assert got.shape == (count, manifest["tokens"], manifest["width"])
        np.testing.assert_allclose(got, want[:count], atol=1e-4 * np.abs(want).max())
    assert tuple(pixels.shape[2:]) == tuple(manifest["size"])
    assert manifest["report"]["graphs"][0]["max_abs"] == report.graphs[0].max_abs <= 1e-4 * report.largest
    assert manifest["files"] == {name: sha256(target / name) for name in manifest["files"]}
    assert manifest["source_weights_sha256"] == {"model.safetensors": sha256(folder / "model.safetensors")}
    return onnx.load(file)


def test_a_clip_vit(folder: Path, tmp_path: Path) -> None:
    graph = compare(folder, tmp_path / "o")
    onnx.checker.check_model(graph, full_check=True)
    (given,), (output,) = graph.graph.input, graph.graph.output
    shapes = [[dim.dim_param or dim.dim_value for dim in end.type.tensor_type.shape.dim] for end in (given, output)]
    assert (given.name, output.name) == ("pixel_values", "image_features")
    assert shapes == [["batch_size", 3, 16, 16], ["batch_size", 4, 48]]  # a token a patch, the class token left out
    assert not any(node.metadata_props or node.doc_string for node in graph.graph.node)
    assert {path.name for path in (tmp_path / "o").rglob("*.*")} == {
        "vision_encoder.onnx", "preprocessor_config.json", "export.json",
    }  # fmt: skip


def test_an_earlier_layer(folder: Path, tmp_path: Path) -> None:
    compare(build(tmp_path, folder.parent / "student", feature_layer=-2), tmp_path / "o")


def test_a_fastvit(tmp_path: Path) -> None:
    vision = {"image_size": 64, "timm_model_name": "fastvit_t8", "timm_pool": "avg", "timm_proj": None}
    student = Student(architecture=tiny.ARCHITECTURE | {"vision_cfg": vision | {"timm_model_pretrained": False}})
    compare(build(tmp_path, towers.save(towers.build(student, seed=0), tmp_path / "student")), tmp_path / "o")


def test_a_projector_that_merges_tokens(folder: Path, tmp_path: Path) -> None:
    projector = vlm.Projector(kind="pixel_shuffle", factor=2)
    compare(build(tmp_path, folder.parent / "student", projector=projector), tmp_path / "o")


def test_what_is_no_model_or_cannot_be_exported(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no vision-language model"):
        export.vlm_vision_to_onnx(folder.parent / "student", tmp_path / "o")
    with pytest.raises(ModelError, match="holds no vision-language model"):
        export.vlm_vision_to_onnx(tmp_path / "nothing", tmp_path / "o")
    with pytest.raises(ConfigError, match="opset 17 is too old"):
        export.vlm_vision_to_onnx(folder, tmp_path / "o", opset=17)
    (tmp_path / "apart/adapter").mkdir(parents=True)
    (tmp_path / "apart/adapter/adapter_config.json").write_text("{}")
    with pytest.raises(UnsupportedError, match=r"adapter apart.*merge=True"):
        export.vlm_vision_to_onnx(tmp_path / "apart", tmp_path / "o")
    assert not (tmp_path / "o").exists()
    (tmp_path / "o").mkdir()
    (tmp_path / "o/mine.txt").write_text("mine")
    with pytest.raises(export.ExportError, match="holds something else"):
        export.vlm_vision_to_onnx(folder, tmp_path / "o")
    assert (tmp_path / "o/mine.txt").read_text() == "mine"


def test_smaller_precisions(folder: Path, tmp_path: Path) -> None:
    report = export.vlm_vision_to_onnx(folder, tmp_path / "o", precisions=("fp32", "fp16", "int8"), int8_cosine=0.98)
    by_precision = {graph.precision: graph for graph in report.graphs}
    assert by_precision["fp32"].bytes > by_precision["fp16"].bytes
    assert by_precision["fp32"].bytes > by_precision["int8"].bytes
    assert by_precision["fp16"].min_cosine > 0.9999
    quantised = by_precision["int8"].quantised
    assert quantised is not None
    assert quantised.cosine >= 0.98
    pixels = np.random.default_rng(0).standard_normal((2, 3, 16, 16), np.float32)
    outs = {
        graph.precision: onnxruntime.InferenceSession(str(tmp_path / "o" / graph.file)).run(
            None, {"pixel_values": pixels}
        )[0]
        for graph in report.graphs
        if graph.precision != "fp16"  # needs the runtime's lower optimisation level
    }
    assert 0 < np.abs(outs["int8"] - outs["fp32"]).max() < 0.5 * np.abs(outs["fp32"]).max()
    with pytest.raises(export.ExportError, match="calibration"):
        export.vlm_vision_to_onnx(folder, tmp_path / "p", precisions=("int8",), calibration=[folder / "config.json"])
    with pytest.raises(ConfigError, match="precisions is"):
        export.vlm_vision_to_onnx(folder, tmp_path / "p", precisions=("int4",))  # type: ignore[arg-type]
    assert not (tmp_path / "p").exists()


def test_command(folder: Path, tmp_path: Path) -> None:
    app = typer.Typer()
    app.callback()(lambda: None)
    register(app)
    options = ["--to", "vlm-vision", "--precision", "fp32", "--precision", "fp16"]
    result = CliRunner().invoke(app, ["export", str(folder), str(tmp_path / "o"), *options])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "o/onnx/vision_encoder_fp16.onnx").is_file()
    result = CliRunner().invoke(app, ["export", "--verify", str(tmp_path / "o")])
    assert result.exit_code == 0, result.output
    assert result.output.strip() == f"{tmp_path / 'o'} is whole"
    with (tmp_path / "o/onnx/vision_encoder.onnx").open("ab") as stream:
        stream.write(b"more")
    result = CliRunner().invoke(app, ["export", "--verify", str(tmp_path / "o")])
    assert isinstance(result.exception, export.ExportError)
    assert "vision_encoder.onnx is not the file that was exported" in str(result.exception)
