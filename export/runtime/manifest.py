# SPDX-License-Identifier: Apache-2.0
"""`export.json` and the digests in it, as the runtime reads them: every value is checked before it is used."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from aced_sdk.files import inside, printable, read_json, sha256
from export.runtime.cleaning import CLEANINGS
from export.runtime.errors import FolderError, folder_errors

MANIFEST = "export.json"
GEOMETRY = "preprocessor_config.json"
TOKENIZER = "tokenizer.json"
FORMAT = 3
PRECISIONS = ("fp32", "fp16", "int8")

# Names as in optimum and transformers.js, so that their users find what they know.
INPUTS: dict[str, tuple[str, ...]] = {
    "vision": ("pixel_values",),
    "text": ("input_ids",),
    "both": ("pixel_values", "input_ids"),
    "patches": ("pixel_values",),
}
OUTPUTS: dict[str, tuple[str, ...]] = {
    "vision": ("image_embeds",),
    "text": ("text_embeds",),
    "both": ("image_embeds", "text_embeds", "logits_per_image", "logits_per_text"),
    "patches": ("last_hidden_state",),
}
SHORT = "sequence_length"  # of `input_ids`: from 1 to the context length; the graph pads the rest

_MAX_BYTES = 4 * 2**20
_MAX_FILES = 1000
_MAX_LOGIT = 1e6
_MAX_WIDTH = 65_536  # of embeddings; tokens of a text


def read_manifest(folder: Path) -> dict[str, Any]:
    """`export.json` of an exported folder.

    Raises:
        FolderError: if it is missing, altered, of another format, or holds a value that no export writes.
    """
    path = folder / MANIFEST
    where = printable(path)
    if not os.path.lexists(path):
        raise FolderError(
            f"{printable(folder)} is no export: it has no {MANIFEST}",
            remedy="make one with export.to_onnx",
            field="directory",
        )
    with folder_errors():
        manifest = read_json(inside(folder, MANIFEST), _MAX_BYTES)
    known = {"kind": "onnx_dual_encoder", "format": FORMAT}
    if not isinstance(manifest, dict) or {key: manifest.get(key) for key in known} != known:
        raise FolderError(f"{where} is not an export of format {FORMAT}", remedy="export again, or update this package")
    missing = {
        "graphs",
        "files",
        "text",
        "source",
        "embedding_dim",
        "scale",
        "bias",
        "graph_bias",
        "pixels",
    } - manifest.keys()
    if missing:
        raise FolderError(f"{where} lacks {', '.join(sorted(missing))}", remedy="export the student again")
    check_digest(manifest, where)
    try:
        names = _checked(manifest)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise FolderError(
            f"{where} is no manifest: {printable(repr(error))}", remedy="export the student again"
        ) from None
    with folder_errors():
        for name in names:
            inside(folder, name)
    return manifest


def check_digest(manifest: Mapping[str, Any], where: str) -> None:
    """Refuse a manifest that was altered after the export.

    Raises:
        FolderError: if its `digest` is missing or another one.
    """
    if "digest" not in manifest:
        raise FolderError(
            f"{where} has no digest: it was altered, or written by an older version", remedy="export again"
        )
    if manifest["digest"] != manifest_digest(manifest):
        raise FolderError(f"{where} was altered after the export", remedy="export again")


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """sha256 of a manifest as it comes out of JSON, all but its own `digest`."""
    rest = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _checked(manifest: Mapping[str, Any]) -> list[str]:
    """The files that a manifest names; raises where a value is not what an export writes."""
    files, graphs, text, report = manifest["files"], manifest["graphs"], manifest["text"], manifest.get("report")
    for graph in graphs:
        part, precision, file = graph["part"], graph["precision"], graph["file"]
        _require(precision in PRECISIONS and file.endswith(".onnx"), "a graph's precision or file")
        _require(graph.get("data") in (None, f"{file}_data"), "a graph's data")
        _require(tuple(graph["inputs"]) == INPUTS[part] and tuple(graph["outputs"]) == OUTPUTS[part], "a graph's ends")
    names = [*files, *needed_files(graphs)]
    _require(all(isinstance(digest, str) for digest in files.values()) and len(names) <= _MAX_FILES, "files")
    _require(all(Path(name).as_posix() == name for name in names), "a file's name")
    _require(isinstance(manifest["source"]["weights_sha256"], str), "source")
    _require(isinstance(manifest["embedding_dim"], int) and 1 <= manifest["embedding_dim"] <= _MAX_WIDTH, "width")
    _require(0 < manifest["scale"] <= _MAX_LOGIT, "scale")
    _require(all(abs(manifest[name]) <= _MAX_LOGIT for name in ("bias", "graph_bias")), "bias")
    _require(manifest["pixels"] in ("float32", "uint8"), "pixels")
    if text is not None or any("input_ids" in graph["inputs"] for graph in graphs):
        _require(text["cleaning"] in CLEANINGS, "text cleaning")
        _require(isinstance(text["context_length"], int) and 1 <= text["context_length"] <= _MAX_WIDTH, "length")
    if report is not None:  # the export ended
        _require(files.keys() >= set(needed_files(graphs)), "files")
        values = [
            report["min_cosine"],
            *(graph[key] for graph in report["graphs"] for key in ("max_abs", "min_cosine")),
        ]
        _require(all(isinstance(value, float) for value in values) and 0 < values[0] <= 1, "report")
        measured = {(graph["part"], graph["precision"]) for graph in report["graphs"]}
        _require(measured == {(graph["part"], graph["precision"]) for graph in graphs}, "report")
    return names


def needed_files(graphs: Collection[Mapping[str, Any]]) -> list[str]:
    """The files that some graphs of a manifest need."""
    names = [graph[key] for graph in graphs for key in ("file", "data") if graph.get(key)]
    takes = {name for graph in graphs for name in INPUTS[graph["part"]]}
    return names + [GEOMETRY] * ("pixel_values" in takes) + [TOKENIZER] * ("input_ids" in takes)


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(f"unexpected {what}")


def check_files(folder: Path, digests: Mapping[str, str]) -> None:
    """Compare files with their sha256.

    Raises:
        FolderError: naming the first file that is missing, leads out of the folder, or is not the one that was written.
    """
    for name, expected in digests.items():
        with folder_errors():
            found = sha256(inside(folder, name))
        if found != expected:
            raise FolderError(
                f"{printable(folder / name)} is not the file that was exported", remedy="export the student again"
            )
