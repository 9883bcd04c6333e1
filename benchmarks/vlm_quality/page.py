# SPDX-License-Identifier: Apache-2.0
"""The page of held-out pictures with what was said about them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aced_sdk.reporting.page import duration, image_uri, percent, write_page
from benchmarks.vlm_quality.data import Exam

SHOWN = 18  # pictures of each kind


def write(target: Path, title: str, exam: Exam, run: Mapping[str, Any]) -> Path:
    """Write the page of one run.

    Args:
        target: the HTML file.
        title: its heading.
        exam: whose pictures are shown.
        run: what `benchmarks.vlm_quality.run.run` gave.
    """
    scores = run["scores"]
    pictures = {sample.key: sample.images[0] for sample in (*exam.questions, *exam.captions, *exam.easy_vqa)}
    kinds = [("captions (CIDEr)", len(exam.captions), f"{run['cider']:.3f}", f"{run['blind_cider']:.3f}")]
    for part in ("questions", "easy_vqa"):
        whole = {f"all of {part.replace('_', '-')}": scores[part]["total"], **scores[part]["kinds"]}
        kinds += [(name, one["count"], percent(one["accuracy"]), percent(one["blind"])) for name, one in whole.items()]
    return write_page(
        target,
        "vlm_quality.html.j2",
        folders=[Path(__file__).parent],
        title=title,
        tiles=[
            ("Questions", percent(run["accuracy"]), f"blind {percent(run['blind_accuracy'])}"),
            ("CIDEr of captions", f"{run['cider']:.2f}", f"other pictures' {run['blind_cider']:.2f}"),
            ("easy-vqa", percent(run["easy_accuracy"]), f"blind {percent(run['blind_easy_accuracy'])}"),
        ],
        figures=kinds,
        facts=[
            ("Tower", run["vision"]),
            ("Learned from", f"{run['conversations']:,} conversations, {run['samples']:,} with repetitions"),
            ("Time", f"{duration(run['tuning_seconds'])} of tuning, {duration(run['scoring_seconds'])} of scoring"),
        ],
        sections=[
            {"title": label, "anchor": part, "cards": _cards(scores[part]["samples"], pictures)}
            for label, part in (("Captions", "captions"), ("Questions", "questions"), ("easy-vqa", "easy_vqa"))
        ],
    )


def _cards(samples: Sequence[Mapping[str, Any]], pictures: Mapping[str, Any]) -> list[dict[str, Any]]:
    chosen = random.Random(0).sample(list(samples), min(SHOWN, len(samples)))
    return [
        {
            "picture": image_uri(pictures[one["key"]]),
            "question": one["question"],
            "answer": one["answer"],
            "right": one["right"],
            "expected": one["expected"][0],
            "blind": one["blind_answer"],
        }
        for one in chosen
    ]
