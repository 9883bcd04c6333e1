# SPDX-License-Identifier: Apache-2.0
"""Progress bars, event logs (JSON lines) and self-contained HTML reports."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aced_sdk.reporting.jsonl import JsonlWriter, read_events
    from aced_sdk.reporting.progress import Progress, Stages

__all__ = ["JsonlWriter", "Progress", "Stages", "read_events"]

_HOMES = {
    "JsonlWriter": "jsonl",
    "read_events": "jsonl",
    "Progress": "progress",
    "Stages": "progress",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
