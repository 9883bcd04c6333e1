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

from aced_sdk.towers import DualEncoder
from export.parity import FLOAT32_BOUND, differences
from export.report import ExportError, Graph, GraphReport, Part, Precision
from export.runtime import OnnxEncoder

LATENCY_BATCHES = (1, 32)
_ROUNDS = 9
_BUDGET_S = 5.0  # for one part and batch size; slow towers get fewer rounds, never fewer than three


def check_graph(
    folder: Path,
    graph: Graph,
    student: DualEncoder,
    images: Sequence[Image.Image],
    texts: Sequence[str],
    min_cosine: float,
) -> GraphReport:
    """One graph, run by the runtime from picture or text on, against torch.

    Raises:
        ExportError: if inputs differ, float32 embeddings differ by more than 1e-4, or a cosine is below `min_cosine`.
    """
    encoder = OnnxEncoder(folder, graph.precision, check=False)
    items: Sequence[Any] = images if graph.part == "vision" else texts
    _equal_inputs(encoder, student, graph.part, items)
    encode: Any = student.encode_image if graph.part == "vision" else student.encode_text
    max_abs, cosine = differences(encoder, graph.part, items, encode(list(items)).cpu().numpy())
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
    size = (folder / graph.file).stat().st_size
    return GraphReport(part=graph.part, precision=graph.precision, bytes=size, max_abs=max_abs, min_cosine=cosine)


def _equal_inputs(encoder: OnnxEncoder, student: DualEncoder, part: Part, items: Sequence[Any]) -> None:
    if part == "text":
        want = student.tokenize(list(items)).numpy()
        unequal = (encoder.tokenize(items) != want).any(axis=1)
    else:
        resized = [student.resize(image).permute(1, 2, 0).numpy() for image in items]
        unequal = np.array([(encoder.geometry.pixels(a) != b).any() for a, b in zip(items, resized, strict=True)])
    if unequal.any():
        raise ExportError(
            f"the runtime prepares {part} input {int(np.flatnonzero(unequal)[0])} differently from the student",
            remedy="report it with the student's config; the other part may still be exported",
            field="parts",
        )


def latencies(
    folder: Path, graphs: Sequence[Graph], student: DualEncoder, threads: int
) -> tuple[dict[str, dict[int, float]], dict[tuple[Part, Precision], dict[int, float]]]:
    """Median milliseconds of one call, torch eager and every graph in turns, on prepared inputs."""
    torch_ms: dict[str, dict[int, float]] = {}
    graph_ms: dict[tuple[Part, Precision], dict[int, float]] = {(g.part, g.precision): {} for g in graphs}
    for part in dict.fromkeys(graph.part for graph in graphs):
        kinds = [graph.precision for graph in graphs if graph.part == part]
        encoders = {kind: OnnxEncoder(folder, kind, threads, check=False) for kind in kinds}
        for batch in LATENCY_BATCHES:
            inputs = _inputs(student, part, batch)
            calls = [_torch_call(student, part, inputs), *(_onnx_call(encoders[kind], part, inputs) for kind in kinds)]
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
