# SPDX-License-Identifier: Apache-2.0
"""What an export may hold beside two plain towers: both in one graph, patches, int8 of convolutions, large files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from tiny import ARCHITECTURE, picture, write_tar

import export
from aced_sdk import towers
from aced_sdk.config import Student
from aced_sdk.errors import ConfigError, EvaluationError, UnsupportedError
from export.runtime.parity import PATCH_PICTURES, TEXTS, pictures

CONVOLUTIONAL = {
    "embed_dim": 16,
    "vision_cfg": {"timm_model_name": "test_efficientnet", "timm_pool": "avg", "timm_proj": "linear", "image_size": 32},
    "text_cfg": ARCHITECTURE["text_cfg"],
}


@pytest.fixture(scope="module")
def student_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return towers.save(towers.build(Student(architecture=ARCHITECTURE), seed=0), tmp_path_factory.mktemp("s") / "s")


@pytest.fixture(scope="module")
def convolutional(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A convolutional student whose batch norms know some pictures."""
    student = towers.build(Student(architecture=CONVOLUTIONAL), seed=0)
    for module in student.model.visual.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    student.model.visual.train()
    with torch.no_grad():
        student.model.visual(torch.stack([student.preprocess(image) for image in pictures()]))
    return towers.save(student.eval(), tmp_path_factory.mktemp("c") / "c")


@pytest.fixture(scope="module")
def own_pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(8):
        (folder / f"{number}.png").write_bytes(picture(number))
    return sorted(folder.iterdir())


def test_both_and_patches(student_folder: Path, tmp_path: Path) -> None:
    report = export.to_onnx(
        student_folder, tmp_path / "o", parts=("both", "patches"), precisions=("fp32", "int8"), measure=False
    )
    assert all(graph.max_abs <= 1e-5 for graph in report.graphs if graph.precision == "fp32")
    student = towers.load(student_folder)
    images = [image.convert("RGB") for image in pictures()[:PATCH_PICTURES]]
    pixels = torch.stack([student.preprocess(image) for image in images])
    ids = student.tokenize(list(TEXTS))
    session = onnxruntime.InferenceSession(str(tmp_path / "o/onnx/model.onnx"))
    names = ["image_embeds", "text_embeds", "logits_per_image", "logits_per_text"]
    image, text, logits, transposed = session.run(names, {"pixel_values": pixels.numpy(), "input_ids": ids.numpy()})
    want_image, want_text = student.encode_image(pixels), student.encode_text(ids)
    np.testing.assert_allclose(image, want_image.numpy(), atol=1e-5)
    np.testing.assert_allclose(text, want_text.numpy(), atol=1e-5)
    assert student.bias != 0
    want = student.scale * want_image @ want_text.T  # as of CLIPModel, which has no bias
    np.testing.assert_allclose(logits, want.numpy(), atol=1e-3)
    np.testing.assert_array_equal(transposed, logits.T)

    encoder = export.OnnxEncoder(tmp_path / "o", parts=("patches",))
    patches = torch.from_numpy(encoder.run("patches", encoder.preprocess(images)))
    assert patches.shape == (PATCH_PICTURES, 1 + 4, 32)
    visual = student.model.visual
    with torch.no_grad():  # the class token, normed and projected, is the embedding
        pooled = visual.ln_post(patches)[:, 0] @ visual.proj
    torch.testing.assert_close(torch.nn.functional.normalize(pooled, dim=-1), want_image, atol=1e-5, rtol=0)

    assert len(export.verify_folder(tmp_path / "o")) == len(export.verify(tmp_path / "o", student_folder).graphs) == 4
    assert export.OnnxEncoder(tmp_path / "o").parts == ("both", "patches")


def test_patches_of_convolutions_are_their_last_map(convolutional: Path, tmp_path: Path) -> None:
    export.to_onnx(convolutional, tmp_path / "o", parts=("patches",), precisions=("fp32",), measure=False)
    encoder, student = export.OnnxEncoder(tmp_path / "o"), towers.load(convolutional)
    image = pictures()[0]
    with torch.no_grad():
        features = student.model.visual.trunk.forward_features(student.preprocess(image)[None])
    got = encoder.run("patches", encoder.preprocess([image]))
    np.testing.assert_allclose(got, features.flatten(2).transpose(1, 2).numpy(), atol=1e-4)


def test_normalisation_in_the_graph(student_folder: Path, tmp_path: Path) -> None:
    report = export.to_onnx(
        student_folder, tmp_path / "o", parts=("vision",), preprocess_in_graph=True, int8_cosine=0.99
    )
    (given,) = onnx.load(tmp_path / "o/onnx/vision_model.onnx").graph.input
    shape = [dim.dim_param or dim.dim_value for dim in given.type.tensor_type.shape.dim]
    assert (given.type.tensor_type.elem_type, shape) == (onnx.TensorProto.UINT8, ["batch_size", 16, 16, 3])
    assert [graph.max_abs <= 1e-5 for graph in report.graphs] == [True, False, False]
    encoder = export.OnnxEncoder(tmp_path / "o")
    assert encoder.preprocess(pictures()[:2]).dtype == np.uint8
    want = towers.load(student_folder).encode_image(pictures()).numpy()
    np.testing.assert_allclose(encoder.encode_image(pictures()), want, atol=1e-5)
    assert len(export.verify_folder(tmp_path / "o")) == 3


def test_convolutions_become_int8_by_calibration(convolutional: Path, own_pictures: list[Path], tmp_path: Path) -> None:
    options = {"parts": ("vision",), "precisions": ("fp32", "int8"), "measure": False, "min_cosine": 0.9}
    report = export.to_onnx(convolutional, tmp_path / "o", calibration=own_pictures, int8_cosine=0.95, **options)
    found = report.graphs[1].quantised
    assert found is not None
    assert (found.method, found.own_pictures) == ("static", len(own_pictures))
    assert found.cosine >= 0.95
    assert report.graphs[1].min_cosine >= 0.9
    model = onnx.load(tmp_path / "o/onnx/vision_model_int8.onnx")
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    made = {node.output[0]: node for node in model.graph.node}
    for node in model.graph.node:
        if node.op_type == "Conv":
            depthwise = any(a.name == "group" and a.i > 1 for a in node.attribute)
            source = made.get(node.input[1])
            is_int8 = source is not None and kinds[source.input[0]] == onnx.TensorProto.INT8
            assert not (depthwise and is_int8)  # onnxruntime is slower there
    strict = export.to_onnx(convolutional, tmp_path / "o", calibration=own_pictures, int8_cosine=0.9999, **options)
    kept = strict.graphs[1].quantised
    assert kept is not None
    assert kept.cosine >= 0.9999
    assert len(kept.kept_float) > len(found.kept_float)
    assert kept.nodes + len(kept.kept_float) == found.nodes + len(found.kept_float)
    one, other = (tmp_path / f"o/onnx/vision_model_{name}.onnx" for name in ("int8", "quantized"))
    assert one.samefile(other)  # for transformers.js, without a second copy


def test_built_in_calibration_is_said(convolutional: Path, tmp_path: Path) -> None:
    options = {"parts": ("vision",), "precisions": ("int8",), "measure": False, "int8_cosine": 0.9, "min_cosine": 0.8}
    with pytest.warns(UserWarning, match="calibrated on built-in pictures; give calibration"):
        report = export.to_onnx(convolutional, tmp_path / "o", **options)
    assert report.graphs[0].quantised is not None
    assert report.graphs[0].quantised.own_pictures == 0
    with pytest.raises(export.ExportError, match="no part of this graph can be int8") as caught:
        export.to_onnx(convolutional, tmp_path / "o", **(options | {"int8_cosine": 1.0}))
    assert caught.value.field == "int8_cosine"
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(export.ExportError, match=r"calibration\[0\].*notes\.txt"):
        export.to_onnx(convolutional, tmp_path / "o", calibration=[tmp_path / "notes.txt"], **options)


def test_tasks_are_compared_and_drops_refused(
    student_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = towers.load(student_folder)
    for name, texts in (("shapes", ["0", "1"]), ("finding", ["a red cat", "a blue boat"])):
        task = tmp_path / name
        extension = "cls" if name == "shapes" else "txt"
        samples = [{"png": picture(n), extension: texts[n % 2].encode()} for n in range(6)]
        write_tar(task / "test" / "0.tar", samples)
        if name == "shapes":
            (task / "classnames.txt").write_text("cat\nboat\n")
            (task / "zeroshot_classification_templates.txt").write_text("a photo of a {c}\n")
        else:
            (task / "dataset_type.txt").write_text("retrieval\n")
    tasks = [tmp_path / "shapes", tmp_path / "finding"]
    options = {"tasks": tasks, "measure": False, "precisions": ("fp32", "int8"), "int8_cosine": 0.99}
    report = export.to_onnx(student_folder, tmp_path / "o", max_zero_shot_drop=1.0, **options)
    main = aced_main(student, tasks)
    assert report.tasks["torch"] == pytest.approx(main)
    assert report.tasks["fp32"] == pytest.approx(main)
    assert set(report.changes()) == {"fp32", "int8"}
    assert report.changes()["fp32"] == {"shapes": 0.0, "finding": 0.0}

    better = {"torch": {"shapes": 0.9}, "fp32": {"shapes": 0.9}, "int8": {"shapes": 0.8}}
    monkeypatch.setattr("export.onnx.check.task_metrics", lambda *_: better)
    with pytest.raises(export.ExportError, match=r"int8 loses 0\.1000 of 'shapes', more than 0\.05"):
        export.to_onnx(student_folder, tmp_path / "o", max_zero_shot_drop=0.05, **options, parts=("vision",))
    assert export.verify(tmp_path / "o") == report  # the older export stays
    monkeypatch.undo()
    absent = options | {"tasks": [tmp_path / "absent"], "precisions": ("fp32",)}
    with pytest.raises(EvaluationError, match="there is no task 'absent'"):
        export.to_onnx(student_folder, tmp_path / "p", **absent, parts=("vision",))
    with pytest.raises(ConfigError, match="no task is named"):
        export.to_onnx(student_folder, tmp_path / "p", max_zero_shot_drop=0.1)


def aced_main(student: towers.DualEncoder, tasks: list[Path]) -> dict[str, float]:
    from aced_sdk.evaluation import evaluate

    return evaluate(student, [task.name for task in tasks], tasks[0].parent).main


def test_large_graphs_keep_their_weights_beside_them(
    student_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("export.onnx.graphs.EXTERNAL_ABOVE", 10_000)
    export.to_onnx(student_folder, tmp_path / "o", precisions=("fp32",), measure=False)
    graph, data = (tmp_path / f"o/onnx/vision_model.{name}" for name in ("onnx", "onnx_data"))
    assert graph.stat().st_size < data.stat().st_size
    manifest = export.Manifest(**json.loads((tmp_path / "o/export.json").read_text()))
    assert [one.data for one in manifest.graphs] == ["onnx/vision_model.onnx_data", "onnx/text_model.onnx_data"]
    encoder = export.OnnxEncoder(tmp_path / "o")
    want = towers.load(student_folder).encode_image(pictures()).numpy()
    np.testing.assert_allclose(encoder.encode_image(pictures()), want, atol=1e-5)
    assert export.verify_folder(tmp_path / "o")
    with pytest.raises(UnsupportedError, match="only fp32 can be that large"):
        export.to_onnx(student_folder, tmp_path / "p", measure=False)
    content = bytearray(data.read_bytes())
    content[100] ^= 1
    data.write_bytes(content)
    with pytest.raises(export.FolderError, match="onnx_data is not the file"):
        export.OnnxEncoder(tmp_path / "o")


@pytest.mark.slow
def test_benchmark_runs(student_folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.onnx", "--towers", str(student_folder), "--rounds", "1"]
    environment = {"CXX": "no-such-compiler", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [*command, "--threads", "1", "--output", str(tmp_path / "o.json")],
        capture_output=True, text=True, check=False, timeout=250, env=environment, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "o.json").read_text())
    assert result == json.loads(done.stdout)
    (tower,) = result["towers"].values()
    kinds = {"torch", "plain", "fp32", "fp16", "int8"}
    assert tower["left_out"] == {"torch_compile": "there is no C++ compiler (no-such-compiler)"}
    for batch in ("batch_1", "batch_8"):
        assert set(tower["latency_ms"][batch]) == kinds
        assert min(tower["latency_ms"][batch].values()) > 0
    assert set(tower["peak_memory_bytes"]) == kinds
    assert tower["peak_memory_bytes"]["torch"] > tower["peak_memory_bytes"]["fp32"] > 1e7
    assert max(tower["max_abs"][kind] for kind in ("plain", "fp32")) <= 1e-5
    assert tower["least_cosine"]["int8"] > 0.99
