# SPDX-License-Identifier: Apache-2.0
"""The place that an export is written to, and what its model card may say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from safetensors import SafetensorError

from aced_sdk.errors import AcedError
from aced_sdk.files import printable, read_text, whole_folder


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


def replaceable(target: Path, mark: str) -> bool:
    """Whether nothing is there, or an older export whose config.json holds `mark`."""
    if not target.exists():
        return True
    if not target.is_dir():
        return False
    config = target / "config.json"
    return not any(target.iterdir()) or (config.is_file() and mark in read_text(config))


def front_matter(**values: str) -> str:
    """The head of a model card; each value stays one YAML string."""
    plain = {name: " ".join(printable(value, 200).split()) for name, value in values.items()}
    return f"---\n{yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=1000)}---\n\n"


def code_span(value: object) -> str:
    """A value from a config as code in Markdown."""
    text = printable(value, 1000).replace("`", "'")
    return f"`{' '.join(text.split())}`"
