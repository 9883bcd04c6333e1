# SPDX-License-Identifier: Apache-2.0
"""onnxruntime with nothing but Pillow and tokenizers beside it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnxruntime

from tools.clients.inside import Check
from tools.clients.scripts.graphs import Floats, Inputs, graph_checks


def checks(folder: Path) -> Iterator[Check]:
    """Every graph that `export.to_onnx` wrote."""
    yield from graph_checks(folder, "InferenceSession", run)


def run(path: Path, inputs: Inputs) -> dict[str, Floats]:
    """A graph's outputs by name."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))
