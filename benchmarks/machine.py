# SPDX-License-Identifier: Apache-2.0
"""What every benchmark says of the machine it ran on, and how it hands out its figures."""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def machine(device: str) -> dict[str, Any]:
    """Name of the device (`cpu`, or the GPU's), the CPU's name, torch's threads and the versions that matter."""
    return {
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
        "cpu": processor(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "aced-sdk": _version("aced-sdk")},
    }


def processor() -> str:
    """The CPU's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def emit(result: dict[str, Any], output: Path | None) -> None:
    """Print one JSON object, and write it to a file too where one is named."""
    text = json.dumps(result, indent=2)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text + "\n", encoding="utf-8")
    print(text)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "unknown"
