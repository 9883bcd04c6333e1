# SPDX-License-Identifier: Apache-2.0
"""One model: built on a student's tower, tuned, asked."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import aced_sdk as aced
import vlm
from aced_sdk.errors import ConfigError
from aced_sdk.files import write_json
from benchmarks.vlm_quality.data import Exam
from vlm.scoring.evaluate import Metric

ASKED: dict[str, tuple[Metric, int]] = {
    "questions": ("accuracy", 6),
    "captions": ("captions", 16),
    "easy_vqa": ("accuracy", 4),
}
"""Of each part, what is measured and the longest answer in tokens."""


def tuning(
    align_steps: int,
    adapt_steps: int,
    *,
    batch_size: int,
    conversations_per_row: int,
    seed: int,
    precision: str,
    threads: int,
) -> vlm.TuneConfig:
    """Projector first, then projector and low-rank adapters."""
    return vlm.TuneConfig.model_validate(
        {
            "stages": (
                vlm.Align(steps=align_steps, batch_size=batch_size, learning_rate=3e-3),
                vlm.Adapt(
                    steps=adapt_steps, batch_size=batch_size, learning_rate=1e-3, lora=vlm.Lora(rank=16, alpha=32)
                ),
            ),
            "seed": seed,
            "conversations_per_row": conversations_per_row,
            "engine": aced.Engine.model_validate(
                {"kind": "single", "precision": precision, "threads": threads, "checkpoint_every": 100}
            ),
        }
    )


def run(vision: Path, language: Path, exam: Exam, config: vlm.TuneConfig, directory: Path) -> dict[str, Any]:
    """Scores of one model. What an earlier call with the same arguments measured is not measured again.

    Args:
        vision: folder of a student.
        language: folder of a language model.
        exam: what is learned and asked.
        config: how it is tuned.
        directory: checkpoints, the model and `scores.json`.

    Raises:
        ConfigError: if the directory holds scores that were measured in another way.
    """
    known = directory / "scores.json"
    measured = {
        "vision": str(vision),
        "language": str(language),
        "config": config.model_dump(mode="json"),
        "exam": {part: len(getattr(exam, part)) for part in ("train", *ASKED)},
    }
    if known.is_file():
        found: dict[str, Any] = json.loads(known.read_text(encoding="utf-8"))
        if different := [key for key in measured if found["measured"].get(key) != measured[key]]:
            raise ConfigError(
                f"{known} was measured with other {', '.join(different)}", remedy="name another directory, or remove it"
            )
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
        "measured": measured,
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
