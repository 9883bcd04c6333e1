# SPDX-License-Identifier: Apache-2.0
"""Preprocessing that needs numpy and Pillow alone; the ONNX runtime uses it too."""

from aced_sdk.processing.plain.pictures import FORMATS, PictureError, open_picture, to_rgb

__all__ = ["FORMATS", "PictureError", "open_picture", "to_rgb"]
