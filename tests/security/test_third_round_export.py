# SPDX-License-Identifier: Apache-2.0
"""Exports and saved searches that would end the process, give nonsense, or set the bar that they are measured by."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from open_clip.tokenizer import basic_clean, whitespace_clean
from PIL import Image

import export
from export.runtime.cleaning import clean_text
from export.runtime.search import Search
from tests.security.exports import (
    VISION,
    constant,
    embed,
    manifest_of,
    model_of,
    pristine_export,
    put,
    refusals,
    sign,
    write_manifest,
)
from tests.security.sandbox import run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pristine_export(tmp_path_factory)


def copy(made: Path, tmp_path: Path, name: str = "o") -> Path:
    return Path(shutil.copytree(made, tmp_path / name))


def node(operator: str, inputs: list[str], output: str, **attributes: Any) -> Any:
    return helper.make_node(operator, inputs, [output], **attributes)


TO_REAL = node("Cast", ["whole"], "last", to=TensorProto.FLOAT)
SMALLEST, MINUS = constant("smallest", [-(2**63)]), constant("minus", [-1])
DIVISIONS = {
    "constants": [node("Div", ["smallest", "minus"], "whole"), TO_REAL],
    "the rest": [node("Mod", ["smallest", "minus"], "whole"), TO_REAL],
    "a shape": [
        node("Shape", ["pixel_values"], "shape"),
        node("Sub", ["shape", "shape"], "none"),
        node("Add", ["none", "smallest"], "small"),
        node("Div", ["small", "minus"], "wholes"),
        node("ReduceSum", ["wholes"], "whole", keepdims=0),
        TO_REAL,
    ],
    "through a cast": [
        node("Cast", ["zeros"], "none", to=TensorProto.INT64),
        node("Add", ["none", "smallest"], "small"),
        node("Div", ["small", "minus"], "whole"),
        TO_REAL,
    ],
    "through a choice": [
        node("Equal", ["minus", "minus"], "yes"),
        node("Where", ["yes", "smallest", "minus"], "small"),
        node("Div", ["small", "minus"], "whole"),
        TO_REAL,
    ],
}


@pytest.mark.parametrize("name", DIVISIONS)
def test_integers_are_not_divided(made: Path, tmp_path: Path, name: str) -> None:
    """The smallest one by -1 ends the process."""
    folder = copy(made, tmp_path)
    put(folder, VISION, model_of(DIVISIONS[name], [SMALLEST, MINUS]).SerializeToString())
    assert run(embed, str(folder)).refused("divides what may be integers")


def test_real_numbers_are_divided(made: Path, tmp_path: Path) -> None:
    folder = copy(made, tmp_path)
    two = onnx.numpy_helper.from_array(np.array([2.0], np.float32), "two")
    nodes = [
        node("Add", ["zeros", "two"], "twos"),
        node("Transpose", ["twos"], "turned", perm=[1, 0]),
        node("Transpose", ["turned"], "back", perm=[1, 0]),
        node("Div", ["back", "twos"], "last"),
    ]
    put(folder, VISION, model_of(nodes, [two]).SerializeToString())
    assert run(embed, str(folder)).returned() == (1, 8)


def test_values_that_are_not_finite_are_named(made: Path, tmp_path: Path) -> None:
    folder = copy(made, tmp_path)
    minus = onnx.numpy_helper.from_array(np.array([-1.0], np.float32), "negative")
    put(folder, VISION, model_of([node("Log", ["negative"], "last")], [minus]).SerializeToString())
    assert run(embed, str(folder)).refused("not finite")


def test_a_scale_turns_no_ranking_round(made: Path, tmp_path: Path) -> None:
    folders = {}
    for name, scale in (("negative", -5.0), ("zero", 0.0), ("huge", 1e300)):
        folders[name] = str(write_manifest(copy(made, tmp_path, name), scale=scale))
    found = run(refusals, embed, folders).returned()
    assert all("scale" in text for text in found.values()), found


def _scrambled(made: Path, tmp_path: Path, least: float) -> Path:
    """An export with an int8 graph of other weights, whose manifest allows that."""
    folder = copy(made, tmp_path)
    model = onnx.load(folder / VISION)
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and tensor.raw_data:
            values = np.random.default_rng(0).permutation(np.frombuffer(tensor.raw_data, np.float32))
            tensor.raw_data = values.tobytes()
    name = "onnx/vision_model_quantized.onnx"
    onnx.save(model, folder / name)
    values = manifest_of(folder)
    same = {"part": "vision", "precision": "int8"}
    graph = next(graph for graph in values["graphs"] if graph["part"] == "vision")
    values["graphs"].append(graph | same | {"file": name})
    report = next(graph for graph in values["report"]["graphs"] if graph["part"] == "vision")
    values["report"]["graphs"].append(report | same)
    values["report"]["min_cosine"] = least
    write_manifest(folder, **values)
    return sign(folder, name)


def _verify(folder: Path, student: Path) -> float:
    return min(graph.min_cosine for graph in export.verify(folder, student).graphs)


@pytest.mark.parametrize("least", [-5.0, 1e-9])
def test_a_folder_does_not_choose_how_close_it_must_be(made: Path, tmp_path: Path, least: float) -> None:
    assert run(_verify, _scrambled(made, tmp_path, least), made.parent / "s", seconds=60).refused()


def _find(folder: Path, path: Path) -> list[float]:
    return [hit.cosine for hit in Search.load(path, export.OnnxEncoder(folder, threads=1)).query_text("a", 3)]


@pytest.mark.parametrize("value", [1e6, 3e38, 0.0, 1e-3])
def test_a_saved_search_holds_normalised_embeddings(made: Path, tmp_path: Path, value: float) -> None:
    source = manifest_of(made)["source"]["weights_sha256"]
    facts = np.frombuffer(json.dumps({"source": source, "keys": ["a", "b"]}).encode(), np.uint8)
    np.savez(tmp_path / "s.npz", facts=facts, embeddings=np.full((2, 8), value, np.float32))
    assert run(_find, made, tmp_path / "s.npz").refused("not L2-normalised")
    np.savez(tmp_path / "s.npz", facts=facts, embeddings=np.eye(8, dtype=np.float16)[:2].astype(np.float32))
    assert len(run(_find, made, tmp_path / "s.npz").returned()) == 2


def test_embeddings_of_half_precision_are_close_enough(made: Path) -> None:
    encoder = export.OnnxEncoder(made, threads=1)
    halves = encoder.encode_image([Image.new("RGB", (20, 20))]).astype(np.float16).astype(np.float32)
    search = Search(encoder)
    search.add(["a"], halves)
    assert search.query(halves[0], 1)[0].key == "a"


def _cleaned(count: int) -> str:
    return clean_text("&" + "amp;" * count, "lower")


def test_an_ampersand_is_cleaned_however_often_it_was_escaped() -> None:
    """In one round: with a round for each, this text would take minutes."""
    assert run(_cleaned, 50_000, seconds=20).returned() == "&"
    for text in ("&#38;amp;AMP;#x26;lt;b", "&amp;amp;quot;x&ampx;", "&amp;#38;eacute;", "<b>&amp;amp;"):
        assert clean_text(text, "whitespace") == whitespace_clean(basic_clean(text))
