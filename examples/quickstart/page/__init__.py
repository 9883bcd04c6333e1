# SPDX-License-Identifier: Apache-2.0
"""The demo's page: what goes on it, and how it is written."""

from examples.quickstart.page.assets import (
    CurvePoint,
    KindAccuracy,
    LicenceRow,
    OnnxFile,
    PageAssets,
    SelectionMoment,
    Thumb,
    VlmSample,
    ZeroShotExample,
)
from examples.quickstart.page.render import render_page

__all__ = [
    "CurvePoint",
    "KindAccuracy",
    "LicenceRow",
    "OnnxFile",
    "PageAssets",
    "SelectionMoment",
    "Thumb",
    "VlmSample",
    "ZeroShotExample",
    "render_page",
]
