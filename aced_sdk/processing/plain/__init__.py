# SPDX-License-Identifier: Apache-2.0
"""Preprocessing that needs numpy and Pillow alone; the ONNX runtime uses it too."""

from aced_sdk.processing.plain.pictures import FORMATS, PictureError, open_picture, read_header, to_rgb
from aced_sdk.processing.plain.tokenizers import read_tokenizer

__all__ = ["FORMATS", "PictureError", "open_picture", "read_header", "read_tokenizer", "to_rgb"]
