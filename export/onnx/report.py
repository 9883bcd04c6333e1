# SPDX-License-Identifier: Apache-2.0
"""What an export says about itself: the typed manifest `export.json` and the measured report within it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from aced_sdk.config import Config
from export.student import Source

Part = Literal["vision", "text", "both", "patches"]
Precision = Literal["fp32", "fp16", "int8"]
SUFFIX: dict[Precision, str] = {"fp32": "", "fp16": "_fp16", "int8": "_int8"}
"""What a precision adds to a file's name."""


class Quantisation(Config):
    """How an int8 graph was made."""

    method: Literal["dynamic", "static"]
    nodes: int = Field(description="nodes in int8")
    kept_float: tuple[str, ...] = Field(description="nodes that could be int8, and stay in float for their accuracy")
    cosine: float = Field(description="least cosine to the float graph on the calibration inputs")
    own_pictures: int = Field(description="calibration pictures that the user gave; 0 if built-in ones were taken")


class GraphReport(Config):
    """One graph against the student in torch, from picture or text to L2-normalised embedding."""

    part: Part
    precision: Precision
    bytes: int = Field(description="size of the file, and of its external data")
    max_abs: float = Field(description="largest absolute difference of a component of normalised embeddings")
    min_cosine: float = Field(description="smallest cosine between torch's and the graph's embedding of the same input")
    latency_ms: dict[int, float] = Field({}, description="median milliseconds of one call, per batch size")
    quantised: Quantisation | None = Field(None, description="int8 only: how, and what stayed in float")


class ExportReport(Config):
    """What was checked and measured on save."""

    graphs: tuple[GraphReport, ...]
    pictures: int = Field(description="pictures compared, several sizes, aspect ratios and modes")
    texts: int = Field(description="texts compared")
    batch_sizes: tuple[int, ...] = Field(description="batch sizes compared")
    min_cosine: float = Field(description="below this fp16 and int8 graphs are refused")
    tasks: dict[str, dict[str, float]] = Field(
        {}, description="main metric of each task, as a share, by `torch` and by precision; retrieval tasks included"
    )
    torch_latency_ms: dict[str, dict[int, float]] = Field(
        {}, description="torch eager float32, per part and batch size"
    )
    threads: int | None = Field(None, description="threads of torch and of onnxruntime while the times were taken")

    def changes(self) -> dict[str, dict[str, float]]:
        """By precision and task, how far the main metric is above (or, if negative, below) torch's."""
        torch = self.tasks.get("torch", {})
        return {
            precision: {task: value - torch[task] for task, value in metrics.items()}
            for precision, metrics in self.tasks.items()
            if precision != "torch"
        }


class Graph(Config):
    """One ONNX file and the names of its ends."""

    part: Part
    precision: Precision
    file: str
    data: str | None = Field(None, description="file of the weights, for graphs above 2 GB")
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    quantised: Quantisation | None = None


class TextInput(Config):
    """What a text becomes before the text graph."""

    context_length: int
    pad_id: int
    cleaning: Literal["lower", "whitespace", "canonicalize"]


class Manifest(Config):
    """`export.json`: what the folder is; the runtime relies on it."""

    format: Literal[3] = 3
    kind: Literal["onnx_dual_encoder"] = "onnx_dual_encoder"
    source: Source
    embedding_dim: int
    scale: float
    bias: float
    graph_bias: float = Field(description="what the logits of the graph of both towers contain of `bias`: all or 0")
    opset: int
    pixels: Literal["float32", "uint8"] = Field(
        description="pixel_values: normalised float32 [N, 3, H, W], or uint8 [N, H, W, 3] of the same size"
    )
    graphs: tuple[Graph, ...]
    text: TextInput | None
    files: dict[str, str] = Field(description="sha256 of every other file")
    versions: dict[str, str]
    report: ExportReport | None = None
    digest: str = Field("", description="sha256 of all the above, so that no alteration goes unseen")
