# SPDX-License-Identifier: Apache-2.0
"""What small decoders learn from the students of a full demo: do curated encoders serve generative tasks better?

    make demo FULL=1
    python -m benchmarks.lit_decoder --runs runs/demo-full [--rows iid softmax_kd aced] [--output FILE]

Every row's students, one for each seed of the demo, are read by new decoders (`vlm.rank_encoders`) that learn the
conversations of `benchmarks.vlm_quality` together. Held out are pictures that no decoder learned from; captions are
scored by CIDEr, the rest by accuracy, each beside what other samples' pictures give.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

import vlm
from benchmarks.machine import emit, machine
from benchmarks.vlm_quality.data import exam
from examples.quickstart.box import BoxConfig, build_box


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="a demo's directory, with the folder distil")
    parser.add_argument("--rows", nargs="+", default=["iid", "softmax_kd", "h_acid", "aced", "trusted"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="that the demo distilled with")
    parser.add_argument("--steps", type=int, default=2000, help="of each decoder")
    parser.add_argument("--width", type=int, default=128, help="of each decoder")
    parser.add_argument("--easy-questions", type=int, default=4000, help="of easy-vqa's test questions, asked")
    parser.add_argument("--captions", type=int, default=1000, help="held-out pictures to caption")
    parser.add_argument("--directory", type=Path, default=Path("runs/lit-decoder"), help="unpacked pictures")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, help="write the JSON object to this file too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    box = build_box(BoxConfig(size="small", with_apt=False))
    config = vlm.LitDecoder(steps=arguments.steps, width=arguments.width)
    folders = {
        row: [arguments.runs / "distil" / f"{row}-{seed}" / "student" for seed in arguments.seeds]
        for row in arguments.rows
    }
    asked = exam(box, arguments.directory / "pictures", arguments.easy_questions, arguments.captions)
    captions = tuple(replace(sample, kind="captions") for sample in asked.captions)  # one kind for both styles
    held_out = (*asked.questions, *captions, *asked.easy_vqa)
    ranking = vlm.rank_encoders(folders, asked.train, held_out, config, seeds=arguments.seeds, captions=("captions",))
    result: dict[str, Any] = {
        "benchmark": "lit_decoder",
        "config": config.model_dump(),
        "conversations": len(asked.train),
        "held_out": dict(Counter(sample.kind for sample in held_out)),
        "trained_examples_of_a_student": trained_examples(folders[arguments.rows[0]][0].parent),
        **ranking.to_dict(),
        **machine("cpu"),
    }
    if {"aced", "iid"} <= set(arguments.rows):
        best = ranking.encoders[0]
        result["aced_over_iid"] = {
            kind or "all": {metric: asdict(ranking.lead("aced", "iid", metric, kind)) for metric in scores}
            for kind, scores in ((None, best.scores), *best.by_kind.items())
        }
    emit(result, arguments.output)


def trained_examples(run: Path) -> int:
    """What the last step of a run's log counted."""
    lines = (run / "events.jsonl").read_text(encoding="utf-8").splitlines()
    return int(max(json.loads(line).get("trained", 0) for line in lines))


if __name__ == "__main__":
    main()
