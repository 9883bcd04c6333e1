# SPDX-License-Identifier: Apache-2.0
"""`to_onnx` and `verify`: a student folder into a verified, self-sufficient ONNX folder."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from os import PathLike, fspath
from pathlib import Path
from typing import get_args

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from PIL import Image

from aced_sdk import towers
from aced_sdk.errors import ConfigError, MissingPackageError, UnsupportedError
from aced_sdk.files import sha256, whole_folder, write_json
from aced_sdk.towers import DualEncoder
from aced_sdk.towers.folder import CONFIG, MANIFEST, WEIGHTS
from export import check, parity, runtime
from export.errors import EncoderError, InputError
from export.graphs import INPUTS, OUTPUTS, float16_graph, float32_graph, int8_graph
from export.pictures import open_picture
from export.report import ExportError, ExportReport, Graph, Manifest, Part, Precision, Source
from export.tokenizer import write_tokenizer

_SUFFIX: dict[Precision, str] = {"fp32": "", "fp16": "_fp16", "int8": "_int8"}
_PACKAGES = ("aced-sdk", "torch", "onnx", "onnxruntime", "open_clip_torch", "timm", "tokenizers")


def to_onnx(
    student_folder: str | PathLike[str],
    directory: str | Path,
    parts: Sequence[Part] = ("vision", "text"),
    precisions: Sequence[Precision] = ("fp32", "fp16", "int8"),
    *,
    opset: int = 20,
    min_cosine: float = 0.99,
    pictures: Sequence[str | Path] = (),
    texts: Sequence[str] = (),
    measure: bool = True,
) -> ExportReport:
    """Write a folder that `OnnxEncoder` runs without torch, verified from picture and text to embedding.

    The folder holds `onnx/{vision,text}_model{,_fp16,_int8}.onnx`, `preprocessor_config.json`, `tokenizer.json`,
    `README.md`, torch's embeddings of some inputs for `verify_folder`, and the manifest `export.json`. It appears whole
    or not at all; an older export there is replaced.

    Args:
        student_folder: a saved student.
        directory: the folder to write.
        parts: towers to export.
        precisions: fp32; fp16 with float32 at both ends; int8 weights with dynamic quantisation.
        opset: ONNX operator set, 18 or newer.
        min_cosine: fp16 and int8 graphs below this cosine to torch are refused.
        pictures: the user's pictures, compared beside the built-in ones.
        texts: the user's texts, compared beside the built-in ones.
        measure: whether to take times, some seconds.

    Raises:
        ModelError: if the student cannot be loaded.
        ConfigError: for an unknown part or precision, or an opset below 18.
        ExportError: if a graph does not agree with torch, or the directory holds something else.
        UnsupportedError: for students this version cannot export.
    """
    _known("parts", parts, get_args(Part))
    _known("precisions", precisions, get_args(Precision))
    if opset < 18:
        raise ConfigError(f"opset {opset} is too old", remedy="take 18 or newer", field="opset")
    if opset < 20 and "fp16" in precisions:
        # Gelu becomes an operator in 20; its parts, fused in half precision, crash onnxruntime on a CPU
        raise UnsupportedError(f"fp16 needs opset 20, not {opset}", remedy="take 20, or leave fp16 out", field="opset")
    if not 0 < min_cosine <= 1:
        raise ConfigError(f"min_cosine is {min_cosine}", remedy="take a value in 0..1", field="min_cosine")
    if find_spec("onnxscript") is None:
        raise MissingPackageError("onnxscript is not installed", remedy="install aced-sdk[export]")
    target = Path(directory)
    if target.exists() and not (target / runtime.MANIFEST).is_file() and (target.is_file() or any(target.iterdir())):
        raise ExportError(
            f"{target} holds something else than an export", remedy="name a new or an empty folder", field="directory"
        )
    own_pictures = _opened(pictures)
    student, source = load_student(student_folder)
    with whole_folder(target) as folder:
        graphs = _write_graphs(student, folder, parts, precisions, opset, source)
        if "vision" in parts:
            write_json(folder / "preprocessor_config.json", _preprocessor_config(student))
        manifest = Manifest(
            source=source,
            embedding_dim=student.embedding_dim,
            scale=student.scale,
            bias=student.bias,
            opset=opset,
            graphs=graphs,
            text=write_tokenizer(student, folder / "tokenizer.json") if "text" in parts else None,
            files={},
            versions={name: version(name) for name in _PACKAGES},
        )
        parity.write_torch(folder, _torch_embeddings(student, parts))
        _write(folder, manifest)  # the runtime, which is what gets checked, reads it
        report = _compare(folder, manifest, student, min_cosine, own_pictures, texts)
        if measure:
            report = _timed(folder, manifest, student, report)
        (folder / "README.md").write_text(_card(manifest, report), encoding="utf-8")
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        files = {name: sha256(folder / name) for name in names if name != runtime.MANIFEST}
        _write(folder, manifest.replace(report=report, files=files))
    return report


def verify(directory: str | Path, student_folder: str | PathLike[str] | None = None) -> ExportReport:
    """Check an exported folder again: every file's hash, and with the student given every graph against torch.

    `verify_folder` does so without torch or the student.

    Returns:
        the report taken on save, or the fresh one (without times) if the student is given.

    Raises:
        ExportError: if a file is missing or altered, the student is another one, or a graph does not agree with it.
    """
    folder = Path(directory)
    try:
        raw = runtime.read_manifest(folder)
        runtime.check_files(folder, raw["files"])
    except EncoderError as error:
        raise ExportError(error.cause, remedy=error.remedy, field="directory") from None
    manifest = Manifest(**raw)
    if manifest.report is None:
        raise ExportError(f"{folder} has no report: its export never ended", remedy="export again", field="directory")
    if student_folder is None:
        return manifest.report
    student, source = load_student(student_folder)
    if source != manifest.source:
        raise ExportError(f"{folder} was not made from {student_folder}", remedy="name that", field="student_folder")
    return _compare(folder, manifest, student, manifest.report.min_cosine, [], [])


def _known(field: str, values: Sequence[str], known: Sequence[str]) -> None:
    if isinstance(values, str) or not values or len(set(values)) < len(values) or not set(values) <= set(known):
        raise ConfigError(f"{field} is {values!r}", remedy=f"give some of {', '.join(known)}, each once", field=field)


def load_student(student_folder: str | PathLike[str]) -> tuple[DualEncoder, Source]:
    """The student and what identifies it.

    Raises:
        UnsupportedError: for a hub name.
        ModelError: if the folder cannot be loaded.
    """
    name = fspath(student_folder)
    if name.startswith("hf-hub:"):
        raise UnsupportedError(
            f"{name} lies on a hub", remedy="load it and save it as a folder first", field="student_folder"
        )
    student = towers.load(name)
    folder = Path(name.removeprefix("local-dir:"))
    license = towers.read_manifest(folder).license if (folder / MANIFEST).is_file() else "unknown"
    source = Source(weights_sha256=sha256(folder / WEIGHTS), config_sha256=sha256(folder / CONFIG), license=license)
    return student, source


def _opened(paths: Sequence[str | Path]) -> list[Image.Image]:
    try:
        return [open_picture(path, f"pictures[{n}]", runtime.MAX_PIXELS) for n, path in enumerate(paths)]
    except InputError as error:
        raise ExportError(error.cause, remedy=error.remedy, field="pictures") from error


def _write(folder: Path, manifest: Manifest) -> None:
    write_json(folder / runtime.MANIFEST, manifest.model_dump(mode="json"))


def _write_graphs(
    student: DualEncoder,
    folder: Path,
    parts: Sequence[Part],
    precisions: Sequence[Precision],
    opset: int,
    source: Source,
) -> tuple[Graph, ...]:
    (folder / "onnx").mkdir()
    metadata = {
        "source_weights_sha256": source.weights_sha256,
        "source_config_sha256": source.config_sha256,
        "license": source.license,
        "aced_sdk": version("aced-sdk"),
        "torch": version("torch"),
    }
    graphs = []
    for part in parts:
        model = float32_graph(student, part, opset, metadata)
        for precision in precisions:
            name = f"onnx/{part}_model{_SUFFIX[precision]}.onnx"
            graphs.append(Graph(part=part, precision=precision, file=name, input=INPUTS[part], output=OUTPUTS[part]))
            if precision == "int8":
                int8_graph(model, str(folder / name))
            else:
                onnx.save_model(float16_graph(model) if precision == "fp16" else model, str(folder / name))
    return tuple(graphs)


def _preprocessor_config(student: DualEncoder) -> dict[str, object]:
    """The keys of transformers' CLIPImageProcessor, and after them what it has no words for."""
    config = student.preprocess_config
    height, width = config.size
    squash = config.resize_mode == "squash"
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width} if squash else {"shortest_edge": min(height, width)},
        "resample": 3 if config.interpolation == "bicubic" else 2,
        "do_center_crop": not squash,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.mean),
        "image_std": list(config.std),
        "do_convert_rgb": True,
        "resize_mode": config.resize_mode,
        "fill_color": config.fill_color,
    }


def _torch_embeddings(student: DualEncoder, parts: Sequence[Part]) -> dict[str, NDArray[np.float32]]:
    embeddings = {}
    if "vision" in parts:
        embeddings["vision"] = student.encode_image(parity.pictures()).cpu().numpy()
    if "text" in parts:
        embeddings["text"] = student.encode_text(list(parity.TEXTS)).cpu().numpy()
    return embeddings


def _compare(
    folder: Path,
    manifest: Manifest,
    student: DualEncoder,
    min_cosine: float,
    pictures: Sequence[Image.Image],
    texts: Sequence[str],
) -> ExportReport:
    images, captions = [*parity.pictures(), *pictures], [*parity.TEXTS, *texts]
    graphs = (check.check_graph(folder, graph, student, images, captions, min_cosine) for graph in manifest.graphs)
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


def _card(manifest: Manifest, report: ExportReport) -> str:
    rows = "".join(
        f"| {graph.part} | {graph.precision} | {graph.bytes:,} | {graph.max_abs:.1e} | {graph.min_cosine:.5f} |\n"
        for graph in report.graphs
    )
    return (
        f"---\nlicense: {manifest.source.license}\npipeline_tag: zero-shot-image-classification\n---\n\n"
        "# A dual encoder as ONNX\n\n"
        "```python\nfrom export import OnnxEncoder  # needs onnxruntime, numpy, pillow, tokenizers\n"
        'encoder = OnnxEncoder("FOLDER")\n```\n\n'
        "`image_embeds` and `text_embeds` leave the graphs unnormalised; OnnxEncoder divides by their L2 norm. "
        "`input_ids` has the whole context length, padded as `tokenizer.json` says.\n\n"
        "| part | precision | bytes | max abs to torch | least cosine to torch |\n|---|---|---|---|---|\n" + rows
    )
