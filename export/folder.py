# SPDX-License-Identifier: Apache-2.0
"""The place that an export is written to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from aced_sdk.files import whole_folder
from export.report import ExportError


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
