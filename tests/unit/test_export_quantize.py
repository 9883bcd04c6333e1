# SPDX-License-Identifier: Apache-2.0
"""The search for what may be int8, on graphs small enough to know the answer."""

from __future__ import annotations

import logging

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.onnx.quantize import int8_graph
from export.writing import ExportError

WIDTH = 16


def products(*weights: np.ndarray) -> onnx.ModelProto:
    """x @ w0 @ w1 ..."""
    nodes, tensors, name = [], [], "x"
    for number, weight in enumerate(weights):
        tensors.append(numpy_helper.from_array(weight.astype(np.float32), f"w{number}"))
        nodes.append(helper.make_node("MatMul", [name, f"w{number}"], [f"y{number}"], name=f"product{number}"))
        name = f"y{number}"
    ends = [
        helper.make_tensor_value_info(end, TensorProto.FLOAT, ["n", size])
        for end, size in (("x", weights[0].shape[0]), (name, weights[-1].shape[1]))
    ]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model)


@pytest.fixture
def feeds() -> list[dict[str, np.ndarray]]:
    rows = np.random.default_rng(0).standard_normal((6, 1, WIDTH)).astype(np.float32)
    return [{"x": row} for row in rows]


def rotation(seed: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((WIDTH, WIDTH)))[0]


def test_what_costs_little_is_int8_as_a_whole(feeds: list[dict[str, np.ndarray]]) -> None:
    root = logging.getLogger()
    before = list(root.handlers)
    found = int8_graph(products(rotation(1), rotation(2), rotation(3)), feeds, 0.999)
    assert (found.method, found.quantised, found.kept) == ("dynamic", 3, ())
    assert 0.999 <= found.cosine < 1
    kinds = [tensor.data_type for tensor in found.model.graph.initializer if len(tensor.dims) == 2]
    assert kinds == [TensorProto.INT8] * 3
    assert root.handlers == before


def test_the_sensitive_product_stays_in_float(feeds: list[dict[str, np.ndarray]]) -> None:
    """The second product reads one huge activation, which leaves the others no resolution; the third drops it."""
    large = np.eye(WIDTH)
    large[0, 0] = 3000
    drop = np.eye(WIDTH)
    drop[0, 0] = 0
    found = int8_graph(products(large, np.eye(WIDTH), drop @ rotation(3)), feeds, 0.999)
    assert found.kept[:1] == ("product1",)
    assert "product0" not in found.kept
    assert found.quantised == 3 - len(found.kept)
    assert found.cosine >= 0.999


def test_no_int8_is_an_error(feeds: list[dict[str, np.ndarray]]) -> None:
    with pytest.raises(ExportError, match="no part of this graph can be int8 with a cosine of 1") as caught:
        int8_graph(products(rotation(1), rotation(2)), feeds, 1.0)
    assert caught.value.field == "int8_cosine"
