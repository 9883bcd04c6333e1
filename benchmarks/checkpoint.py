# SPDX-License-Identifier: Apache-2.0
"""How long a checkpoint stops training: written before the next step, and written while training continues.

A dual encoder of 100 million parameters with AdamW on the CPU: 1.2 GB a checkpoint.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from aced_sdk.config import Engine, Optimizer, Student
from aced_sdk.engine import Snapshot, build_engine, save_checkpoint
from aced_sdk.engine.writer import CheckpointWriter
from aced_sdk.towers import build
from aced_sdk.training.parts import Trainee
from benchmarks.machine import emit, machine

ARCHITECTURE: dict[str, Any] = {
    "embed_dim": 512,
    "vision_cfg": {"image_size": 224, "layers": 12, "width": 768, "patch_size": 32, "head_width": 64},
    "text_cfg": {"context_length": 64, "vocab_size": 49408, "width": 256, "heads": 4, "layers": 4},
}


def main() -> None:
    """Measure, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=5, help="checkpoints of each kind")
    parser.add_argument("--output", type=Path)
    asked = parser.parse_args()
    module = Trainee(build(Student(architecture=ARCHITECTURE), 0))
    engine = build_engine(module, Engine(kind="single", device="cpu"), Optimizer())
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    engine.step(1e-3)
    stops: dict[str, list[float]] = {"waits": [], "continues": [], "written_after": []}
    with tempfile.TemporaryDirectory() as folder, CheckpointWriter(engine, keep=2) as writer:
        for step in range(1, asked.times + 1):
            started = time.perf_counter()
            save_checkpoint(Path(folder, "a"), step, engine, {}, {}, keep=2)
            stops["waits"].append(time.perf_counter() - started)
            started = time.perf_counter()
            writer.start(step, Snapshot(Path(folder, "b")))
            stops["continues"].append(time.perf_counter() - started)
            writer.wait()
            stops["written_after"].append(time.perf_counter() - started)
    seconds = {name: round(statistics.median(values), 3) for name, values in stops.items()}
    facts = {"parameters": sum(p.numel() for p in module.parameters()), "checkpoints": asked.times}
    ratio = round(seconds["waits"] / seconds["continues"], 2)
    emit(machine("cpu") | facts | {"median_seconds": seconds, "ratio": ratio}, asked.output)


if __name__ == "__main__":
    main()
