# SPDX-License-Identifier: Apache-2.0
"""`to_onnx` and `verify`: a student folder into a verified, self-sufficient ONNX folder."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import get_args

import torch
from PIL import Image

from aced_sdk.errors import ConfigError, MissingPackageError, UnsupportedError
from aced_sdk.files import printable
from aced_sdk.towers import DualEncoder
from export.onnx import check
from export.onnx.folder import Settings, calibration_of, card, write_configs, write_graphs
from export.onnx.graphs import graph_bias
from export.onnx.report import ExportReport, Manifest, Part, Precision
from export.runtime import parity
from export.runtime.errors import EncoderError
from export.runtime.manifest import MANIFEST, check_files, read_manifest
from export.student import known, load_student, opened
from export.writing import ExportError, all_digests, check_target, export_folder, write_manifest

_PACKAGES = ("aced-sdk", "torch", "onnx", "onnxruntime", "open_clip_torch", "timm", "tokenizers")


def to_onnx(
    student_folder: str | PathLike[str],
    directory: str | Path,
    parts: Sequence[Part] = ("vision", "text"),
    precisions: Sequence[Precision] = ("fp32", "fp16", "int8"),
    *,
    opset: int = 20,
    min_cosine: float = 0.99,
    int8_cosine: float = 0.999,
    calibration: Sequence[str | Path] = (),
    preprocess_in_graph: bool = False,
    pictures: Sequence[str | Path] = (),
    texts: Sequence[str] = (),
    tasks: Sequence[str | Path] = (),
    max_zero_shot_drop: float | None = None,
    measure: bool = True,
) -> ExportReport:
    """Write a folder that `OnnxEncoder` runs without torch, verified from picture and text to embedding.

    The folder holds `onnx/{vision_model,text_model,model,patches_model}{,_fp16,_int8}.onnx` (and int8 once more under
    transformers.js's name, `_quantized`, as a hard link), `config.json`, `preprocessor_config.json`, `tokenizer.json`,
    `tokenizer_config.json`, `README.md`, torch's embeddings of some inputs for `verify_folder`, and the manifest
    `export.json`. fastembed, optimum and transformers.js open it too. It appears whole or not at all; an older export
    there is replaced.

    Args:
        student_folder: a saved student.
        directory: the folder to write.
        parts: "vision" and "text", the towers; "both" in one graph with the logits; "patches" [N, T, W] for a VLM.
        precisions: fp32; fp16 with float32 at both ends; int8, for which see `export.onnx.quantize`.
        opset: ONNX operator set, 18 or newer.
        min_cosine: fp16 and int8 graphs below this cosine to torch are refused.
        int8_cosine: nodes stay in float until the calibration pictures and texts keep this cosine to float.
        calibration: pictures like those of your use, some dozens, from which int8 learns the ranges of activations in
            convolutional towers. Without them `pictures` serve, and as a last resort the built-in ones, which the
            report tells and a warning too.
        preprocess_in_graph: `pixel_values` become uint8 [N, H, W, 3] of the tower's size, and the graph normalises. The
            picture is still resized outside, by Pillow, because ONNX's own resize gives other pixels.
        pictures: the user's pictures, compared beside the built-in ones.
        texts: the user's texts, compared beside the built-in ones.
        tasks: folders of zero-shot and retrieval tasks as `aced_sdk.evaluate` reads them; the report holds what torch
            and each precision reach.
        max_zero_shot_drop: fp16 and int8 are refused if a task's main metric falls by more than this share.
        measure: whether to take times, some seconds.

    Raises:
        ModelError: if the student cannot be loaded.
        ConfigError: for an unknown part or precision, an opset below 18, or a limit out of its range.
        ExportError: if a graph does not agree with torch, or the directory holds something else or cannot be written.
        EvaluationError: if a task cannot be read.
        UnsupportedError: for students this version cannot export.
    """
    known("parts", parts, get_args(Part))
    known("precisions", precisions, get_args(Precision))
    if opset < 18:
        raise ConfigError(f"opset {opset} is too old", remedy="take 18 or newer", field="opset")
    if opset < 20 and "fp16" in precisions:
        # Gelu becomes an operator in 20; its parts, fused in half precision, crash onnxruntime on a CPU
        raise UnsupportedError(f"fp16 needs opset 20, not {opset}", remedy="take 20, or leave fp16 out", field="opset")
    for field, value in (("min_cosine", min_cosine), ("int8_cosine", int8_cosine)):
        if not 0 < value <= 1:
            raise ConfigError(f"{field} is {value}", remedy="take a value in 0..1", field=field)
    if max_zero_shot_drop is not None and (max_zero_shot_drop < 0 or not tasks):
        raise ConfigError(
            f"max_zero_shot_drop is {max_zero_shot_drop}" + ("" if tasks else ", and no task is named"),
            remedy="name tasks, and give a share in 0..1",
            field="max_zero_shot_drop",
        )
    if find_spec("onnxscript") is None:
        raise MissingPackageError("onnxscript is not installed", remedy="install aced-sdk[export]")
    target = Path(directory)
    check_target(target, MANIFEST)
    own_pictures, own_calibration = opened("pictures", pictures), opened("calibration", calibration)
    student, source = load_student(student_folder)
    settings = Settings(parts, precisions, opset, preprocess_in_graph, int8_cosine)
    with export_folder(target) as folder:
        graphs = write_graphs(student, folder, settings, source, calibration_of(own_calibration or own_pictures, texts))
        manifest = Manifest(
            source=source,
            embedding_dim=student.embedding_dim,
            scale=student.scale,
            bias=student.bias,
            graph_bias=graph_bias(student),
            opset=opset,
            pixels="uint8" if preprocess_in_graph else "float32",
            graphs=graphs,
            text=write_configs(student, folder, parts),
            files={},
            versions={name: version(name) for name in _PACKAGES},
        )
        parity.write_torch(folder, check.torch_embeddings(student, parts, parity.pictures(), parity.TEXTS))
        write_manifest(folder, manifest)  # the runtime, which is what gets checked, reads it
        report = _compare(folder, manifest, student, min_cosine, own_pictures, texts)
        if tasks:
            report = report.replace(tasks=check.task_metrics(folder, graphs, student, tasks))
            _refuse_drops(report, max_zero_shot_drop)
        if measure:
            report = _timed(folder, manifest, student, report)
        (folder / "README.md").write_text(card(manifest, report), encoding="utf-8")
        write_manifest(folder, manifest.replace(report=report, files=all_digests(folder)))
    return report


def verify(
    directory: str | Path, student_folder: str | PathLike[str] | None = None, *, min_cosine: float = 0.9
) -> ExportReport:
    """Check an exported folder again: every file's hash, and with the student given every graph against torch.

    `verify_folder` does so without torch or the student.

    Args:
        directory: the exported folder.
        student_folder: the student that it was made from.
        min_cosine: fp16 and int8 graphs below this cosine to torch are refused, even if the folder allows less.

    Returns:
        the report taken on save, or the fresh one (without times) if the student is given.

    Raises:
        ExportError: if a file is missing or altered, the student is another one, or a graph does not agree with it.
    """
    folder = Path(directory)
    try:
        raw = read_manifest(folder)
        check_files(folder, raw["files"])
    except EncoderError as error:
        raise ExportError(error.cause, remedy=error.remedy, field="directory") from None
    try:
        manifest = Manifest(**raw)
    except ConfigError as error:
        raise ExportError(
            f"{printable(folder / MANIFEST)} is no manifest: {printable(error.cause)}",
            remedy="export the student again",
            field="directory",
        ) from None
    if manifest.report is None:
        raise ExportError(f"{folder} has no report: its export never ended", remedy="export again", field="directory")
    if student_folder is None:
        return manifest.report
    student, source = load_student(student_folder)
    if source != manifest.source:
        raise ExportError(f"{folder} was not made from {student_folder}", remedy="name that", field="student_folder")
    return _compare(folder, manifest, student, max(min_cosine, manifest.report.min_cosine), [], [])


def _refuse_drops(report: ExportReport, limit: float | None) -> None:
    for precision, changes in report.changes().items():
        for task, change in changes.items():
            if limit is not None and precision != "fp32" and change < -limit:
                raise ExportError(
                    f"{precision} loses {-change:.4f} of '{task}', more than {limit}",
                    remedy=f"leave {precision} out, give calibration pictures or a larger int8_cosine, or accept more",
                    field="max_zero_shot_drop",
                )


def _compare(
    folder: Path,
    manifest: Manifest,
    student: DualEncoder,
    min_cosine: float,
    pictures: Sequence[Image.Image],
    texts: Sequence[str],
) -> ExportReport:
    images, captions = [*parity.pictures(), *pictures], [*parity.TEXTS, *texts]
    want = check.torch_embeddings(student, [graph.part for graph in manifest.graphs], images, captions)
    graphs = (
        check.check_graph(folder, graph, student, images, captions, want, min_cosine) for graph in manifest.graphs
    )
    return ExportReport(
        graphs=tuple(graphs),
        pictures=len(images),
        texts=len(captions),
        batch_sizes=parity.BATCH_SIZES,
        min_cosine=min_cosine,
    )


def _timed(folder: Path, manifest: Manifest, student: DualEncoder, report: ExportReport) -> ExportReport:
    threads = torch.get_num_threads()
    torch_ms, graph_ms = check.latencies(folder, manifest.graphs, student, threads)
    graphs = tuple(graph.replace(latency_ms=graph_ms[graph.part, graph.precision]) for graph in report.graphs)
    return report.replace(graphs=graphs, torch_latency_ms=torch_ms, threads=threads)
