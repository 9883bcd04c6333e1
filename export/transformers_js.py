# SPDX-License-Identifier: Apache-2.0
"""ONNX graphs in a transformers folder, as transformers.js expects them there."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx

from aced_sdk.files import inside, open_regular, printable
from export.errors import EncoderError
from export.graph_file import check_graph_file
from export.manifest import check_files, read_manifest
from export.report import ExportError, Source

_INPUT = "input_ids"


def lay_beside(export: Path, source: Source, folder: Path) -> None:
    """Copy an export's graphs into a transformers folder of the same student.

    transformers.js pads texts to the longest of a batch, as transformers does, where ours have the student's whole
    context: the copies pad the rest themselves.

    Args:
        export: a folder that `to_onnx` wrote.
        source: what identifies the student.
        folder: gets `onnx/`.

    Raises:
        ExportError: if the export is altered, another student's, or takes pictures as transformers.js gives none.
    """
    try:
        manifest = read_manifest(export)
        check_files(export, manifest["files"])
    except EncoderError as error:
        raise ExportError(error.cause, remedy=error.remedy, field="onnx") from None
    if Source(**manifest["source"]) != source:
        raise ExportError(
            f"{export} was made from another student", remedy="export this one with to_onnx", field="onnx"
        )
    if manifest.get("pixels", "float32") != "float32":
        raise ExportError(
            f"the graphs of {export} take uint8 pictures, and transformers.js gives normalised ones",
            remedy="export with preprocess_in_graph=False",
            field="onnx",
        )
    (folder / "onnx").mkdir()
    for name in manifest["files"]:
        if Path(name).parent == Path("onnx"):
            with open_regular(inside(export, name)) as source_file, (folder / name).open("wb") as copy:
                shutil.copyfileobj(source_file, copy)
    try:
        for path in sorted((folder / "onnx").glob("*.onnx")):
            data = path.with_name(f"{path.name}_data")
            check_graph_file(path, data.name if data.exists() else None)
            model = onnx.load(str(path), load_external_data=False)
            if any(value.name == _INPUT for value in model.graph.input):
                _pad_inside(model, manifest["text"]["context_length"], manifest["text"]["pad_id"])
                onnx.save_model(model, str(path))
                onnx.checker.check_model(str(path))
    except Exception as error:  # onnx and protobuf raise many kinds for graphs of another make
        raise ExportError(
            f"{printable(export)} holds a graph that no export writes: {printable(error)}",
            remedy="export the student again",
            field="onnx",
        ) from error


def _pad_inside(model: onnx.ModelProto, length: int, pad_id: int) -> None:
    """Let `input_ids` [N, L] be shorter than L: the graph's first nodes pad them, by which no value changes."""
    graph, padded = model.graph, f"{_INPUT}_padded"
    for node in graph.node:
        node.input[:] = [padded if name == _INPUT else name for name in node.input]
    (given,) = (value for value in graph.input if value.name == _INPUT)
    given.type.tensor_type.shape.dim[1].ClearField("dim_value")
    given.type.tensor_type.shape.dim[1].dim_param = "sequence_length"
    constants = {"zero": [0], "length": [length], "pad": pad_id, "axis": [1]}
    for name, value in constants.items():
        graph.initializer.append(onnx.numpy_helper.from_array(np.array(value, np.int64), f"{padded}_{name}"))
    own = onnx.helper.make_node
    nodes = [
        own("Shape", [_INPUT], [f"{padded}_given"], start=1, end=2),
        own("Sub", [f"{padded}_length", f"{padded}_given"], [f"{padded}_missing"]),
        own("Concat", [f"{padded}_zero", f"{padded}_missing"], [f"{padded}_pads"], axis=0),
        own("Pad", [_INPUT, f"{padded}_pads", f"{padded}_pad", f"{padded}_axis"], [padded]),
    ]
    for node in reversed(nodes):
        graph.node.insert(0, node)
