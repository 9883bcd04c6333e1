# SPDX-License-Identifier: Apache-2.0
"""lmms-eval's own LLaVA on a local task."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tools.clients.inside import Check


def checks(folder: Path) -> Iterator[Check]:
    """The task's exact match."""
    yield Check("vlm/llava", "exact match", "lmms_eval --model llava_hf", partial(run, folder))


def run(folder: Path) -> float:
    """One run of the command."""
    with tempfile.TemporaryDirectory() as scratch:
        model = {"model": "llava_hf", "model_args": f"pretrained={folder / 'vlm/llava'},device_map=cpu"}
        options = model | {"tasks": "colours", "batch_size": "1", "include_path": str(folder / "lmms")}
        options |= {"output_path": scratch, "device": "cpu"}
        words = [word for name, value in options.items() for word in (f"--{name}", value)]
        # datasets are kept in HF_HOME; those of a local file have nothing to fetch
        environment = os.environ | {"HF_HOME": scratch}
        subprocess.run(
            [sys.executable, "-m", "lmms_eval", *words], cwd=scratch, check=True, stdout=sys.stderr, env=environment
        )
        (found,) = Path(scratch).rglob("*_results.json")
        return float(json.loads(found.read_text())["results"]["colours"]["exact_match,none"])
