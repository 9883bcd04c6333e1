# SPDX-License-Identifier: Apache-2.0
"""Saved students as ONNX and transformers folders, verified on save, and a small runtime that needs no torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from export.batcher import Batcher
    from export.errors import ClosedError, EncoderError, FolderError, InputError, QueueFullError
    from export.parity import Parity, verify_folder
    from export.report import ExportError, ExportReport, GraphReport, Manifest
    from export.runtime import OnnxEncoder
    from export.save import to_onnx, verify
    from export.search import Hit, Search
    from export.timm_folder import TimmReport, to_timm
    from export.transformers_folder import TransformersReport, to_transformers
    from export.vlm_graph import VlmVisionReport, vlm_vision_to_onnx
    from export.zero_shot import Guess, ZeroShot

_HOME = {
    "Batcher": "export.batcher",
    "ClosedError": "export.errors",
    "EncoderError": "export.errors",
    "ExportError": "export.report",
    "ExportReport": "export.report",
    "FolderError": "export.errors",
    "GraphReport": "export.report",
    "Guess": "export.zero_shot",
    "Hit": "export.search",
    "InputError": "export.errors",
    "Manifest": "export.report",
    "OnnxEncoder": "export.runtime",
    "Parity": "export.parity",
    "QueueFullError": "export.errors",
    "Search": "export.search",
    "TimmReport": "export.timm_folder",
    "TransformersReport": "export.transformers_folder",
    "VlmVisionReport": "export.vlm_graph",
    "ZeroShot": "export.zero_shot",
    "to_onnx": "export.save",
    "to_timm": "export.timm_folder",
    "to_transformers": "export.transformers_folder",
    "verify": "export.save",
    "verify_folder": "export.parity",
    "vlm_vision_to_onnx": "export.vlm_graph",
}

__all__ = [
    "Batcher",
    "ClosedError",
    "EncoderError",
    "ExportError",
    "ExportReport",
    "FolderError",
    "GraphReport",
    "Guess",
    "Hit",
    "InputError",
    "Manifest",
    "OnnxEncoder",
    "Parity",
    "QueueFullError",
    "Search",
    "TimmReport",
    "TransformersReport",
    "VlmVisionReport",
    "ZeroShot",
    "to_onnx",
    "to_timm",
    "to_transformers",
    "verify",
    "verify_folder",
    "vlm_vision_to_onnx",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'export' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
