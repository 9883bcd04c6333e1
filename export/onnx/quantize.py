# SPDX-License-Identifier: Apache-2.0
"""int8 graphs by onnxruntime's quantiser: which nodes are worth it, and which cost too much accuracy.

Transformers are quantised dynamically: matrix products per channel, activations by what each call brings. Convolutions
gain nothing from that, so graphs that have them are quantised statically (QDQ), with the ranges that activations take
on calibration pictures. There, only what onnxruntime runs faster in int8 than in float is quantised: dense
convolutions and matrix products. Depthwise convolutions are several times slower in int8 on a CPU with VNNI.

Weights of dynamic graphs have 7 bits (`reduce_range`). CPUs without VNNI add pairs of products in 16 bits, and sums of
8-bit products saturate there: the same graph gives other embeddings, without an error. With 7 bits all CPUs agree.
Static graphs keep 8 bits, since 7 cost convolutional towers too much. `verify_folder` checks them on the machine that
serves.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from export.onnx.report import Quantisation
from export.writing import ExportError

Feeds = Mapping[str, NDArray[Any]]

_GROUPS = 12  # of neighbouring nodes, weighed one by one where the whole costs too much
_MIN_CHANNELS = 16  # a stem that reads 3 colours is too narrow for int8 products
_DYNAMIC = ("MatMul", "Gather")
_STATIC = ("Conv", "MatMul", "Gemm", "Relu", "Clip")


class Quantised(NamedTuple):
    """An int8 graph and what was found on the way to it."""

    model: onnx.ModelProto
    method: Literal["dynamic", "static"]
    quantised: int  # nodes in int8
    kept: tuple[str, ...]  # nodes that could be int8, and stay in float because they cost too much
    cosine: float  # least, to the float graph on the calibration inputs


def int8_graph(model: onnx.ModelProto, calibration: Sequence[Feeds], cosine: float) -> Quantised:
    """Quantise until only what keeps the embeddings close is int8.

    Where the fully quantised graph is below `cosine`, groups of neighbouring nodes are quantised alone to find what
    each costs, and the costliest go back to float, one by one, until the rest keeps it.

    Args:
        model: a float32 graph with shapes inferred, below 2 GB.
        calibration: inputs by name, each with one row.
        cosine: least one to the float graph that the calibration inputs have to keep.

    Raises:
        ExportError: if no int8 node can stay.
    """
    method: Literal["dynamic", "static"] = "static" if _dense_convolutions(model) else "dynamic"
    source = _folded(model) if method == "static" else _copied(model)
    nodes = _candidates(source, method)
    want = _outputs(source, calibration)
    with tempfile.TemporaryDirectory() as folder:

        def attempt(chosen: Sequence[str]) -> tuple[onnx.ModelProto, float]:
            made = _quantised(source, method, chosen, calibration, Path(folder))
            return made, _cosine(want, _outputs(made, calibration))

        made, found = attempt(nodes)
        kept: list[str] = []
        if found < cosine:
            groups = [list(group) for group in np.array_split(np.array(nodes), min(_GROUPS, len(nodes)))]
            costliest = sorted(groups, key=lambda group: attempt(group)[1])
            for group in costliest[:-1]:
                kept += group
                made, found = attempt([name for name in nodes if name not in kept])
                if found >= cosine:
                    break
            else:
                raise ExportError(
                    f"no part of this graph can be int8 with a cosine of {cosine} to float (the last try: {found:.5f})",
                    remedy="accept a smaller int8_cosine, give calibration pictures like those of your use, or leave "
                    "int8 out",
                    field="int8_cosine",
                )
    return Quantised(_tidy(made), method, len(nodes) - len(kept), tuple(sorted(kept, key=nodes.index)), found)


def described(made: Quantised, own_pictures: int) -> Quantisation:
    """What a report says of it; `own_pictures` of the calibration's pictures are the user's."""
    return Quantisation(
        method=made.method,
        nodes=made.quantised,
        kept_float=made.kept,
        cosine=made.cosine,
        own_pictures=own_pictures,
    )


def _copied(model: onnx.ModelProto) -> onnx.ModelProto:
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    return copied


def _folded(model: onnx.ModelProto) -> onnx.ModelProto:
    """Scales and norms folded into the convolutions before them, which int8 nodes between would prevent later."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = f"{folder}/folded.onnx"
        options.log_severity_level = 3  # that the file is for this machine alone does not hold at this level
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        folded = onnx.load(options.optimized_model_filepath)
    for number, node in enumerate(folded.graph.node):
        node.name = node.name or f"{node.op_type}_{number}"
    return onnx.shape_inference.infer_shapes(folded)


def _constants(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    return {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}


def _dense_convolutions(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    shapes = _constants(model)
    found = []
    for node in model.graph.node:
        groups = next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)
        if node.op_type == "Conv" and groups == 1 and shapes.get(node.input[1], (0, 0))[1] >= _MIN_CHANNELS:
            found.append(node)
    return found


def _candidates(model: onnx.ModelProto, method: str) -> list[str]:
    """Names of the nodes that int8 makes faster or smaller, in the graph's order."""
    shapes = _constants(model)
    dense = {node.name for node in _dense_convolutions(model)}
    products = ("MatMul",) if method == "dynamic" else ("MatMul", "Gemm")
    names = []
    for node in model.graph.node:
        product = node.op_type in products and node.input[1] in shapes
        table = method == "dynamic" and node.op_type == "Gather" and len(shapes.get(node.input[0], ())) == 2
        if product or table or (method == "static" and node.name in dense):
            names.append(node.name)
    return names


def _quantised(
    source: onnx.ModelProto, method: str, nodes: Sequence[str], calibration: Sequence[Feeds], folder: Path
) -> onnx.ModelProto:
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_dynamic,
        quantize_static,
    )
    from onnxruntime.quantization.quant_utils import add_pre_process_metadata

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rows = iter(calibration)

        def get_next(self) -> dict[str, NDArray[Any]] | None:
            row = next(self.rows, None)
            return None if row is None else dict(row)

    copied = _copied(source)
    add_pre_process_metadata(copied)  # shapes are inferred; otherwise the quantiser warns through the root logger
    target = str(folder / "int8.onnx")
    with _quiet_root():
        if method == "dynamic":
            quantize_dynamic(
                copied,
                target,
                per_channel=True,
                op_types_to_quantize=list(_DYNAMIC),
                nodes_to_quantize=list(nodes),
                weight_type=QuantType.QInt8,
                reduce_range=True,
                extra_options={"MatMulConstBOnly": True},
            )
        else:
            quantize_static(
                copied,
                target,
                Reader(),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                op_types_to_quantize=list(_STATIC),
                nodes_to_quantize=[*nodes, *_activations(source, nodes)],
                calibration_cache_path=str(folder / "ranges.json"),  # the same for every attempt
                extra_options={"MatMulConstBOnly": True},
            )
    return onnx.load(target)


def _activations(model: onnx.ModelProto, nodes: Sequence[str]) -> list[str]:
    """Relu and Clip right behind the quantised nodes: int8 does them for nothing."""
    outputs = {node.output[0] for node in model.graph.node if node.name in set(nodes)}
    return [node.name for node in model.graph.node if node.op_type in ("Relu", "Clip") and node.input[0] in outputs]


@contextmanager
def _quiet_root() -> Iterator[None]:
    """The quantiser logs through the root logger, which installs a handler where there was none."""
    root = logging.getLogger()
    before = list(root.handlers)
    try:
        yield
    finally:
        for handler in set(root.handlers) - set(before):
            root.removeHandler(handler)


def _tidy(model: onnx.ModelProto) -> onnx.ModelProto:
    """Without the operator sets that no node uses, of which onnxruntime declares some."""
    used = {node.domain for node in model.graph.node} | {""}
    declared = [entry for entry in model.opset_import if entry.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(declared)
    return model


def _outputs(model: onnx.ModelProto, calibration: Sequence[Feeds]) -> list[NDArray[Any]]:
    """Every output [R, W] over all calibration inputs, R rows of a width W."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    runs = [session.run(None, dict(feeds)) for feeds in calibration]
    return [np.concatenate([out.reshape(-1, out.shape[-1]) for out in outs]) for outs in zip(*runs, strict=True)]


def _cosine(want: Sequence[NDArray[Any]], got: Sequence[NDArray[Any]]) -> float:
    """The least cosine of two rows; outputs of width 1 (logits of one pair) have none."""
    least = 1.0
    for a, b in zip(want, got, strict=True):
        if a.shape[1] > 1:
            lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
            least = min(least, float(((a * b).sum(axis=1) / np.maximum(lengths, 1e-12)).min()))
    return least if np.isfinite(least) else -1.0
