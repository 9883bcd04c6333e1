# SPDX-License-Identifier: Apache-2.0
"""ONNX graphs in a transformers folder, as transformers.js expects them there."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx

from aced_sdk.files import inside, open_regular, printable
from export.runtime.errors import EncoderError
from export.runtime.graph_file import check_graph_file
from export.runtime.manifest import SHORT, check_files, read_manifest
from export.student import Source
from export.writing import ExportError


def lay_beside(export: Path, source: Source, folder: Path) -> None:
    """Copy an export's graphs into a transformers folder of the same student.

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
            onnx.checker.check_model(str(path))
            for value in onnx.load(str(path), load_external_data=False).graph.input:
                if value.name == "input_ids" and value.type.tensor_type.shape.dim[1].dim_param != SHORT:
                    raise ValueError("it does not pad texts")
    except Exception as error:  # onnx and protobuf raise many kinds for graphs of another make
        raise ExportError(
            f"{printable(export)} holds a graph that no export writes: {printable(error)}",
            remedy="export the student again",
            field="onnx",
        ) from error
