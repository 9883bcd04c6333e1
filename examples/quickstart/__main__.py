# SPDX-License-Identifier: Apache-2.0
"""`make demo`, `make demo FULL=1`, `make demo APT=1`: FULL and APT are read from the environment."""

from __future__ import annotations

import json
import os
import sys

from aced_sdk.errors import AcedError
from examples.quickstart.demo import run_demo
from examples.quickstart.settings import FULL, Settings


def _asked(name: str) -> bool:
    return os.environ.get(name, "") not in ("", "0")


def main() -> int:
    """Run the demo, say where the page is; 1 if it had to stop."""
    settings = FULL if _asked("FULL") else Settings()
    if _asked("APT"):
        settings = settings.replace(apt=True, directory=settings.directory.with_name(settings.directory.name + "-apt"))
    try:
        summary = run_demo(settings)
    except AcedError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    shown = {name: round(figures["zero_shot"], 4) for name, figures in summary["methods"].items()}
    vlm, onnx = summary["vlm"], summary["onnx"]
    print(f"zero-shot (top-5): {json.dumps(shown)}")
    print(f"answers right: {vlm['accuracy']:.3f}, with shuffled pictures {vlm['blind_accuracy']:.3f}")
    zero_shot = f"{onnx['zero_shot_onnx']:.4f} (torch {onnx['zero_shot_torch']:.4f})"
    print(f"ONNX: largest difference {onnx['max_abs_diff']:.1e}, zero-shot {zero_shot}")
    print(f"took {summary['seconds']['total'] / 60:.1f} min; look at {settings.directory / 'report.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
