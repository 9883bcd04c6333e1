# SPDX-License-Identifier: Apache-2.0
"""Saved students as ONNX and transformers folders, verified on save, and a small runtime that needs no torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from export.folders.to_timm import TimmReport, to_timm
    from export.folders.to_transformers import TransformersReport, to_transformers
    from export.onnx.report import ExportReport, GraphReport, Manifest
    from export.onnx.save import to_onnx, verify
    from export.onnx.vlm_vision import VlmVisionReport, vlm_vision_to_onnx
    from export.runtime.batcher import Batcher
    from export.runtime.encoder import OnnxEncoder
    from export.runtime.errors import ClosedError, EncoderError, FolderError, InputError, QueueFullError
    from export.runtime.parity import Parity, verify_folder
    from export.runtime.search import Hit, Search
    from export.runtime.zero_shot import Guess, ZeroShot
    from export.writing import ExportError

_HOME = {
    "Batcher": "export.runtime.batcher",
    "ClosedError": "export.runtime.errors",
    "EncoderError": "export.runtime.errors",
    "ExportError": "export.writing",
    "ExportReport": "export.onnx.report",
    "FolderError": "export.runtime.errors",
    "GraphReport": "export.onnx.report",
    "Guess": "export.runtime.zero_shot",
    "Hit": "export.runtime.search",
    "InputError": "export.runtime.errors",
    "Manifest": "export.onnx.report",
    "OnnxEncoder": "export.runtime.encoder",
    "Parity": "export.runtime.parity",
    "QueueFullError": "export.runtime.errors",
    "Search": "export.runtime.search",
    "TimmReport": "export.folders.to_timm",
    "TransformersReport": "export.folders.to_transformers",
    "VlmVisionReport": "export.onnx.vlm_vision",
    "ZeroShot": "export.runtime.zero_shot",
    "to_onnx": "export.onnx.save",
    "to_timm": "export.folders.to_timm",
    "to_transformers": "export.folders.to_transformers",
    "verify": "export.onnx.save",
    "verify_folder": "export.runtime.parity",
    "vlm_vision_to_onnx": "export.onnx.vlm_vision",
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
