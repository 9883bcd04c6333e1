# SPDX-License-Identifier: Apache-2.0
"""Image towers in torch, as plain ONNX and as `export.to_onnx` writes them: time, memory, size and agreement.

    python -m benchmarks.onnx [--towers ViT-B-32 MobileCLIP2-S0 FOLDER] [--threads 2] [--output FILE]

A tower is an open_clip architecture, built with random weights, or the folder of a student. Times do not depend on the
weights; agreement does, and random weights judge it poorly (those of convolutional towers get the batch statistics of
some pictures first, without which their activations vanish): for accuracy, name a trained student.

Contestants take turns, call by call, on the same inputs, and the median of each is told, so that whatever else the
machine does falls on all of them. onnxruntime's threads stop spinning between turns. `plain` is torch.onnx.export of
the same model with nothing done to it. Peak memory is that of a fresh process that loads one contestant and runs both
batch sizes, its libraries included. Cosine and max-abs are to torch eager on L2-normalised embeddings.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import aced_sdk as aced
import export
from aced_sdk import towers
from benchmarks.machine import emit, machine
from export.onnx.report import Precision
from export.runtime.parity import pictures

TOWERS = ("ViT-S-16", "ViT-B-32", "ViT-B-16", "MobileCLIP2-S0", "MobileCLIP-S1")
BATCHES = (1, 8)
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8")
PEAK = """
print(next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
TORCH_CHILD = """
import sys, torch
from aced_sdk import towers
torch.set_num_threads(int(sys.argv[3]))
tower = towers.load(sys.argv[2]).eval().model.visual
if sys.argv[1] == "torch_compile":
    tower = torch.compile(tower)
with torch.no_grad():
    for batch in map(int, sys.argv[6:]):
        tower(torch.zeros(batch, 3, int(sys.argv[4]), int(sys.argv[5])))
"""
ONNX_CHILD = """
import sys, numpy, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = int(sys.argv[3])
if sys.argv[1] == "fp16":
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
session = onnxruntime.InferenceSession(sys.argv[2], options, providers=["CPUExecutionProvider"])
for batch in map(int, sys.argv[6:]):
    session.run(None, {"pixel_values": numpy.zeros((batch, 3, int(sys.argv[4]), int(sys.argv[5])), numpy.float32)})
"""
Call = Callable[[NDArray[np.float32]], NDArray[np.float32]]


def student(name: str, folder: Path) -> Path:
    """The folder of a student: the one named, or a new one of an open_clip architecture."""
    if Path(name).is_dir():
        return Path(name)
    made = towers.build(aced.Student(architecture=name), seed=0)
    visual: Any = made.model.visual
    norms = [module for module in visual.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean
    if norms:
        visual.train()
        with torch.no_grad():
            visual(torch.stack([made.preprocess(picture) for picture in pictures()]))
    return towers.save(made.eval(), folder)


class Tower:
    """One image tower and its contestants."""

    def __init__(self, name: str, folder: Path, arguments: argparse.Namespace) -> None:
        self.name, self.folder, self.arguments = name, folder / Path(name).name, arguments
        source = student(name, self.folder / "student")
        self.encoder = towers.load(source).eval()
        self.visual: Any = self.encoder.model.visual
        self.size = self.encoder.preprocess_config.size
        self.files: dict[str, Path] = {"torch": source, "plain": self.folder / "plain.onnx"}
        self.folder.mkdir(exist_ok=True)
        self._plain()
        calibration = sorted(arguments.calibration.iterdir()) if arguments.calibration else []
        with warnings.catch_warnings():  # that built-in pictures calibrate is told in the report
            warnings.simplefilter("ignore")
            self.report = export.to_onnx(
                source,
                self.folder / "onnx",
                precisions=PRECISIONS,
                min_cosine=0.9,
                int8_cosine=arguments.int8_cosine,
                calibration=calibration,
                tasks=arguments.tasks,
                measure=False,
                parts=("vision", "text") if arguments.tasks else ("vision",),
            )
        suffixes = {"fp32": "", "fp16": "_fp16", "int8": "_int8"}
        self.files |= {kind: self.folder / f"onnx/onnx/vision_model{suffixes[kind]}.onnx" for kind in PRECISIONS}

    def _plain(self) -> None:
        dim = torch.export.Dim("batch_size")
        program = torch.onnx.export(
            self.visual,
            (torch.zeros(2, 3, *self.size),),
            dynamo=True,
            input_names=["pixel_values"],
            output_names=["image_embeds"],
            dynamic_shapes=({0: dim},),
            verbose=False,
        )
        if program is None:
            raise RuntimeError("torch gave no graph")
        program.save(self.files["plain"], external_data=False)

    def calls(self) -> tuple[dict[str, Call], dict[str, str]]:
        """The contestants, and why some are left out."""
        found: dict[str, Call] = {"torch": _torch_call(self.visual)}
        left_out = {}
        reason = _no_compiler()
        if reason is None:
            compiled = _torch_call(torch.compile(self.visual))
            try:
                for batch in BATCHES:
                    compiled(self.inputs(batch))
                found["torch_compile"] = compiled
            except RuntimeError as error:  # the base of what torch.compile raises; the others still have their turn
                reason = f"{type(error).__name__}: {str(error)[:300]}"
        if reason is not None:
            left_out["torch_compile"] = reason
        kinds = ("plain", *PRECISIONS)
        return found | {kind: self._onnx_call(kind) for kind in kinds}, left_out

    def inputs(self, batch: int) -> NDArray[np.float32]:
        """float32 [batch, 3, H, W]."""
        return np.random.default_rng(0).standard_normal((batch, 3, *self.size), np.float32)

    def _onnx_call(self, kind: str) -> Call:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.arguments.threads
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if kind == "fp16":  # as export.OnnxEncoder does
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        session = onnxruntime.InferenceSession(str(self.files[kind]), options, providers=["CPUExecutionProvider"])
        return lambda pixels: np.asarray(session.run(None, {"pixel_values": pixels})[0], np.float32)

    def measure(self) -> dict[str, Any]:
        """Everything about this tower."""
        calls, left_out = self.calls()
        times = {f"batch_{batch}": medians(calls, self.inputs(batch), self.arguments.rounds) for batch in BATCHES}
        pixels = torch.stack([self.encoder.preprocess(picture) for picture in pictures()]).numpy()
        embeddings = {kind: _normalised(call(pixels)) for kind, call in calls.items()}
        want = embeddings["torch"]
        return {
            "weights": "given" if Path(self.name).is_dir() else "random",
            "latency_ms": times,
            "over_fp32": {batch: {kind: own["fp32"] / own[kind] for kind in own} for batch, own in times.items()},
            "peak_memory_bytes": {kind: self._peak(kind) for kind in calls},
            "file_bytes": {kind: self.files[kind].stat().st_size for kind in ("plain", *PRECISIONS)},
            "least_cosine": {kind: float((own * want).sum(axis=1).min()) for kind, own in embeddings.items()},
            "max_abs": {kind: float(np.abs(own - want).max()) for kind, own in embeddings.items()},
            "int8": next(g.quantised.model_dump() for g in self.report.graphs if g.quantised and g.part == "vision"),
            "tasks": self.report.tasks,
            "left_out": left_out,
        }

    def _peak(self, kind: str) -> int:
        script = (TORCH_CHILD if kind.startswith("torch") else ONNX_CHILD) + PEAK
        file = self.files["torch" if kind.startswith("torch") else kind]
        words = [kind, str(file), str(self.arguments.threads), *map(str, self.size), *map(str, BATCHES)]
        command = [sys.executable, "-c", script, *words]
        environment = os.environ | {"OMP_NUM_THREADS": str(self.arguments.threads)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{kind} failed:\n{done.stderr[-3000:]}")
        return int(done.stdout.splitlines()[-1])


def medians(calls: Mapping[str, Call], inputs: NDArray[np.float32], rounds: int) -> dict[str, float]:
    """Median milliseconds of a call, all contestants in turns."""
    seconds: dict[str, list[float]] = {kind: [] for kind in calls}
    for number in range(rounds + 1):
        for kind, call in calls.items():
            start = time.perf_counter()
            call(inputs)
            if number:  # the first call allocates
                seconds[kind].append(time.perf_counter() - start)
    return {kind: 1000 * statistics.median(own) for kind, own in seconds.items()}


def _torch_call(visual: Callable[[Tensor], Tensor]) -> Call:
    def call(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.no_grad():
            return visual(torch.from_numpy(pixels)).numpy()

    return call


def _no_compiler() -> str | None:
    """Why torch.compile cannot run here, if it cannot."""
    compiler = os.environ.get("CXX", "g++")
    return None if shutil.which(compiler) else f"there is no C++ compiler ({compiler})"


def _normalised(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description="image towers in torch, as plain ONNX and as export.to_onnx has them")
    parser.add_argument("--towers", nargs="+", default=list(TOWERS), help="open_clip names, or folders of students")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of every contestant")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each contestant at each batch size")
    parser.add_argument("--int8-cosine", type=float, default=0.999, help="what int8 keeps on calibration pictures")
    parser.add_argument("--calibration", type=Path, help="folder of pictures; built-in ones if left out")
    parser.add_argument("--tasks", type=Path, nargs="*", default=[], help="task folders, for students with weights")
    parser.add_argument("--output", type=Path, help="write the JSON object to this file too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        measured = {Path(name).name: Tower(name, Path(folder), arguments).measure() for name in arguments.towers}
    facts = machine("cpu")
    facts["versions"] |= {name: version(name) for name in ("onnx", "onnxruntime", "onnxscript", "timm")}
    result = {
        "benchmark": "onnx",
        "rounds": arguments.rounds,
        "int8_cosine": arguments.int8_cosine,
        "towers": measured,
        **facts,
        "load_average_before": load,
    }
    emit(result, arguments.output)


if __name__ == "__main__":
    main()
