# SPDX-License-Identifier: Apache-2.0
"""The export of a student: what torch embeds, ONNX and transformers embed too."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

import export
from aced_sdk import towers
from aced_sdk.config import Student
from aced_sdk.errors import UnsupportedError
from export.cli import register
from export.runtime.parity import TEXTS, pictures

ARCHITECTURE = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 32},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}


def save_student(folder: Path, resize: str = "squash", **changes: object) -> Path:
    student = Student(architecture=ARCHITECTURE | changes, resize=resize)
    return towers.save(towers.build(student, seed=0), folder, license="Apache-2.0")


@pytest.fixture(scope="module")
def student_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_student(tmp_path_factory.mktemp("student") / "s")


@pytest.fixture(scope="module")
def exported(student_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, export.ExportReport]:
    folder = tmp_path_factory.mktemp("onnx") / "o"
    root = logging.getLogger()
    kept = root.handlers[:]
    root.handlers.clear()  # as in a program that has not configured logging
    report = export.to_onnx(student_folder, folder, texts=["a text of the user"], int8_cosine=0.99)
    assert root.handlers == []
    root.handlers.extend(kept)
    return folder, report


def test_report_covers_every_graph(exported: tuple[Path, export.ExportReport]) -> None:
    folder, report = exported
    assert [(graph.part, graph.precision) for graph in report.graphs] == [
        (part, precision) for part in ("vision", "text") for precision in ("fp32", "fp16", "int8")
    ]
    for graph in report.graphs:
        assert graph.max_abs <= (1e-5 if graph.precision == "fp32" else 0.1)
        assert graph.min_cosine > 0.99
        assert set(graph.latency_ms) == {1, 32}
        assert min(graph.latency_ms.values()) > 0
    assert report.threads == torch.get_num_threads()
    assert set(report.torch_latency_ms) == {"vision", "text"}
    assert (report.pictures, report.texts) == (len(pictures()), len(TEXTS) + 1)
    sizes = {(graph.part, graph.precision): graph.bytes for graph in report.graphs}
    assert sizes["vision", "fp16"] < 0.7 * sizes["vision", "fp32"]
    assert sizes["text", "int8"] < 0.3 * sizes["text", "fp32"]
    assert export.verify(folder) == report


def test_files_and_names(exported: tuple[Path, export.ExportReport], student_folder: Path) -> None:
    folder, _ = exported
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    graphs = {f"onnx/{part}_model{suffix}.onnx" for part in ("vision", "text") for suffix in ("", "_fp16", "_int8")}
    graphs |= {f"onnx/{part}_model_quantized.onnx" for part in ("vision", "text")}
    assert names == graphs | {
        "config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "torch_embeddings.npz",
        "export.json", "README.md",
    }  # fmt: skip
    manifest = export.Manifest(**json.loads((folder / "export.json").read_text()))
    assert manifest.source.weights_sha256 == towers.read_manifest(student_folder).weights_sha256
    assert manifest.source.license == "Apache-2.0"
    assert set(manifest.files) == names - {"export.json"}
    assert manifest.text is not None
    assert (manifest.text.context_length, manifest.text.pad_id) == (16, 0)
    ends = {
        "vision": (["batch_size", 3, 32, 32], "image_embeds", ["batch_size", 32]),
        "text": (["text_batch_size", "sequence_length"], "text_embeds", ["text_batch_size", 32]),
    }
    for graph in manifest.graphs:
        model = onnx.load(folder / graph.file)
        onnx.checker.check_model(model, full_check=True)
        (given,), (output,) = model.graph.input, model.graph.output
        shapes = [[dim.dim_param or dim.dim_value for dim in end.type.tensor_type.shape.dim] for end in (given, output)]
        assert (shapes[0], output.name, shapes[1]) == ends[graph.part]
        assert (given.name,) == graph.inputs == {"vision": ("pixel_values",), "text": ("input_ids",)}[graph.part]
        assert [entry.version for entry in model.opset_import if entry.domain == ""] == [manifest.opset]
        properties = {prop.key: prop.value for prop in model.metadata_props}
        assert properties["source_weights_sha256"] == manifest.source.weights_sha256
        assert not any(node.metadata_props or node.doc_string for node in model.graph.node)


def test_plain_onnxruntime_loads_every_graph(exported: tuple[Path, export.ExportReport]) -> None:
    folder, _ = exported
    pixels = np.zeros((3, 3, 32, 32), np.float32)
    for suffix in ("", "_fp16", "_int8"):
        session = onnxruntime.InferenceSession(str(folder / f"onnx/vision_model{suffix}.onnx"))
        (embeds,) = session.run(["image_embeds"], {"pixel_values": pixels})
        assert embeds.shape == (3, 32)
        assert embeds.dtype == np.float32


def test_embeddings_equal_torch(exported: tuple[Path, export.ExportReport], student_folder: Path) -> None:
    folder, _ = exported
    student, encoder = towers.load(student_folder), export.OnnxEncoder(folder)
    images = [Image.effect_noise((40 + 9 * n, 90 - 7 * n), 80).convert("RGB") for n in range(7)]
    want = student.encode_image(images).numpy()
    np.testing.assert_allclose(encoder.encode_image(images, batch_size=3), want, atol=1e-5)
    np.testing.assert_allclose(encoder.encode_text(TEXTS), student.encode_text(TEXTS).numpy(), atol=1e-5)
    with torch.no_grad():  # the graph's own output is not normalised, as with transformers' image_embeds
        raw = student.model.encode_image(torch.stack([student.preprocess(image) for image in images])).numpy()
    np.testing.assert_allclose(encoder.run("vision", encoder.preprocess(images)), raw, rtol=1e-3, atol=1e-4)
    assert np.abs(np.linalg.norm(raw, axis=1) - 1).min() > 1e-3
    assert (encoder.scale, encoder.bias) == pytest.approx((student.scale, student.bias))
    assert encoder.embedding_dim == student.embedding_dim


def test_zero_shot_equals_torch(exported: tuple[Path, export.ExportReport], student_folder: Path) -> None:
    folder, _ = exported
    student, encoder = towers.load(student_folder), export.OnnxEncoder(folder)
    images, classes = pictures(), ["cat", "red apple", "steam engine"]
    templates = ["a photo of a {}.", "a drawing of a {}"]
    texts = torch.stack([student.encode_text([t.format(name) for t in templates]).mean(0) for name in classes])
    cosines = student.encode_image(images) @ torch.nn.functional.normalize(texts, dim=-1).T
    got = encoder.zero_shot(images, classes, templates)
    np.testing.assert_allclose(got, (student.scale * cosines + student.bias).numpy(), atol=1e-3)
    assert (got.argmax(1) == cosines.argmax(1).numpy()).all()


def test_verify_against_the_student(
    exported: tuple[Path, export.ExportReport], student_folder: Path, tmp_path: Path
) -> None:
    folder, report = exported
    fresh = export.verify(folder, student_folder)
    assert [graph.max_abs <= 1e-5 for graph in fresh.graphs if graph.precision == "fp32"] == [True, True]
    assert len(fresh.graphs) == len(report.graphs)
    other = save_student(tmp_path / "other", init_logit_scale=1.0, embed_dim=16)
    with pytest.raises(export.ExportError, match="was not made from"):
        export.verify(folder, other)


def test_verify_without_torch(exported: tuple[Path, export.ExportReport]) -> None:
    folder, report = exported
    found = export.verify_folder(folder)
    assert [(one.part, one.precision) for one in found] == [(one.part, one.precision) for one in report.graphs]
    for one, graph in zip(found, report.graphs, strict=True):
        assert (one.reported_max_abs, one.reported_min_cosine) == (graph.max_abs, graph.min_cosine)
        assert one.max_abs <= max(1.5 * graph.max_abs, 1e-5)
        assert one.min_cosine >= graph.min_cosine - 1e-3


def test_vision_alone_with_another_geometry(tmp_path: Path) -> None:
    student_folder = save_student(tmp_path / "s", "longest")
    report = export.to_onnx(student_folder, tmp_path / "o", parts=("vision",), precisions=("fp32",), measure=False)
    assert [graph.part for graph in report.graphs] == ["vision"]
    assert report.torch_latency_ms == {}
    encoder, student = export.OnnxEncoder(tmp_path / "o"), towers.load(student_folder)
    wide = Image.effect_noise((300, 21), 90).convert("RGB")
    np.testing.assert_array_equal(encoder.preprocess([wide])[0], student.preprocess(wide).numpy())
    with pytest.raises(export.FolderError, match="no text graph"):
        encoder.encode_text(["a"])


def test_text_alone_with_a_hugging_face_tokenizer(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "a", "red", "apple", "Apple", "photo"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(tmp_path / "tok")
    text = ARCHITECTURE["text_cfg"] | {"vocab_size": len(words), "hf_tokenizer_name": str(tmp_path / "tok")}
    student_folder = save_student(tmp_path / "s", text_cfg=text | {"tokenizer_kwargs": {"clean": "canonicalize"}})
    export.to_onnx(student_folder, tmp_path / "o", parts=("text",), precisions=("fp32",), measure=False)
    encoder = export.OnnxEncoder(tmp_path / "o")
    assert encoder.tokenize(["A red_Apple, photo!"]).tolist() == [[2, 3, 4, 6, *[0] * 12]]
    want = towers.load(student_folder).encode_text(["A red_Apple, photo!"]).numpy()
    np.testing.assert_allclose(encoder.encode_text("A red_Apple, photo!"), want, atol=1e-5)


def test_transformers_folder(student_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoProcessor, CLIPModel

    report = export.to_transformers(student_folder, tmp_path / "t")
    assert max(report.image_max_abs, report.text_max_abs) <= 1e-5
    assert report.pixels_max_abs_pil == 0
    student = towers.load(student_folder)
    model = CLIPModel.from_pretrained(tmp_path / "t").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "t", backend="pil")
    images = [image for image in pictures() if image.mode == "RGB"]
    texts = ["a cat", "it's 12 o'clock!", "long " * 40]
    inputs = processor(text=texts, images=images, return_tensors="pt", padding="max_length", truncation=True)
    with torch.no_grad():
        out = model(**inputs)
    torch.testing.assert_close(out.image_embeds, student.encode_image(images), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.text_embeds, student.encode_text(texts), atol=1e-5, rtol=0)
    assert float(model.logit_scale.exp().detach()) == pytest.approx(student.scale)
    assert json.loads((tmp_path / "t" / "config.json").read_text())["aced_logit_bias"] == pytest.approx(student.bias)
    assert "aced_logit_bias" in (tmp_path / "t" / "README.md").read_text()


def test_transformers_refuses_other_towers(tmp_path: Path) -> None:
    text = ARCHITECTURE["text_cfg"] | {"no_causal_mask": True}
    student_folder = save_student(tmp_path / "s", custom_text=True, text_cfg=text)
    with pytest.raises(UnsupportedError, match=r"plain CLIP ViT.*export\.to_onnx"):
        export.to_transformers(student_folder, tmp_path / "t")
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--to", "timm", "--precision", "int8"], "--precision means nothing with --to timm"),
        (["--to", "transformers", "--opset", "18", "--no-measure"], "--measure, --opset means nothing with --to trans"),
        (["--to", "transformers", "--part", "text"], "--part is vision or both with --to transformers"),
        (["--to", "vlm-vision", "--onnx", "o"], "--onnx means nothing with --to vlm-vision"),
        (["--onnx", "o"], "--onnx means nothing with --to onnx"),
        (["--verify", "o"], "--directory means nothing with --verify"),
    ],
)
def test_options_of_another_layout_are_refused(
    student_folder: Path, tmp_path: Path, options: list[str], words: str
) -> None:
    app = typer.Typer()
    app.callback()(lambda: None)
    register(app)
    called = ["export", str(student_folder), str(tmp_path / "o"), *options]
    result = CliRunner().invoke(app, called, env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert words in " ".join(result.output.split())
    assert not (tmp_path / "o").exists()


def test_command(student_folder: Path, tmp_path: Path) -> None:
    app = typer.Typer()
    app.callback()(lambda: None)
    register(app)
    (tmp_path / "pictures").mkdir()
    pictures()[0].save(tmp_path / "pictures" / "a.png")
    options = ["--part", "vision", "--precision", "int8", "--no-measure", "--int8-cosine", "0.99"]
    (tmp_path / "texts.txt").write_text("one text\nanother")
    options += ["--calibration", str(tmp_path / "pictures"), "--pictures", str(tmp_path / "pictures")]
    options += ["--texts", str(tmp_path / "texts.txt")]
    result = CliRunner().invoke(app, ["export", str(student_folder), str(tmp_path / "o"), *options])
    assert result.exit_code == 0, result.output
    assert "vision int8: dynamic, " in result.output
    names = sorted(path.name for path in (tmp_path / "o" / "onnx").iterdir())
    assert names == ["vision_model_int8.onnx", "vision_model_quantized.onnx"]
    for words in (["--verify", str(tmp_path / "o")], [str(student_folder), "--verify", str(tmp_path / "o")]):
        result = CliRunner().invoke(app, ["export", *words])
        assert result.exit_code == 0, result.output
        assert "agrees with its student" in result.output
    report = export.verify(tmp_path / "o")
    assert (report.pictures, report.texts) == (len(pictures()) + 1, len(TEXTS) + 2)
    options = ["--to", "transformers", "--part", "vision", "--onnx", str(tmp_path / "o")]
    result = CliRunner().invoke(app, ["export", str(student_folder), str(tmp_path / "t"), *options])
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "t/config.json").read_text())["architectures"] == ["CLIPVisionModelWithProjection"]
    assert (tmp_path / "t/onnx/vision_model_int8.onnx").is_file()
    assert CliRunner().invoke(app, ["export", str(student_folder)]).exit_code == 2
    (tmp_path / "o" / "README.md").write_text("altered")
    result = CliRunner().invoke(app, ["export", "--verify", str(tmp_path / "o")])
    assert isinstance(result.exception, export.FolderError)
