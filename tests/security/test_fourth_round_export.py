# SPDX-License-Identifier: Apache-2.0
"""Graphs and side files of exports that are read in two ways."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import AttributeProto, TensorProto, helper

from tests.security.exports import VISION, constant, embed, model_of, pristine_export, put
from tests.security.sandbox import run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pristine_export(tmp_path_factory)


SMALLEST = onnx.numpy_helper.from_array(np.array([-(2**63)], np.int64))
INTEGER, REAL = helper.make_attribute("value", SMALLEST), helper.make_attribute("value_float", 1.0)


def both() -> AttributeProto:
    """One attribute with an integer and a real value."""
    attribute = helper.make_attribute("value", onnx.numpy_helper.from_array(np.array([1.0], np.float32)))
    attribute.ints.append(-(2**63))
    attribute.type = AttributeProto.INTS
    return attribute


@pytest.mark.parametrize(
    ("operator", "attributes"),
    [
        ("Constant", [INTEGER, REAL]),
        ("Constant", [INTEGER, helper.make_attribute("dtype", TensorProto.FLOAT)]),
        ("Constant", [INTEGER, INTEGER]),
        ("Constant", [both()]),
        ("Constant", []),
        ("ConstantOfShape", [INTEGER, REAL]),
        ("Cast", [helper.make_attribute("to", TensorProto.INT64), helper.make_attribute("to", TensorProto.FLOAT)]),
    ],
)
def test_a_node_names_one_type(made: Path, tmp_path: Path, operator: str, attributes: list[Any]) -> None:
    """Of two values onnxruntime takes the first, and divides integers where real numbers were seen."""
    folder = Path(shutil.copytree(made, tmp_path / "o"))
    node = helper.make_node(operator, [] if operator == "Constant" else ["ones"], ["small"])
    node.attribute.extend(attributes)
    divided = helper.make_node("Mod", ["small", "minus"], ["whole"])
    real = helper.make_node("Cast", ["whole"], ["last"], to=TensorProto.FLOAT)
    weights = [constant("minus", [-1]), constant("ones", [1])]
    put(folder, VISION, model_of([node, divided, real], weights).SerializeToString())
    assert run(embed, str(folder)).refused("no graph that an export writes")
