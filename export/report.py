# SPDX-License-Identifier: Apache-2.0
"""What an export says about itself: the typed manifest `export.json` and the measured report within it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from aced_sdk.config import Config
from aced_sdk.errors import AcedError

Part = Literal["vision", "text"]
Precision = Literal["fp32", "fp16", "int8"]


class ExportError(AcedError):
    """An export that does not agree with its student, or cannot be made or read."""


class GraphReport(Config):
    """One graph against the student in torch, from picture or text to L2-normalised embedding."""

    part: Part
    precision: Precision
    bytes: int = Field(description="size of the file")
    max_abs: float = Field(description="largest absolute difference of a component of normalised embeddings")
    min_cosine: float = Field(description="smallest cosine between torch's and the graph's embedding of the same input")
    latency_ms: dict[int, float] = Field({}, description="median milliseconds of one call, per batch size")


class ExportReport(Config):
    """What was checked and measured on save."""

    graphs: tuple[GraphReport, ...]
    pictures: int = Field(description="pictures compared, several sizes, aspect ratios and modes")
    texts: int = Field(description="texts compared")
    batch_sizes: tuple[int, ...] = Field(description="batch sizes compared")
    min_cosine: float = Field(description="below this fp16 and int8 graphs are refused")
    torch_latency_ms: dict[str, dict[int, float]] = Field(
        {}, description="torch eager float32, per part and batch size"
    )
    threads: int | None = Field(None, description="threads of torch and of onnxruntime while the times were taken")


class Graph(Config):
    """One ONNX file and the names of its ends."""

    part: Part
    precision: Precision
    file: str
    input: str
    output: str


class TextInput(Config):
    """What a text becomes before the text graph."""

    context_length: int
    pad_id: int
    cleaning: Literal["lower", "whitespace", "canonicalize"]


class Source(Config):
    """The student that was exported."""

    weights_sha256: str
    config_sha256: str
    license: str


class Manifest(Config):
    """`export.json`: what the folder is; the runtime relies on it."""

    format: Literal[1] = 1
    kind: Literal["onnx_dual_encoder"] = "onnx_dual_encoder"
    source: Source
    embedding_dim: int
    scale: float
    bias: float
    opset: int
    graphs: tuple[Graph, ...]
    text: TextInput | None
    files: dict[str, str] = Field(description="sha256 of every other file")
    versions: dict[str, str]
    report: ExportReport | None = None
