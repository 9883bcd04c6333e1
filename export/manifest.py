# SPDX-License-Identifier: Apache-2.0
"""`export.json` and the hashes in it, as the runtime reads them: nothing of it is trusted before it is looked at."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from export.cleaning import CLEANINGS
from export.errors import FolderError

MANIFEST = "export.json"
FORMAT = 2


def read_manifest(folder: Path) -> dict[str, Any]:
    """`export.json` of an exported folder.

    Raises:
        FolderError: if it is missing, unreadable or of another format.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise FolderError(
            f"{folder} is no export: it has no {MANIFEST}", remedy="make one with export.to_onnx", field="directory"
        ) from None
    except (ValueError, RecursionError) as error:
        raise FolderError(f"{path} is not JSON: {error}", remedy="export the student again") from None
    known = {"kind": "onnx_dual_encoder", "format": FORMAT}
    if not isinstance(manifest, dict) or {key: manifest.get(key) for key in known} != known:
        raise FolderError(f"{path} is not an export of format {FORMAT}", remedy="export again, or update this package")
    missing = {"graphs", "files", "text", "source", "embedding_dim", "scale", "bias", "pixels"} - manifest.keys()
    if missing:
        raise FolderError(f"{path} lacks {', '.join(sorted(missing))}", remedy="export the student again")
    if "digest" in manifest and manifest["digest"] != manifest_digest(manifest):  # older exports have none
        raise FolderError(f"{path} was altered after the export", remedy="export the student again")
    try:
        outside = [name for name in _names(manifest) if Path(name).is_absolute() or ".." in Path(name).parts]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FolderError(f"{path} is no manifest: {error!r}", remedy="export the student again") from None
    if outside:
        raise FolderError(f"{path} names a file outside of its folder: {outside[0]}", remedy="do not use this folder")
    if manifest["text"] and manifest["text"]["cleaning"] not in CLEANINGS:
        raise FolderError(f"{path} names an unknown text cleaning", remedy="update this package")
    return manifest


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """sha256 of a manifest as it comes out of JSON, all but its own `digest`."""
    rest = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _names(manifest: Mapping[str, Any]) -> list[str]:
    """The files that a manifest names; fails where it lacks what the runtime reads."""
    names = list(dict(manifest["files"]))
    for graph in manifest["graphs"]:
        _ = graph["part"], graph["precision"], tuple(graph["inputs"]), tuple(graph["outputs"])
        names += [graph["file"]] + ([graph["data"]] if graph.get("data") else [])
    _ = manifest["source"]["weights_sha256"], int(manifest["embedding_dim"])
    _ = float(manifest["scale"]), float(manifest["bias"])
    if manifest["text"]:
        _ = manifest["text"]["cleaning"], int(manifest["text"]["context_length"])
    return names


def check_files(folder: Path, hashes: dict[str, str]) -> None:
    """Compare files with their sha256.

    Raises:
        FolderError: naming the first file that is missing or not the one that was written.
    """
    for name, expected in hashes.items():
        try:
            with (folder / name).open("rb") as stream:
                found = hashlib.file_digest(stream, "sha256").hexdigest()
        except (OSError, ValueError):
            raise FolderError(f"{folder / name} is missing", remedy="export the student again") from None
        if found != expected:
            raise FolderError(f"{folder / name} is not the file that was exported", remedy="export the student again")
