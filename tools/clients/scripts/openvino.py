# SPDX-License-Identifier: Apache-2.0
"""OpenVINO on the ONNX graphs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openvino

from tools.clients.inside import Check
from tools.clients.scripts.graphs import Floats, Inputs, graph_checks


def checks(folder: Path) -> Iterator[Check]:
    """Every graph that `export.to_onnx` wrote."""
    yield from graph_checks(folder, "compile_model", run)


def run(path: Path, inputs: Inputs) -> dict[str, Floats]:
    """A graph's outputs by name."""
    # by itself OpenVINO computes in bfloat16 where the processor can
    model = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return {output.get_any_name(): value for output, value in model(inputs).items()}
