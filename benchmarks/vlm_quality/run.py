# SPDX-License-Identifier: Apache-2.0
"""One model: built on a student's tower, tuned, asked."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import aced_sdk as aced
import vlm
from aced_sdk.files import write_json
from benchmarks.vlm_quality.data import Exam
from vlm.scoring import Metric

ASKED: dict[str, tuple[Metric, int]] = {
    "questions": ("accuracy", 6),
    "captions": ("captions", 16),
    "easy_vqa": ("accuracy", 4),
}
"""Of each part, what is measured and the longest answer in tokens."""


def tuning(align_steps: int, adapt_steps: int, seed: int, precision: str, threads: int) -> vlm.TuneConfig:
    """Projector first, then projector and low-rank adapters."""
    return vlm.TuneConfig.model_validate(
        {
            "stages": (
                vlm.Align(steps=align_steps, batch_size=16, learning_rate=3e-3),
                vlm.Adapt(steps=adapt_steps, batch_size=16, learning_rate=1e-3, lora=vlm.Lora(rank=16, alpha=32)),
            ),
            "seed": seed,
            "engine": aced.Engine.model_validate(
                {"kind": "single", "precision": precision, "threads": threads, "checkpoint_every": 100}
            ),
        }
    )


def further(part: str, model: Path, exam: Exam, config: vlm.TuneConfig, directory: Path) -> dict[str, Any]:
    """Scores on one part of a tuned model that goes on learning that part alone; measured once, as in `run`.

    Args:
        part: `captions` or `easy_vqa`.
        model: folder of a merged model.
        exam: what is learned and asked.
        config: how it is tuned.
        directory: checkpoints and `scores.json`.
    """
    known = directory / "scores.json"
    if known.is_file():
        found: dict[str, Any] = json.loads(known.read_text(encoding="utf-8"))
        return found
    tuned = vlm.tune(*vlm.load(model), exam.about(part), config, directory=directory / "tuning")
    metric, longest = ASKED[part]
    processor = vlm.load(model)[1]
    scores = vlm.evaluate(
        tuned.model, processor, getattr(exam, part), metric=metric, max_new_tokens=longest, batch_size=64
    )
    blind = scores.total.blind_metrics or {}
    figures = (
        {"cider": scores.total.metrics["cider"], "blind_cider": blind["cider"]}
        if part == "captions"
        else {"accuracy": scores.accuracy, "blind_accuracy": scores.blind}
    )
    kinds = {kind: (one.accuracy, one.blind) for kind, one in scores.kinds.items()}
    result = {**figures, "kinds": kinds, "samples": tuned.samples, "tuning_seconds": tuned.seconds}
    write_json(known, result)
    return result


def run(vision: Path, language: Path, exam: Exam, config: vlm.TuneConfig, directory: Path) -> dict[str, Any]:
    """Scores of one model. What an earlier call with the same directory measured is not measured again.

    Args:
        vision: folder of a student.
        language: folder of a language model.
        exam: what is learned and asked.
        config: how it is tuned.
        directory: checkpoints, the model and `scores.json`.
    """
    known = directory / "scores.json"
    if known.is_file():
        found: dict[str, Any] = json.loads(known.read_text(encoding="utf-8"))
        return found
    model, processor = vlm.build(vision=vision, language=language)
    tuned = vlm.tune(model, processor, exam.train, config, directory=directory / "tuning")
    began = time.perf_counter()
    scores = {
        part: vlm.evaluate(
            tuned.model, processor, getattr(exam, part), metric=metric, max_new_tokens=longest, batch_size=64
        )
        for part, (metric, longest) in ASKED.items()
    }
    blind_captions = scores["captions"].total.blind_metrics or {}
    result = {
        "vision": vision.name if vision.name != "student" else vision.parent.name,
        "accuracy": scores["questions"].accuracy,
        "blind_accuracy": scores["questions"].blind,
        "cider": scores["captions"].total.metrics["cider"],
        "blind_cider": blind_captions["cider"],
        "easy_accuracy": scores["easy_vqa"].accuracy,
        "blind_easy_accuracy": scores["easy_vqa"].blind,
        "conversations": len(exam.train),
        "samples": tuned.samples,
        "tuning_seconds": tuned.seconds,
        "scoring_seconds": time.perf_counter() - began,
        "scores": {part: one.to_dict() for part, one in scores.items()},
    }
    vlm.save(tuned.model, processor, directory / "model", merge=True)
    write_json(known, result)
    return result
