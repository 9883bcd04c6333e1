# SPDX-License-Identifier: Apache-2.0
"""What goes wrong with exports is said: which file, which input, which option."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from PIL import Image

import export
from aced_sdk import towers
from aced_sdk.config import Student
from aced_sdk.errors import ConfigError, ModelError, UnsupportedError
from export.onnx import check, graphs
from export.runtime import parity
from export.runtime.manifest import manifest_digest
from export.runtime.pictures import Geometry, prepare


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    architecture = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "patch_size": 8, "head_width": 16},
        "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
    }
    return towers.save(towers.build(Student(architecture=architecture), seed=0), tmp_path_factory.mktemp("s") / "s")


@pytest.fixture(scope="module")
def pristine(student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("o") / "o"
    export.to_onnx(student, folder, precisions=("fp32",), measure=False)
    return folder


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "copy"))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "name", ["onnx/vision_model.onnx", "onnx/text_model.onnx", "tokenizer.json", "preprocessor_config.json"]
)
@pytest.mark.parametrize("harm", [flip, Path.unlink], ids=["flipped", "missing"])
def test_altered_files_are_refused(folder: Path, name: str, harm: Callable[[Path], None]) -> None:
    harm(folder / name)
    with pytest.raises(export.FolderError, match=name):
        export.OnnxEncoder(folder)
    with pytest.raises(export.ExportError, match=name):
        export.verify(folder)


def test_check_may_be_left_out(folder: Path) -> None:
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + "\n")
    assert export.OnnxEncoder(folder, check=False).encode_text(["a"]).shape == (1, 8)


@pytest.mark.parametrize("name", ["onnx/vision_model.onnx", "tokenizer.json", "preprocessor_config.json"])
def test_garbage_is_named_even_unchecked(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"{garbage")
    with pytest.raises(export.FolderError, match=name):
        export.OnnxEncoder(folder, check=False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[]", "not an export of format 3"),
        ("[" * 100_000, "nested too deeply"),
        ('{"kind": "onnx_dual_encoder", "format": 2}', "not an export of format 3"),
        ('{"kind": "onnx_dual_encoder", "format": 3}', "lacks bias"),
    ],
)
def test_bad_manifests(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "export.json").write_text(content)
    with pytest.raises(export.FolderError, match=message):
        export.OnnxEncoder(tmp_path)


def test_an_altered_manifest_is_refused(folder: Path) -> None:
    manifest = json.loads((folder / "export.json").read_text())
    (folder / "export.json").write_text(json.dumps(manifest | {"scale": 1.0}))
    for opens in (export.OnnxEncoder, export.verify_folder):
        with pytest.raises(export.FolderError, match="was altered after the export"):
            opens(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"graphs": [{"part": "vision"}]}, "is no manifest"),
        ({"graphs": 3}, "is no manifest"),
        ({"files": ["a"]}, "is no manifest"),
        ({"scale": "much"}, "is no manifest"),
        ({"text": "lower"}, "is no manifest"),
        ({"source": None}, "is no manifest"),
        ({"files": {"../../secret": ""}, "report": None}, "outside of its folder"),
        ({"files": {"/dev/zero": ""}, "report": None}, "outside of its folder"),
        ({"files": {"a\0b": ""}, "graphs": [], "report": None}, "outside of its folder"),
    ],
)
def test_hostile_manifests(folder: Path, changes: dict[str, Any], message: str) -> None:
    write_manifest(folder, json.loads((folder / "export.json").read_text()) | changes)
    with pytest.raises(export.FolderError, match=message):
        export.OnnxEncoder(folder)
    with pytest.raises(export.FolderError):
        export.verify_folder(folder)


def test_no_export_there(tmp_path: Path) -> None:
    with pytest.raises(export.FolderError, match=r"export\.to_onnx"):
        export.OnnxEncoder(tmp_path / "nothing")


def test_unknown_options(pristine: Path) -> None:
    with pytest.raises(export.FolderError, match=r"precision 'int4'.*fp32.*\[field: precision\]"):
        export.OnnxEncoder(pristine, "int4")
    with pytest.raises(export.InputError, match=r"provider 'NoSuchProvider'.*CPUExecutionProvider"):
        export.OnnxEncoder(pristine, providers=["NoSuchProvider"])
    with pytest.raises(export.InputError, match="threads is 0"):
        export.OnnxEncoder(pristine, threads=0)
    with pytest.raises(export.InputError, match="threads is 100000"):
        export.OnnxEncoder(pristine, threads=100_000)
    with pytest.raises(export.FolderError, match=r"no audio graph.*vision, text \[field: parts\]"):
        export.OnnxEncoder(pristine, parts=("audio",))
    for name in ("max_pixels", "max_batch", "max_characters"):
        with pytest.raises(export.InputError, match=f"{name} is 0"):
            export.OnnxEncoder(pristine, **{name: 0})  # type: ignore[arg-type]
    encoder = export.OnnxEncoder(pristine)
    with pytest.raises(export.InputError, match="batch_size is 0"):
        encoder.encode_text(["a"], batch_size=0)
    with pytest.raises(export.InputError, match=r"neither \{\} nor \{c\}"):
        encoder.zero_shot([Image.new("RGB", (4, 4))], ["cat"], ["a photo"])
    with pytest.raises(export.InputError, match="no class"):
        encoder.zero_shot([Image.new("RGB", (4, 4))], [])


def test_bad_inputs_are_named(pristine: Path, tmp_path: Path) -> None:
    encoder = export.OnnxEncoder(pristine, max_pixels=10_000)
    good = Image.new("RGB", (20, 20))
    stream = io.BytesIO()
    Image.effect_noise((90, 90), 50).save(stream, "PNG")
    postscript = io.BytesIO()
    good.save(postscript, "EPS")
    cut = tmp_path / "cut.png"
    cut.write_bytes(stream.getvalue()[:400])
    for bad, message in (
        (cut, r"images\[3\] .*cut\.png.* cannot be decoded"),
        (tmp_path / "absent.png", r"images\[3\] .*absent\.png"),
        (b"no picture", r"images\[3\] cannot be decoded"),
        (Image.new("RGB", (200, 51)), r"images\[3\] cannot be decoded: too many pixels: 200 x 51, the bound is 10,000"),
        (np.zeros((4, 4, 3), np.float32), r"images\[3\] is an array of float32"),
        (np.zeros((0, 4, 3), np.uint8), r"images\[3\]"),
        (None, r"images\[3\] is a NoneType"),
        (Image.new("F", (4, 4)), r"images\[3\] of mode F .* 32 bits"),
        (postscript.getvalue(), r"images\[3\] cannot be decoded: unreadable picture: not a whole JPEG, PNG"),
    ):
        with pytest.raises(export.InputError, match=message) as caught:
            encoder.encode_image([good, good, good, bad], batch_size=2)  # type: ignore[list-item]
        assert "Remedy: " in str(caught.value)
    with pytest.raises(export.InputError, match=r"texts\[5\] is a int"):
        encoder.encode_text(["a"] * 5 + [3], batch_size=2)  # type: ignore[list-item]
    with pytest.raises(export.InputError, match=r"texts\[1\] has 10001 characters, the bound is 10000"):
        encoder.encode_text(["a", "b" * 10_001])
    with pytest.raises(export.EncoderError, match="onnxruntime cannot run the vision graph"):
        encoder.run("vision", np.zeros((1, 3, 5, 5), np.float32))
    assert encoder.encode_image([good]).shape == (1, 8)
    assert encoder.encode_image(good for _ in range(3)).shape == (3, 8)
    assert encoder.preprocess([]).shape == (0, 3, 16, 16)
    assert encoder.tokenize([]).shape == (0, 8)
    for names in ("cat", [1]):
        with pytest.raises(export.InputError, match="classnames is no list of strings"):
            export.ZeroShot(encoder, names)  # type: ignore[arg-type]


def test_a_strip_does_not_grow_without_bound() -> None:
    """A picture within `max_pixels` whose short side has to grow to the tower's would take gigabytes."""
    strip = Image.new("RGB", (300_000, 1))
    geometry = Geometry(224, 224, (0.5,) * 3, (0.5,) * 3, 3, "shortest", 0)
    with pytest.raises(export.InputError, match=r"images\[0\] cannot be decoded: too long and thin: 300000 x 1"):
        prepare(strip, "images[0]", geometry, 1_000_000)
    assert prepare(strip.resize((3000, 200)), "images[0]", geometry, 1_000_000).shape == (224, 224, 3)
    padded = dataclasses.replace(geometry, resize_mode="longest")
    with pytest.raises(export.InputError, match=r"too long and thin: 300000 x 1"):
        prepare(strip, "images[0]", padded, 1_000_000)
    with pytest.raises(export.InputError, match=r"images\[0\] is too long and thin: 10000 x 50"):
        prepare(Image.new("RGB", (10_000, 50)), "images[0]", geometry, 1_000_000)
    assert prepare(Image.new("RGB", (10_000, 50)), "images[0]", padded, 1_000_000).shape == (224, 224, 3)


def test_errors_survive_pickling() -> None:
    error = pickle.loads(pickle.dumps(export.InputError("a cause", remedy="a remedy", field="images[0]")))  # noqa: S301
    assert isinstance(error, export.InputError)
    assert str(error) == "a cause. Remedy: a remedy [field: images[0]]"


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"parts": ("audio",)}, "parts"),
        ({"parts": ()}, "parts"),
        ({"parts": "vision"}, "parts"),
        ({"precisions": ("fp32", "fp32")}, "precisions"),
        ({"precisions": ("int4",)}, "precisions"),
        ({"opset": 17}, "opset"),
        ({"min_cosine": 1.5}, "min_cosine"),
        ({"int8_cosine": 0.0}, "int8_cosine"),
        ({"max_zero_shot_drop": -0.1}, "max_zero_shot_drop"),
    ],
)
def test_bad_arguments(student: Path, tmp_path: Path, arguments: dict[str, object], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        export.to_onnx(student, tmp_path / "o", **arguments)  # type: ignore[arg-type]
    assert caught.value.field == field


def test_half_precision_needs_a_newer_opset(student: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="fp16 needs opset 20, not 18"):
        export.to_onnx(student, tmp_path / "o", opset=18)


def test_places_that_cannot_be_used(student: Path, tmp_path: Path) -> None:
    (tmp_path / "diary.txt").write_text("mine")
    for verb in (export.to_onnx, export.to_transformers):
        with pytest.raises(export.ExportError, match="something else"):
            verb(student, tmp_path)
        with pytest.raises(ModelError, match="no model folder"):
            verb(tmp_path, tmp_path / "o")
        with pytest.raises(UnsupportedError, match="lies on a hub"):
            verb("hf-hub:someone/something", tmp_path / "o")
    with pytest.raises(export.ExportError, match=r"pictures\[0\].*diary\.txt"):
        export.to_onnx(student, tmp_path / "o", pictures=[tmp_path / "diary.txt"])
    assert (tmp_path / "diary.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["diary.txt"]


def test_bad_graphs_leave_the_older_export(student: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (folder / "export.json").read_bytes()
    exact = onnx.load(folder / "onnx/vision_model.onnx")
    monkeypatch.setattr("export.onnx.folder.float32_graph", lambda *_: exact)
    with pytest.raises(export.ExportError, match="int8 vision graph has a cosine of") as caught:
        export.to_onnx(student, folder, parts=("vision",), precisions=("int8",), min_cosine=1.0, measure=False)
    assert caught.value.field == "min_cosine"
    weights = next(tensor for tensor in exact.graph.initializer if len(tensor.dims) == 2)
    weights.raw_data = bytes(len(weights.raw_data))
    with pytest.raises(export.ExportError, match="float32 vision graph differs from torch"):
        export.to_onnx(student, folder, parts=("vision",), precisions=("fp32",), measure=False)
    assert (folder / "export.json").read_bytes() == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert export.verify(folder).graphs


def test_a_full_disk_and_a_closed_folder_are_said(
    student: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(export.ExportError, match=r"cannot be written to .*\[field: directory\]"):
        export.to_timm(student, folder / "export.json/below")
    for writer in ("onnx.save_model", "export.folders.to_timm.save_tensors", "transformers.CLIPModel.save_pretrained"):
        monkeypatch.setattr(writer, full)
    for verb in (export.to_onnx, export.to_timm, export.to_transformers):
        target = folder if verb is export.to_onnx else tmp_path / "new"
        with pytest.raises(export.ExportError, match=r"cannot be written to .* No space left"):
            verb(student, target)
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    assert export.verify(folder).graphs


def test_a_graph_that_trains_is_refused(pristine: Path) -> None:
    model = onnx.load(pristine / "onnx/vision_model.onnx")
    graphs.check_inference(model, "vision")
    output = model.graph.output[0].name
    last = next(node for node in model.graph.node if output in node.output)
    last.output[list(last.output).index(output)] = "before"
    model.graph.node.append(onnx.helper.make_node("Dropout", ["before"], [output]))
    with pytest.raises(export.ExportError, match="still trains: it has a Dropout"):
        graphs.check_inference(model, "vision")


def test_unequal_inputs_are_refused(student: Path, pristine: Path) -> None:
    manifest = export.Manifest(**json.loads((pristine / "export.json").read_text()))
    vision, text = manifest.graphs
    encoder = towers.load(student)
    with pytest.raises(export.ExportError, match="prepares text input 1 differently"):
        check.check_graph(pristine, text, encoder, [], ["a cat", "cafÃ©"], {}, 0.99)
    other = towers.build(Student(architecture=encoder.model_cfg, resize="longest"), seed=0)
    with pytest.raises(export.ExportError, match="prepares vision input 0 differently"):
        check.check_graph(pristine, vision, other, parity.pictures(), [], {}, 0.99)


def test_a_provider_that_does_not_start_is_no_silent_cpu(pristine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime lists providers that it was built with; where one cannot start, it warns and goes on without it."""
    real = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda path, options, **_: real(path, options))
    with pytest.raises(export.InputError, match=r"cannot start 'CUDAExecutionProvider'.*\[field: providers\]"):
        export.OnnxEncoder(pristine, providers=["CUDAExecutionProvider"])


def rehash(folder: Path, name: str) -> None:
    manifest = json.loads((folder / "export.json").read_text())
    manifest["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    write_manifest(folder, manifest)


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    (folder / "export.json").write_text(json.dumps(manifest | {"digest": manifest_digest(manifest)}))


def test_verify_folder_tells_what_is_wrong(folder: Path) -> None:
    assert len(export.verify_folder(folder)) == 2
    for name in ("README.md", "onnx/text_model.onnx", "torch_embeddings.npz"):
        kept = (folder / name).read_bytes()
        flip(folder / name)
        with pytest.raises(export.FolderError, match=name):
            export.verify_folder(folder)
        (folder / name).write_bytes(kept)
    graph = onnx.load(folder / "onnx/vision_model.onnx")
    weights = next(tensor for tensor in graph.graph.initializer if len(tensor.dims) == 2)
    values = onnx.numpy_helper.to_array(weights)
    for changed in (values[::-1].copy(), np.full_like(values, np.nan)):
        weights.CopyFrom(onnx.numpy_helper.from_array(changed, weights.name))
        onnx.save_model(graph, str(folder / "onnx/vision_model.onnx"))
        rehash(folder, "onnx/vision_model.onnx")  # a graph that is what it claims to be, and still wrong
        with pytest.raises(export.EncoderError, match=r"fp32 vision graph .*(does not agree with torch|not finite)"):
            export.verify_folder(folder)
    with pytest.raises(export.FolderError, match=r"export\.to_onnx"):
        export.verify_folder(folder / "nothing")


def test_unfinished_export_is_no_export(folder: Path) -> None:
    manifest = json.loads((folder / "export.json").read_text())
    write_manifest(folder, manifest | {"report": None})
    with pytest.raises(export.ExportError, match="never ended"):
        export.verify(folder)
    with pytest.raises(export.FolderError, match="never ended"):
        export.verify_folder(folder)
