# SPDX-License-Identifier: Apache-2.0
"""The place that an export is written to, and what its model card may say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from safetensors import SafetensorError

from aced_sdk.config import Config
from aced_sdk.errors import AcedError
from aced_sdk.files import printable, read_text, sha256, whole_folder, write_json
from export.runtime.manifest import MANIFEST, manifest_digest


class ExportError(AcedError):
    """An export that does not agree with its student, or cannot be made or read."""


@contextmanager
def export_folder(target: Path) -> Iterator[Path]:
    """`whole_folder` of an export.

    Raises:
        ExportError: if it cannot be written: no place left, no permission.
    """
    try:
        with whole_folder(target) as folder:
            yield folder
    except (OSError, SafetensorError) as error:  # the second is what transformers' writer makes of a full disk
        raise ExportError(
            f"the export cannot be written to {target}: {error}",
            remedy="free disk space, or check permissions",
            field="directory",
        ) from error


def check_target(target: Path, file: str, mark: str = "") -> None:
    """Refuse to replace what is no older export.

    Args:
        target: the folder to write. It may be missing or empty.
        file: a file that an older export holds.
        mark: a text in that file.

    Raises:
        ExportError: if something else is there.
    """
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not (target / file).is_file() or (mark and mark not in read_text(target / file)):
        raise ExportError(
            f"{target} holds something else than an export", remedy="name a new or an empty folder", field="directory"
        )


def write_manifest(folder: Path, manifest: Config) -> None:
    """Write `export.json` with its own digest; the last file of an ONNX folder."""
    values = json.loads(manifest.model_dump_json())
    write_json(folder / MANIFEST, values | {"digest": manifest_digest(values)})


def all_digests(folder: Path) -> dict[str, str]:
    """sha256 of every file but the manifest, by its relative name."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {name: sha256(folder / name) for name in names if name != MANIFEST}


def front_matter(**values: str) -> str:
    """The head of a model card; each value stays one YAML string."""
    plain = {name: " ".join(printable(value, 200).split()) for name, value in values.items()}
    return f"---\n{yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=1000)}---\n\n"


def code_span(value: object) -> str:
    """A value from a config as code in Markdown."""
    text = printable(value, 1000).replace("`", "'")
    return f"`{' '.join(text.split())}`"
