# SPDX-License-Identifier: Apache-2.0
"""Graphs and side files of exports that are read in two ways."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import AttributeProto, TensorProto, helper

from export.runtime.arrays import read_arrays
from export.runtime.cleaning import clean_text
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


@pytest.mark.parametrize("name", ["a.npy", "b.npy"])
def test_members_of_an_npz_do_not_overlap(tmp_path: Path, name: str) -> None:
    """A file whose list of members points to the same bytes again and again takes more memory than it has bytes."""
    array = io.BytesIO()
    np.save(array, np.zeros(2**20, np.uint8))
    with zipfile.ZipFile(tmp_path / "e.npz", "w") as archive:
        archive.writestr("a.npy", array.getvalue())
        again = zipfile.ZipInfo(name)
        first = archive.infolist()[0]
        again.header_offset, again.CRC = first.header_offset, first.CRC
        again.file_size = again.compress_size = first.file_size
        archive.filelist.append(again)
    assert run(read_arrays, tmp_path / "e.npz", 2**30).refused(
        "same name" if name == "a.npy" else "larger than the file"
    )


@pytest.mark.parametrize("piece", ["#65286;", "#xFF06;", "#38;", "amp;"])
def test_nested_escapes_are_cleaned_in_linear_time(piece: str) -> None:
    """Each level took a round over the whole text."""
    outcome = run(clean_text, "&" + piece * 100_000 + "lt;b", "lower", seconds=5)
    assert outcome.returned() == "<b"


def test_escapes_that_feed_each_other_end() -> None:
    text = ";"
    while len(text) < 9_900:
        text = f"&amp{text}semi;"
    assert run(clean_text, text, "lower", seconds=5).kind == "returned"


def test_the_service_says_in_one_line_why_it_does_not_start(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "examples.service", str(tmp_path / "none")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert ended.stderr.startswith("FolderError: ")
    assert len(ended.stderr.splitlines()) == 1
