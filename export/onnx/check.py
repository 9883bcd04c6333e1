# SPDX-License-Identifier: Apache-2.0
"""An exported folder against its student: inputs equal, embeddings close, times side by side."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from aced_sdk.evaluation import load_task, main_metric, run_task
from aced_sdk.towers import DualEncoder
from export.onnx.graphs import Tower
from export.onnx.report import Graph, GraphReport, Part, Precision
from export.runtime.encoder import OnnxEncoder
from export.runtime.errors import EncoderError
from export.runtime.parity import FLOAT32_BOUND, PATCH_PICTURES, Wanted, differences
from export.writing import ExportError

LATENCY_BATCHES = (1, 32)
_TASK_BATCH = 32
_ROUNDS = 9
_BUDGET_S = 5.0  # for one part and batch size; slow towers get fewer rounds, never fewer than three


def check_graph(
    folder: Path,
    graph: Graph,
    student: DualEncoder,
    images: Sequence[Image.Image],
    texts: Sequence[str],
    want: Wanted,
    min_cosine: float,
) -> GraphReport:
    """One graph, run by the runtime from picture or text on, against torch, which gives `want`.

    Raises:
        ExportError: if inputs differ, float32 embeddings differ by more than 1e-4, or a cosine is below `min_cosine`.
    """
    encoder = OnnxEncoder(folder, graph.precision, check=False, parts=(graph.part,))
    if "pixel_values" in graph.inputs:
        _equal_pixels(encoder, student, images)
    if "input_ids" in graph.inputs:
        _equal_tokens(encoder, student, texts)
    try:
        max_abs, cosine = differences(encoder, graph.part, images, texts, want)
    except EncoderError as error:
        raise ExportError(error.cause, remedy=f"leave {graph.precision} out", field="precisions") from None
    if not math.isfinite(max_abs):
        raise ExportError(
            f"the {graph.precision} {graph.part} graph gives values that are not finite",
            remedy=f"leave {graph.precision} out",
            field="precisions",
        )
    if graph.precision == "fp32" and max_abs > FLOAT32_BOUND:
        raise ExportError(
            f"the float32 {graph.part} graph differs from torch by {max_abs:.2e}, more than {FLOAT32_BOUND}",
            remedy="try another opset, and report it with the student's config",
            field="opset",
        )
    if graph.precision != "fp32" and cosine < min_cosine:
        raise ExportError(
            f"the {graph.precision} {graph.part} graph has a cosine of {cosine:.5f} to torch, below {min_cosine}",
            remedy=f"leave {graph.precision} out, or accept a smaller min_cosine",
            field="min_cosine",
        )
    return GraphReport(
        part=graph.part,
        precision=graph.precision,
        bytes=sum((folder / name).stat().st_size for name in (graph.file, graph.data) if name),
        max_abs=max_abs,
        min_cosine=cosine,
        quantised=graph.quantised,
    )


def torch_embeddings(
    student: DualEncoder, parts: Sequence[Part], images: Sequence[Image.Image], texts: Sequence[str]
) -> dict[str, NDArray[np.float32]]:
    """torch's `Wanted` for these parts."""
    want = {}
    if {"vision", "both"} & set(parts):
        want["vision"] = student.encode_image(images).cpu().numpy()
    if {"text", "both"} & set(parts):
        want["text"] = student.encode_text(texts).cpu().numpy()
    if "patches" in parts:
        pixels = torch.stack([student.preprocess(image) for image in images[:PATCH_PICTURES]])
        with torch.no_grad():
            patches = Tower(student, "patches")(pixels.to(student.mean.device))
        want["patches"] = torch.nn.functional.normalize(patches, dim=-1).cpu().numpy()
    return want


def _equal_pixels(encoder: OnnxEncoder, student: DualEncoder, images: Sequence[Image.Image]) -> None:
    for number, image in enumerate(images):
        if (encoder.geometry.pixels(image) != student.resize(image).permute(1, 2, 0).numpy()).any():
            raise _unequal("vision", number)


def _equal_tokens(encoder: OnnxEncoder, student: DualEncoder, texts: Sequence[str]) -> None:
    unequal = (encoder.tokenize(texts) != student.tokenize(texts).numpy()).any(axis=1)
    if unequal.any():
        raise _unequal("text", int(np.flatnonzero(unequal)[0]))


def _unequal(part: str, number: int) -> ExportError:
    return ExportError(
        f"the runtime prepares {part} input {number} differently from the student",
        remedy="report it with the student's config; the other part may still be exported",
        field="parts",
    )


class _Beside:
    """The student with its exported towers in their place, as far as tasks ask."""

    def __init__(self, student: DualEncoder, encoder: OnnxEncoder) -> None:
        self.student, self.encoder = student, encoder

    def encode_image(self, images: Tensor) -> Tensor:
        if "vision" not in self.encoder.parts:
            return self.student.encode_image(images)
        pixels = images.permute(0, 2, 3, 1).numpy()
        inputs = pixels if self.encoder.pixels == "uint8" else self.encoder.geometry.normalise(pixels)
        batches = range(0, len(inputs), _TASK_BATCH)
        embedded = [self.encoder.embed("vision", inputs[n : n + _TASK_BATCH]) for n in batches]
        return torch.from_numpy(np.concatenate(embedded))

    def encode_text(self, texts: list[str]) -> Tensor:
        if "text" not in self.encoder.parts:
            return self.student.encode_text(texts)
        return torch.from_numpy(self.encoder.encode_text(texts))


def task_metrics(
    folder: Path, graphs: Sequence[Graph], student: DualEncoder, tasks: Sequence[str | Path]
) -> dict[str, dict[str, float]]:
    """The main metric of each task, as a share, by `torch` and by precision; towers not exported stay torch's.

    Raises:
        EvaluationError: if a task cannot be read.
    """
    precisions = dict.fromkeys(graph.precision for graph in graphs if graph.part in ("vision", "text"))
    encoders: dict[str, Any] = {"torch": student}
    encoders |= {name: _Beside(student, OnnxEncoder(folder, name, check=False)) for name in precisions}
    found: dict[str, dict[str, float]] = {name: {} for name in encoders}
    for path in map(Path, tasks):
        task = load_task(path.name, path.parent, student)
        for name, encoder in encoders.items():
            found[name][path.name] = main_metric(task, run_task(encoder, task))
    return found


def latencies(
    folder: Path, graphs: Sequence[Graph], student: DualEncoder, threads: int
) -> tuple[dict[str, dict[int, float]], dict[tuple[Part, Precision], dict[int, float]]]:
    """Median milliseconds of one call, torch eager and every tower's graph in turns, on prepared inputs."""
    graphs = [graph for graph in graphs if graph.part in ("vision", "text")]
    torch_ms: dict[str, dict[int, float]] = {}
    graph_ms: dict[tuple[Part, Precision], dict[int, float]] = {(g.part, g.precision): {} for g in graphs}
    for part in dict.fromkeys(graph.part for graph in graphs):
        kinds = [graph.precision for graph in graphs if graph.part == part]
        encoders = {kind: OnnxEncoder(folder, kind, threads, check=False) for kind in kinds}
        for batch in LATENCY_BATCHES:
            inputs = _inputs(student, part, batch)
            pixels = np.zeros((batch, *student.preprocess_config.size, 3), np.uint8)
            own = pixels if part == "vision" and encoders[kinds[0]].pixels == "uint8" else inputs
            calls = [_torch_call(student, part, inputs), *(_onnx_call(encoders[kind], part, own) for kind in kinds)]
            first, *others = _medians(calls)
            torch_ms.setdefault(part, {})[batch] = first
            for kind, value in zip(kinds, others, strict=True):
                graph_ms[part, kind][batch] = value
    return torch_ms, graph_ms


def _inputs(student: DualEncoder, part: Part, batch: int) -> NDArray[Any]:
    if part == "text":
        return student.tokenize(["a photo of a cat on a table"] * batch).numpy()
    return np.random.default_rng(0).standard_normal((batch, 3, *student.preprocess_config.size), np.float32)


def _onnx_call(encoder: OnnxEncoder, part: Part, inputs: NDArray[Any]) -> Callable[[], object]:
    return lambda: encoder.run(part, inputs)


def _torch_call(student: DualEncoder, part: Part, inputs: NDArray[Any]) -> Callable[[], object]:
    tensor = torch.from_numpy(inputs).to(student.mean.device)
    encode: Any = student.model.encode_image if part == "vision" else student.model.encode_text

    def call() -> object:
        with torch.no_grad():
            return encode(tensor).cpu()

    return call


def _medians(calls: Sequence[Callable[[], object]]) -> list[float]:
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()  # the first call allocates
    end = time.perf_counter() + _BUDGET_S
    for done in range(_ROUNDS):
        if done >= 3 and time.perf_counter() > end:
            break
        for call, own in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            own.append(1000 * (time.perf_counter() - start))
    return [statistics.median(own) for own in times]
