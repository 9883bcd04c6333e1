# SPDX-License-Identifier: Apache-2.0
"""ONNX graphs of an attacker in an exported folder whose digests all fit."""

from __future__ import annotations

import os
import re
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

import export
from export.runtime import graph_file
from tests.security.exports import (
    FLOAT,
    INT64,
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

REFUSED = "no graph that an export writes"


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine_export(tmp_path_factory), tmp_path / "o"))


def ones(name: str, shape: str) -> Any:
    """A node that fills a tensor."""
    value = onnx.numpy_helper.from_array(np.ones(1, np.float32))
    return helper.make_node("ConstantOfShape", [shape], [name], value=value)


def total(name: str) -> Any:
    """A node that sums a tensor up to the graph's last value."""
    return helper.make_node("ReduceSum", [name], ["last"], keepdims=0)


def body(kind: str) -> Any:
    """A subgraph."""
    ends = {
        "Loop": ([("i", INT64), ("c", 9), ("v", FLOAT)], [("co", 9), ("vo", FLOAT)]),
        "If": ([], [("vo", FLOAT)]),
        "Scan": ([("v", FLOAT), ("x", FLOAT)], [("vo", FLOAT), ("xo", FLOAT)]),
    }[kind]
    nodes = {
        "Loop": [helper.make_node("Identity", ["c"], ["co"]), helper.make_node("Add", ["v", "v"], ["vo"])],
        "If": [helper.make_node("Identity", ["zeros"], ["vo"])],
        "Scan": [helper.make_node("Add", ["v", "x"], ["vo"]), helper.make_node("Identity", ["x"], ["xo"])],
    }[kind]
    given, out = ([helper.make_tensor_value_info(name, t, None) for name, t in side] for side in ends)
    return helper.make_graph(nodes, "body", given, out)


def loop(kind: str) -> Any:
    """A graph with control flow."""
    if kind == "Loop":
        nodes = [helper.make_node("Loop", ["count", "", "zeros"], ["last"], body=body("Loop"))]
        return model_of(nodes, [constant("count", 10**15)])
    if kind == "If":
        yes = onnx.numpy_helper.from_array(np.array(True), "yes")
        branches = {"then_branch": body("If"), "else_branch": body("If")}
        return model_of([helper.make_node("If", ["yes"], ["last"], **branches)], [yes])
    scan = helper.make_node("Scan", ["zeros", "zeros"], ["last", "rest"], body=body("Scan"), num_scan_inputs=1)
    return model_of([scan])


def functions() -> Any:
    """Functions that call one another twice: 2**40 additions."""
    made = [helper.make_function("f", "f0", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])], [])]
    for n in range(1, 40):
        calls = [helper.make_node(f"f{n - 1}", [a], [b], domain="f") for a, b in (("a", "t"), ("t", "b"))]
        made.append(helper.make_function("f", f"f{n}", ["a"], ["b"], calls, []))
    for function in made:
        function.opset_import.extend([helper.make_opsetid("", 20), helper.make_opsetid("f", 1)])
    return model_of([helper.make_node("f39", ["zeros"], ["last"], domain="f")], functions=made)


def sparse() -> Any:
    """A weight of 10**12 zeroes in a few bytes."""
    model = model_of([total("s")])
    values = helper.make_tensor("s", FLOAT, [1], [1.0])
    indices = helper.make_tensor("s_i", INT64, [1], [0])
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [10**6, 10**6]))
    return model


def elsewhere(location: str) -> Any:
    """A weight in another file."""
    weight = helper.make_tensor("s", FLOAT, [4], [0.0] * 4)
    weight.ClearField("float_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", "16")):
        entry = weight.external_data.add()
        entry.key, entry.value = key, value
    return model_of([total("s")], [weight])


def reads_files() -> Any:
    """A node whose kernel opens the file that it names."""
    attributes = {"embed_mode": 0, "ep_cache_context": "../../secret", "main_context": 1}
    return model_of([helper.make_node("EPContext", ["zeros"], ["last"], domain="com.microsoft", **attributes)])


def crowd() -> Any:
    """More nodes than any tower has."""
    names = ["zeros", *(f"a{n}" for n in range(30_000)), "last"]
    return model_of([helper.make_node("Neg", [a], [b]) for a, b in pairwise(names)])


def texts() -> Any:
    """A text that doubles forty times; onnxruntime's arena does not hold texts."""
    word = helper.make_tensor("t0", onnx.TensorProto.STRING, [1], [b"a" * 1000])
    nodes = [helper.make_node("StringConcat", [f"t{n}", f"t{n}"], [f"t{n + 1}"]) for n in range(40)]
    return model_of([*nodes, helper.make_node("Cast", ["t40"], ["last"], to=FLOAT)], [word])


GRAPHS = {
    "loop": lambda: loop("Loop"),
    "if": lambda: loop("If"),
    "scan": lambda: loop("Scan"),
    "functions": functions,
    "sparse weights": sparse,
    "weights in a parent": lambda: elsewhere("../../../secret"),
    "weights by an absolute path": lambda: elsewhere("/etc/hostname"),
    "weights in memory": lambda: elsewhere("*/_ORT_MEM_ADDR_/*"),
    "weights in the tokenizer": lambda: elsewhere("../tokenizer.json"),
    "weights in no file": lambda: elsewhere(""),
    "a node that reads files": reads_files,
    "operators of nobody": lambda: model_of([helper.make_node("Neg", ["zeros"], ["last"], domain="f")]),
    "a crowd": crowd,
    "texts": texts,
}


def test_graphs_that_are_no_chain_of_nodes(folder: Path, tmp_path: Path) -> None:
    folders = {name: str(shutil.copytree(folder, tmp_path / name)) for name in GRAPHS}
    for name, place in folders.items():
        put(Path(place), VISION, GRAPHS[name]().SerializeToString())
    for name, error in run(refusals, embed, folders, seconds=60).returned().items():
        assert REFUSED in error, (name, error)


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"garbage" * 100,
        b"ORTM" + bytes(1000),
        varint(7 << 3 | 2) + varint(2**40),  # a graph of a terabyte
        varint(2**32 + (7 << 3 | 2)) + varint(2) + b"\x08\x01",  # a field number that wraps around
        varint(7 << 3 | 3) + b"\x08\x01",  # a group
        b"\x08" + b"\xff" * 11,
        b"\x08\x01" * 600_000,
    ],
)
def test_files_that_are_no_onnx(folder: Path, content: bytes) -> None:
    put(folder, VISION, content)
    with pytest.raises(export.FolderError, match=REFUSED):
        embed(str(folder))


def test_graphs_that_are_cut_or_flipped(folder: Path, tmp_path: Path) -> None:
    whole = (folder / VISION).read_bytes()
    generator = np.random.default_rng(0)
    folders = {}
    for n in range(24):
        content = bytearray(whole[: generator.integers(1, len(whole) + 1)] if n % 2 else whole)
        for _ in range(1 + n % 3):
            content[generator.integers(0, min(len(content), 6000))] ^= 1 << generator.integers(0, 8)
        folders[str(n)] = str(shutil.copytree(folder, tmp_path / str(n)))
        put(Path(folders[str(n)]), VISION, bytes(content))
    assert len(run(refusals, embed, folders, seconds=60).returned()) == len(folders)


def test_the_fields_that_are_looked_into_are_those_of_onnx() -> None:
    for message, fields in (*graph_file.MESSAGES.items(), *graph_file.REFUSED.items()):
        known = getattr(onnx, message).DESCRIPTOR.fields_by_number
        for number, name in fields.items():
            assert name in (known[number].name, getattr(known[number].message_type, "name", None))
    refused = {name for fields in graph_file.REFUSED.values() for name in fields.values()}
    looked_into = {"GraphProto", "NodeProto", "TensorProto", "AttributeProto", "StringStringEntryProto"}
    for message, fields in graph_file.MESSAGES.items():  # no other field leads to nodes or weights
        for field in getattr(onnx, message).DESCRIPTOR.fields:
            if getattr(field.message_type, "name", None) in looked_into | {"SparseTensorProto", "FunctionProto"}:
                assert field.number in fields or field.name in refused | {"metadata_props"}, field.full_name


def wide(size: int) -> Any:
    """A constant of this many numbers, summed up."""
    return model_of([ones("z", "size"), total("z")], [constant("size", [size])])


def doubled(times: int) -> Any:
    """A tensor that doubles again and again."""
    names = ["zeros", *(f"c{n}" for n in range(times))]
    nodes = [helper.make_node("Concat", [a, a], [b], axis=0) for a, b in pairwise(names)]
    return model_of([*nodes, total(names[-1])])


@pytest.mark.parametrize(
    "model", [wide(10**12), wide(5 * 10**10), doubled(50)], ids=["4 TB", "200 GB", "doubled fifty times"]
)
def test_graphs_that_fill_the_memory(folder: Path, model: Any) -> None:
    put(folder, VISION, model.SerializeToString())
    outcome = run(embed, str(folder), mib=1500)
    assert outcome.refused("EncoderError", "cannot run the vision graph")
    assert outcome.mib < 1000


def _embed_in_little_memory(folder: str) -> tuple[int, ...]:
    from export.runtime import sessions

    sessions._MEMORY_SHARE = 2**28 / (os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return embed(folder)


def test_memory_is_bounded_by_the_runtime_itself(folder: Path) -> None:
    put(folder, VISION, doubled(30).SerializeToString())
    outcome = run(_embed_in_little_memory, str(folder), mib=16_000)
    assert outcome.refused("EncoderError", "Available memory of")
    assert outcome.mib < 600


def products(count: int, first: str) -> Any:
    """Products of two matrices of 1500 x 1500, one after the other."""
    nodes = [helper.make_node("MatMul", [f"a{n}", f"a{n}"], [f"a{n + 1}"]) for n in range(count)]
    weights = [constant("size", [1500, 1500])]
    if first == "given":  # the shape follows from the pictures, so that nothing can be computed beforehand
        nodes = [
            helper.make_node("Shape", ["zeros"], ["rows"], start=0, end=1),
            helper.make_node("Mul", ["rows", "size"], ["shape"]),
            ones("a0", "shape"),
            *nodes,
        ]
    else:
        nodes = [ones("a0", "size"), *nodes]
    return model_of([*nodes, total(f"a{count}")], weights)


def _embed_in_a_second(folder: str) -> tuple[int, ...]:
    from export.runtime import sessions

    sessions.SECONDS_PER_ROW = 1.0
    return embed(folder)


@pytest.mark.parametrize("first", ["given", "constant"])
def test_long_computations_are_stopped_and_not_done_on_load(folder: Path, first: str) -> None:
    put(folder, VISION, products(400, first).SerializeToString())
    assert run(_embed_in_a_second, str(folder), seconds=15).refused("EncoderError", "terminate")


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (model_of([total("zeros")], shape=["n", 3, 512, 512]), "not what its folder says"),
        (model_of([total("zeros")], shape=["n", 3, "h", "w"]), "not what its folder says"),
        (model_of([total("zeros")], width=9), "gives image_embeds of shape [1, 9]"),
    ],
    ids=["other size", "free size", "other width"],
)
def test_ends_that_do_not_fit_the_folder(folder: Path, model: Any, words: str) -> None:
    put(folder, VISION, model.SerializeToString())
    with pytest.raises(export.FolderError, match=re.escape(words)):
        embed(str(folder))


def test_another_name_or_type_of_the_output(folder: Path) -> None:
    model = model_of([total("zeros")])
    model.graph.node.append(helper.make_node("Cast", ["image_embeds"], ["words"], to=onnx.TensorProto.STRING))
    model.graph.output[0].name, model.graph.output[0].type.tensor_type.elem_type = "words", onnx.TensorProto.STRING
    put(folder, VISION, model.SerializeToString())
    with pytest.raises(export.FolderError, match="not what its folder says"):
        embed(str(folder))


def test_external_weights_of_the_manifest_must_be_in_the_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(np.full(4, 7, np.float32).tobytes())
    data = f"{VISION}_data"
    put(folder, VISION, elsewhere("vision_model.onnx_data").SerializeToString())
    vision, text = manifest_of(folder)["graphs"]
    write_manifest(folder, graphs=[vision | {"data": data}, text])
    put(folder, data, bytes(16))
    assert embed(str(folder)) == (1, 8)  # as an export writes it
    (folder / data).unlink()
    (folder / data).symlink_to(tmp_path / "secret")
    sign(folder, data)
    for check in (True, False):
        with pytest.raises(export.FolderError, match="leads out of the folder"):
            embed(str(folder), check=check)
