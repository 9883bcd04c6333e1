# SPDX-License-Identifier: Apache-2.0
"""Tokens per second of Align and Adapt beside trl's SFTTrainer, on the same model, conversations and precision.

    python -m benchmarks.vlm_step --vision FOLDER --language FOLDER [--rounds 2] [--steps 4] [--output FILE]

`trl` is SFTTrainer with its collator for vision-language data: a padded batch, pictures and texts prepared in every
step. `alone` is ours with a row for each conversation and no memory of features; `shared` is ours as it comes:
conversations about the same picture share one pass over it, and the frozen tower's features are remembered. Tokens are
those of the conversations written out each for itself, pictures included, whoever computes how many of them. Runs take
turns; a step's time is the median over all but the first two of each run, by the wall clock and by the processor time
of the process. trl is no dependency: without it our own figures stand alone. Conversations are the data box's.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import vlm
from aced_sdk.config import Engine
from aced_sdk.engine.events import Event, StepDone
from benchmarks.machine import emit, machine
from examples.quickstart.box import BoxConfig, build_box
from vlm.data.rows import encode
from vlm.model.adapters import prepare

WARM_UP = 2
STAGES = ("align", "adapt")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
Lap = tuple[float, float, int]  # wall seconds, processor seconds, conversations


class Bench:
    """One model's parts and the conversations."""

    def __init__(self, arguments: argparse.Namespace, data: Sequence[vlm.Sample], folder: Path) -> None:
        self.arguments, self.data, self.folder = arguments, data, folder
        self.steps = WARM_UP + arguments.steps
        self.runs = 0

    def build(self) -> tuple[Any, Any]:
        """A model that nobody has trained yet."""
        return vlm.build(vision=self.arguments.vision, language=self.arguments.language)

    def stage(self, name: str, rows: int) -> vlm.Align | vlm.Adapt:
        """Equal settings for everyone; the learning rate matters to no time."""
        kind = vlm.Align if name == "align" else vlm.Adapt
        return kind(steps=self.steps, batch_size=rows, learning_rate=1e-4)

    def rows(self, share: int) -> int:
        """Rows that the conversations make, so that a step holds about as many of them for everyone."""
        return sum(-(-count // share) for count in Counter(sample.images for sample in self.data).values())

    def ours(self, name: str, share: int, memory: int) -> list[Lap]:
        """Each step of a short run of ours."""
        self.runs += 1
        model, processor = self.build()
        rows = max(1, round(self.arguments.batch_size * self.rows(share) / len(self.data)))
        ticks: list[Lap] = []

        def listen(event: Event) -> None:
            if isinstance(event, StepDone):
                ticks.append((time.perf_counter(), time.process_time(), event.trained))

        config = vlm.TuneConfig(
            stages=(self.stage(name, rows),),
            conversations_per_row=share,
            feature_cache_mb=memory,
            engine=Engine(kind="single", device="cpu", threads=self.arguments.threads, checkpoint_every=10**6),
        )
        vlm.tune(model, processor, self.data, config, directory=self.folder / str(self.runs), callbacks=[listen])
        return laps(ticks)

    def trl(self, name: str) -> list[Lap]:
        """Each step of a short run of SFTTrainer."""
        from datasets import Dataset
        from transformers import TrainerCallback
        from trl import SFTConfig, SFTTrainer

        self.runs += 1
        model, processor = self.build()
        tuned = prepare(model, self.stage(name, 1), 0).train()
        ticks: list[Lap] = []
        size = self.arguments.batch_size

        class Clock(TrainerCallback):  # type: ignore[misc, unused-ignore]
            def on_step_end(self, *_: Any, **__: Any) -> None:
                ticks.append((time.perf_counter(), time.process_time(), size * (len(ticks) + 1)))

        settings = SFTConfig(
            output_dir=str(self.folder / str(self.runs)),
            max_steps=self.steps,
            per_device_train_batch_size=size,
            learning_rate=1e-4,
            max_length=None,
            completion_only_loss=True,
            gradient_checkpointing=False,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        rows = Dataset.from_list([written(sample) for sample in self.data]).cast_column("images", _image_column())
        trainer = SFTTrainer(
            model=tuned, args=settings, train_dataset=rows, processing_class=processor, callbacks=[Clock()]
        )
        trainer.train()
        return laps(ticks)


def written(sample: vlm.Sample) -> dict[str, Any]:
    """A conversation of one turn as trl takes it."""
    ((question, reply),) = sample.turns
    return {
        "images": [str(image) for image in sample.images],
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": reply}],
    }


def _image_column() -> Any:
    from datasets import Image, List

    return List(Image(mode="RGB"))


def laps(ticks: Sequence[Lap]) -> list[Lap]:
    """Differences between the ends of steps, without the warm-up."""
    pairs = list(zip(ticks[WARM_UP - 1 :], ticks[WARM_UP:], strict=False))
    return [(b[0] - a[0], b[1] - a[1], b[2] - a[2]) for a, b in pairs]


def figures(found: dict[str, list[Lap]], tokens: float) -> dict[str, Any]:
    """Tokens per second by each clock, and ours over trl's."""
    report: dict[str, Any] = {}
    for place, clock in enumerate(CLOCKS):
        rates = {name: statistics.median(tokens * lap[2] / lap[place] for lap in runs) for name, runs in found.items()}
        report[clock] = {"tokens_per_second": rates}
        if "trl" in rates:
            report[clock]["over_trl"] = {name: rates[name] / rates["trl"] for name in rates if name != "trl"}
    return report


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vision", required=True, help="a student's folder")
    parser.add_argument("--language", required=True, help="a language model's folder or GGUF file")
    parser.add_argument("--batch-size", type=int, default=16, help="conversations a step")
    parser.add_argument("--rounds", type=int, default=2, help="times that everyone has a turn")
    parser.add_argument("--steps", type=int, default=4, help="measured steps of a turn")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="write the JSON object to this file too")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    torch.set_num_threads(arguments.threads)

    box = build_box(BoxConfig(size="small", with_apt=False))
    data = vlm.load_llava(box.vqa / "train.json", box.vqa).samples
    result: dict[str, Any] = {"benchmark": "vlm_step", "batch_size": arguments.batch_size, "stages": {}}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(arguments, data, Path(folder))
        model, processor = bench.build()
        result["image_tokens"] = int(model.config.image_seq_length)
        lengths = [len(encode(sample, processor, result["image_tokens"])[0]) for sample in data[:500]]
        result["tokens_per_conversation"] = statistics.mean(lengths)
        del model
        runs: dict[str, Callable[[str], list[Lap]]] = {
            "alone": lambda stage: bench.ours(stage, 1, 0),
            "shared": lambda stage: bench.ours(stage, 4, 1024),
        }
        if find_spec("trl") is not None:
            runs["trl"] = bench.trl
            result["trl"] = version("trl")
        for stage in STAGES:
            found: dict[str, list[Lap]] = defaultdict(list)
            for _ in range(arguments.rounds):
                for name, run in runs.items():
                    found[name] += run(stage)
            result["stages"][stage] = figures(found, result["tokens_per_conversation"])
    emit(result | machine("cpu") | {"threads": arguments.threads, "load_average_before": load}, arguments.output)


if __name__ == "__main__":
    main()
