# SPDX-License-Identifier: Apache-2.0
"""Saved students as ONNX and transformers folders, verified on save, and a small runtime that needs no torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from export.errors import EncoderError, FolderError, InputError
    from export.report import ExportError, ExportReport, GraphReport, Manifest
    from export.runtime import OnnxEncoder
    from export.save import to_onnx, verify
    from export.transformers_folder import TransformersReport, to_transformers

_HOME = {
    "EncoderError": "export.errors",
    "FolderError": "export.errors",
    "InputError": "export.errors",
    "ExportError": "export.report",
    "ExportReport": "export.report",
    "GraphReport": "export.report",
    "Manifest": "export.report",
    "OnnxEncoder": "export.runtime",
    "TransformersReport": "export.transformers_folder",
    "to_onnx": "export.save",
    "to_transformers": "export.transformers_folder",
    "verify": "export.save",
}

__all__ = [
    "EncoderError",
    "ExportError",
    "ExportReport",
    "FolderError",
    "GraphReport",
    "InputError",
    "Manifest",
    "OnnxEncoder",
    "TransformersReport",
    "to_onnx",
    "to_transformers",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'export' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
