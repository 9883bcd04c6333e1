# SPDX-License-Identifier: Apache-2.0
"""What a step of ACED costs beside an IID step, and beside open_clip's own trainer.

    python -m benchmarks.step [--students s32 toy] [--rounds 3] [--steps 4] [--device cuda] [--output FILE]

Short runs of all variants take turns, so that whatever else the machine does falls on all of them; a step's time is the
median over all of a variant's steps but the first two of each run (caches and allocators warm up), by the wall clock,
waits for data included, and by the processor time of the process, which on a CPU is the one to trust when the machine
is busy with other things. Reference and teacher are embedding caches; what made them does not matter to a step, so
models with next to no weights stand in for them. ACED here is learnability in the sigmoid form with f = 0.8 and softmax
distillation; `aced_cheap` scores at half the side and trains half of each sub-batch at it. `accumulated` is ACED over
IID where both take the sub-batch in four micro-batches (GradCache): ACED has its first pass from the scoring. `by_macs`
is what the ratio would be if time were MACs, a backward pass twice a forward pass.

open_clip's trainer (`open_clip_train.main`, in a process of its own) runs the same architecture, batch and precision:
IID with the sigmoid loss, and with `--distill-model`, which runs the teacher in every step, against softmax
distillation from a cache. Its data are its own synthetic pictures, which a worker process makes beside it (its reader
of tars does not understand webdataset 1.0). Its teachers have random weights; their MACs are what matters.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import aced_sdk as aced
from aced_sdk.config import Curation
from aced_sdk.engine.events import Event, StepDone
from aced_sdk.towers import build, save
from benchmarks.machine import emit, machine

WARM_UP = 2
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
FILTER = 5  # B / b, which is f = 0.8
EMBED_DIM = 512
WORDS = ("red", "green", "small", "large", "round", "square", "old", "cat", "boat", "tree", "house", "star", "lamp")
TRAINER = """
import importlib.util, logging, sys, time, types
import open_clip  # before the stand-in: torch looks for pandas too
if importlib.util.find_spec("pandas") is None:  # for the trainer's reader of CSV files alone, which is not used here
    sys.modules["pandas"] = types.ModuleType("pandas")
class Clock(logging.Handler):
    def emit(self, record):
        if "Train Epoch" in record.getMessage():
            print("tick", time.perf_counter(), time.process_time())
logging.root.addHandler(Clock())
from open_clip_train.main import main
main(sys.argv[1:])
"""
Laps = list[tuple[float, ...]]  # seconds of each step, by each clock


@dataclass(frozen=True)
class Case:
    """A student, its batch, the side it scores at in the cheap way, and open_clip teachers for it."""

    architecture: dict[str, Any]
    sub_batch: int
    scoring_size: int
    teachers: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """The side of its pictures."""
        return int(self.architecture["vision_cfg"]["image_size"])


def architecture(side: int, patch: int, width: int, layers: int, text: tuple[int, int, int]) -> dict[str, Any]:
    """An open_clip `model_cfg`; `text` is tokens, width and layers."""
    head = min(64, width // 4)
    return {
        "embed_dim": EMBED_DIM,
        "vision_cfg": {
            "image_size": side,
            "patch_size": patch,
            "width": width,
            "layers": layers,
            "head_width": head,
        },
        "text_cfg": {
            "context_length": text[0],
            "vocab_size": 49408,
            "width": text[1],
            "layers": text[2],
            "heads": max(1, text[1] // 64),
        },
    }


CASES = {
    # S/32 at the paper's 256 px, whose picture tower does most of the work, as in ACED-F1.
    "s32": Case(architecture(256, 32, 384, 12, (32, 256, 6)), 64, 128, ("b32", "b16")),
    # B/32 with an S-size text tower of 64 tokens: ACED-F1 itself. For a GPU.
    "f1": Case(architecture(256, 32, 768, 12, (64, 384, 12)), 256, 128, ("l16",)),
    # The demo's student, where a step is mostly what surrounds the towers.
    "toy": Case(architecture(32, 8, 128, 2, (12, 128, 1)), 256, 16),
}
TEACHERS = {  # vision patch, width and layers; text width and layers
    "b32": (32, 768, 12, 512, 12),
    "b16": (16, 768, 12, 512, 12),
    "l16": (16, 1024, 24, 768, 12),
}


def write_pool(folder: Path, pairs: int, side: int) -> Path:
    """Two tars of JPEG pictures with different captions."""
    noise = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for shard, rows in enumerate(np.array_split(np.arange(pairs), 2)):
        with tarfile.open(folder / f"{shard:04d}.tar", "w") as tar:
            for row in rows.tolist():
                stream = io.BytesIO()
                pixels = noise.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).resize((side, side)).save(stream, "jpeg")
                caption = f"{row} {' '.join(noise.choice(WORDS, 4))}".encode()
                for extension, content in (("jpg", stream.getvalue()), ("txt", caption)):
                    member = tarfile.TarInfo(f"{row:06d}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return folder


def write_model(folder: Path, model_cfg: dict[str, Any]) -> Path:
    """An open_clip folder without weights, which open_clip makes at random."""
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    folder.mkdir(parents=True)
    config = {"model_cfg": model_cfg, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def teacher_cfg(name: str, case: Case) -> dict[str, Any]:
    """A teacher that takes the student's pictures and tokens: open_clip feeds both the same."""
    patch, width, layers, text_width, text_layers = TEACHERS[name]
    tokens = case.architecture["text_cfg"]["context_length"]
    return architecture(case.size, patch, width, layers, (tokens, text_width, text_layers))


def macs(model_cfg: dict[str, Any], size: int | None = None) -> int:
    """Of one picture and one text."""
    return build(aced.Student(architecture=model_cfg), 0).profile(size).macs


def laps(ticks: Laps) -> Laps:
    """From readings at the ends of steps to the seconds of those after the warm-up."""
    pairs = zip(ticks[WARM_UP - 1 :], ticks[WARM_UP:], strict=False)
    return [tuple(after - before for before, after in zip(*pair, strict=True)) for pair in pairs]


class Bench:
    """One student's pool, stand-ins and runs."""

    def __init__(self, name: str, folder: Path, arguments: argparse.Namespace) -> None:
        self.case, self.arguments = CASES[name], arguments
        self.folder = folder / name
        self.steps = WARM_UP + arguments.steps
        self.pool = write_pool(self.folder / "pool", 2 * FILTER * self.case.sub_batch, self.case.size)
        tiny = architecture(self.case.size, self.case.size // 2, 32, 1, (8, 32, 1))
        self.frozen = []
        for seed, role in enumerate(("reference", "teacher")):
            model = save(build(aced.Student(architecture=tiny), seed), self.folder / role)
            self.frozen.append(aced.Frozen(model=str(model), cache=self.folder / f"{role}-cache"))
        self.student = write_model(self.folder / "student", self.case.architecture)
        self.teachers = {
            teacher: write_model(self.folder / teacher, teacher_cfg(teacher, self.case))
            for teacher in self.case.teachers
        }
        self.runs = 0

    def variants(self) -> dict[str, tuple[Curation, aced.Objective, int | None]]:
        """What takes turns, by name: curation, objective and micro-batch."""
        size = self.case.sub_batch
        iid = aced.Iid(sub_batch=size)
        task, kd = aced.Objective(), (aced.Distillation(loss="softmax"),)
        taught = aced.Objective(distillation=kd)

        def joint(**options: Any) -> aced.Joint:
            return aced.Joint(sub_batch=size, super_batch=FILTER * size, num_chunks=16, **options)

        return {
            "iid": (iid, task, None),
            "softmax_kd": (iid, aced.Objective(contrastive=aced.Contrastive(loss="softmax"), distillation=kd), None),
            "i_acid": (joint(score="easy_reference"), task, None),
            "aced": (joint(), taught, None),
            "aced_cheap": (joint(scoring_size=self.case.scoring_size), taught, None),
            "iid_accumulated": (iid, task, size // 4),
            "aced_accumulated": (joint(), taught, size // 4),
        }

    def distil(self, curation: Curation, objective: aced.Objective, micro_batch: int | None) -> Laps:
        """Each step of a short run of ours."""
        self.runs += 1
        ticks: Laps = []

        def listen(event: Event) -> None:
            if isinstance(event, StepDone):
                ticks.append(tuple(clock() for clock in CLOCKS.values()))

        reference, teacher = self.frozen
        config = aced.DistillConfig(
            student=aced.Student(architecture=self.case.architecture),
            data=aced.Data(shards=(str(self.pool),), prepared=self.folder / "prepared"),
            reference=reference,
            teacher=teacher,
            curation=curation,
            objective=objective,
            schedule=aced.Schedule(steps=self.steps),
            engine=aced.Engine(
                kind="single",
                device=self.arguments.device,
                precision=self.arguments.precision,
                threads=self.arguments.threads,
                micro_batch=micro_batch,
                checkpoint_every=10_000,
            ),
            directory=self.folder / "runs" / str(self.runs),
        )
        aced.distill(config, [listen])
        return laps(ticks)

    def open_clip(self, *options: str) -> Laps:
        """Each step of open_clip's trainer: it logs once a step. Its worker process is not in the processor time."""
        self.runs += 1
        size, threads = self.case.sub_batch, str(self.arguments.threads)
        precision = {"fp32": "fp32", "bf16": "amp_bf16"}[self.arguments.precision]
        command = [sys.executable, "-c", TRAINER, "--model", f"local-dir:{self.student}"]
        command += ["--dataset-type", "synthetic", "--workers", "1"]
        command += ["--train-num-samples", str(size * self.steps)]
        command += ["--batch-size", str(size), "--epochs", "1", "--warmup", "1", "--save-frequency", "0"]
        command += ["--precision", precision, "--device", self.arguments.device, "--grad-clip-norm", "1.0"]
        command += ["--log-every-n-steps", "1", "--logs", str(self.folder / f"log-{self.runs}"), *options]
        environment = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"open_clip's trainer failed:\n{done.stderr[-3000:]}")
        ticks = re.findall(r"^tick (\S+) (\S+)$", done.stdout, re.MULTILINE)
        return laps([tuple(float(value) for value in tick) for tick in ticks])

    def measure(self) -> dict[str, Any]:
        """All variants in turn, `--rounds` times."""
        seconds: dict[str, Laps] = defaultdict(list)
        for _ in range(self.arguments.rounds):
            for name, variant in self.variants().items():
                seconds[name] += self.distil(*variant)
            if not self.arguments.without_open_clip:
                seconds["open_clip_iid"] += self.open_clip("--siglip")
                for teacher, folder in self.teachers.items():
                    options = ("--distill-model", f"local-dir:{folder}", "--distill-pretrained", "random")
                    seconds[f"open_clip_distill_{teacher}"] += self.open_clip(*options)
        return self.facts() | {
            clock: self.report({name: [lap[place] for lap in laps] for name, laps in seconds.items()})
            for place, clock in enumerate(CLOCKS)
        }

    def facts(self) -> dict[str, Any]:
        """Sizes, and what MACs alone would give."""
        case = self.case
        full, small = macs(case.architecture), macs(case.architecture, case.scoring_size)
        cheap = small / full
        teachers = {name: macs(teacher_cfg(name, case)) for name in case.teachers}
        return {
            "macs": full,
            "macs_at_scoring_size": small,
            "macs_of_teachers": teachers,
            "side": case.size,
            "scoring_size": case.scoring_size,
            "sub_batch": case.sub_batch,
            "super_batch": FILTER * case.sub_batch,
            "by_macs": {
                "aced": (FILTER + 3) / 3,
                "aced_cheap": (FILTER * cheap + 3 * (1 + cheap) / 2) / 3,
                "accumulated": (FILTER + 3) / (1 + 3),
                "kd_rate_over_open_clip_distill": {name: 1 + m / (3 * full) for name, m in teachers.items()},
            },
        }

    def report(self, seconds: dict[str, list[float]]) -> dict[str, Any]:
        """The figures by one clock."""
        step = {name: statistics.median(values) for name, values in seconds.items()}
        report: dict[str, Any] = {
            "seconds": {
                name: {"median": step[name], "least": min(values), "most": max(values), "steps": len(values)}
                for name, values in seconds.items()
            },
            "over_iid": {name: step[name] / step["iid"] for name in ("softmax_kd", "i_acid", "aced", "aced_cheap")}
            | {"accumulated": step["aced_accumulated"] / step["iid_accumulated"]},
        }
        if "open_clip_iid" in step:
            size = self.case.sub_batch
            report["samples_per_second"] = {name: size / step[name] for name in ("iid", "open_clip_iid")}
            report["iid_rate_over_open_clip"] = step["open_clip_iid"] / step["iid"]
            report["kd_rate_over_open_clip_distill"] = {
                name: step[f"open_clip_distill_{name}"] / step["softmax_kd"] for name in self.teachers
            }
        return report


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description="step time of ACED over IID, and beside open_clip's trainer")
    parser.add_argument("--students", choices=tuple(CASES), nargs="+", default=["s32", "toy"])
    parser.add_argument("--rounds", type=int, default=3, help="times that every variant has its turn")
    parser.add_argument("--steps", type=int, default=4, help="measured steps of a turn")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a run")
    parser.add_argument("--without-open-clip", action="store_true", help="our own variants alone")
    parser.add_argument("--output", type=Path, help="write the JSON object to this file too")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        students = {name: Bench(name, Path(folder), arguments).measure() for name in arguments.students}
    result = {
        "benchmark": "step",
        "filter_ratio": 1 - 1 / FILTER,
        "precision": arguments.precision,
        "rounds": arguments.rounds,
        "steps_of_a_turn": arguments.steps,
        "students": students,
        **machine(arguments.device),
        "threads": arguments.threads,
        "load_average_before": load,
    }
    emit(result, arguments.output)


if __name__ == "__main__":
    main()
