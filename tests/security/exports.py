# SPDX-License-Identifier: Apache-2.0
"""Exported folders as an attacker would write them: every digest fits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import typer
from onnx import TensorProto, helper
from PIL import Image
from tiny import exported
from typer.testing import CliRunner

import export
from aced_sdk.errors import AcedError
from export.cli import register
from export.runtime.manifest import manifest_digest

VISION = "onnx/vision_model.onnx"
FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


_MADE: list[Path] = []


def pristine_export(factory: pytest.TempPathFactory) -> Path:
    """A small student's export, made once; its student is beside it. Copy it before you change it."""
    if not _MADE:
        _MADE.append(exported(factory.mktemp("exports")))
    return _MADE[0]


def manifest_of(folder: Path) -> dict[str, Any]:
    """The values of export.json."""
    return dict(json.loads((folder / "export.json").read_text()))


def write_manifest(folder: Path, **changes: Any) -> Path:
    """Change values of export.json, and its digest with them."""
    values = manifest_of(folder) | changes
    (folder / "export.json").write_text(json.dumps(values | {"digest": manifest_digest(values)}))
    return folder


def put(folder: Path, name: str, content: bytes) -> Path:
    """Replace a file, and its digest with it."""
    path = folder / name
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    return sign(folder, name)


def sign(folder: Path, *names: str) -> Path:
    """Take the digests of some files anew."""
    digests = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    return write_manifest(folder, files=manifest_of(folder)["files"] | digests)


def change_json(folder: Path, name: str, change: Callable[[dict[str, Any]], object]) -> Path:
    """Change the values of a JSON file."""
    values = json.loads((folder / name).read_text())
    change(values)
    return put(folder, name, json.dumps(values).encode())


def constant(name: str, value: Any) -> TensorProto:
    """An int64 weight."""
    return onnx.numpy_helper.from_array(np.array(value, np.int64), name)


def model_of(
    nodes: Sequence[Any],
    weights: Sequence[TensorProto] = (),
    *,
    shape: Sequence[Any] = ("n", 3, 16, 16),
    width: int = 8,
    **options: Any,
) -> Any:
    """A vision graph that takes `pixel_values` and gives `image_embeds`, whatever its nodes do.

    The nodes may take `zeros` [n, width], and must give `last` of a shape that broadcasts to it.
    """
    plain = [
        helper.make_node("ReduceSum", ["pixel_values", "axes"], ["sums"], keepdims=0),
        helper.make_node("Unsqueeze", ["sums", "one"], ["column"]),
        helper.make_node("Mul", ["column", "row"], ["zeros"]),
        *nodes,
        helper.make_node("Add", ["zeros", "last"], ["image_embeds"]),
    ]
    row = onnx.numpy_helper.from_array(np.zeros((1, width), np.float32), "row")
    graph = helper.make_graph(
        plain,
        "graph",
        [helper.make_tensor_value_info("pixel_values", FLOAT, shape)],
        [helper.make_tensor_value_info("image_embeds", FLOAT, ["n", width])],
        initializer=[row, constant("axes", [1, 2, 3]), constant("one", [1]), *weights],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("f", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9, **options)


def embed(folder: str, **options: Any) -> tuple[int, ...]:
    """Load an export and embed a picture with it."""
    encoder = export.OnnxEncoder(folder, threads=1, parts=("vision",), **options)
    return tuple(encoder.encode_image([Image.new("RGB", (20, 20))]).shape)


def embed_text(folder: str, text: str = "a red square") -> tuple[int, ...]:
    """Load an export and embed a text with it."""
    return tuple(export.OnnxEncoder(folder, threads=1, parts=("text",)).encode_text([text]).shape)


def refusals(verb: Callable[..., Any], folders: dict[str, str], *more: Any) -> dict[str, str]:
    """Call a verb on many folders in one process; by name the error, or "returned". Raw errors go on."""
    found = {}
    for name, folder in folders.items():
        try:
            verb(folder, *more)
            found[name] = "returned"
        except AcedError as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def command(*options: str) -> BaseException | None:
    """What `aced export` raises."""
    app = typer.Typer()
    app.callback()(lambda: None)
    register(app)
    return CliRunner().invoke(app, ["export", *options]).exception
