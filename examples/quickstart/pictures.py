# SPDX-License-Identifier: Apache-2.0
"""What the demo's page shows beside figures: pictures of the selection, of zero-shot and of answers."""

from __future__ import annotations

import os
import platform
import random
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import aced_sdk as aced
from aced_sdk.data import Pool
from aced_sdk.errors import DataError
from aced_sdk.evaluation import class_embeddings, load_task
from aced_sdk.files import inside, printable
from aced_sdk.processing.plain import open_picture, to_rgb
from aced_sdk.reporting import read_events
from examples.quickstart.box import Box
from examples.quickstart.page import (
    CurvePoint,
    KindAccuracy,
    LicenceRow,
    OnnxFile,
    PageAssets,
    SelectionMoment,
    Thumb,
    VlmSample,
    ZeroShotExample,
)
from examples.quickstart.settings import SHARE, Settings
from examples.quickstart.stages import zero_shot_of

_APT_SOURCES = {"openclipart-svg": "openclipart", "tuxpaint-stamps-default": "tuxpaint"}
LIMITS = (
    "These are pictograms and clip-art with short captions: nothing here supports a claim about photographs.",
    "Zero-shot is top-5 accuracy over three tasks. Retrieval is recall at 5 in both directions on unseen concepts, "
    "with equal captions merged.",
    "The static filter and the trusted pairs alone stand beside the methods because they are strong opponents on a "
    "pool this small; a run of minutes says little about the order among curated methods.",
    "One reference selects and teaches, and it was trained on emoji in other drawing styles only.",
    "The settings were chosen on the validation tasks; the tasks of this page were not used for that.",
)


def collect(settings: Settings, box: Box, vlm: dict[str, Any], onnx: dict[str, Any]) -> PageAssets:
    """Everything that the page shows beside summary.json."""
    names = ("iid", "softmax_kd", "i_acid", "h_acid", "aced", "static", "trusted")
    runs = {
        name: list(read_events(settings.directory / "distil" / f"{name}-{settings.seeds[0]}" / "events.jsonl"))
        for name in names
    }
    pool = Pool([box.pool])
    rows = box.manifest["rows"]["pool"]
    rows_of = _rows_by_source([pool, Pool([box.trusted])])
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in rows["kinds"].items())
    return PageAssets(
        facts=[
            ("Pool", f"{rows['rows']:,} pairs ({kinds}); {rows['noisy'] / rows['rows']:.0%} of the captions shuffled"),
            ("Trusted pairs of the reference", f"{box.manifest['rows']['trusted']['rows']:,} in other drawing styles"),
            (
                "Trained by every method",
                f"{settings.steps * settings.sub_batch:,} examples; {1 - SHARE:.0%} of what is drawn is passed over",
            ),
            ("Machine", f"{platform.machine()}, {os.cpu_count()} cores, no GPU used; {platform.system()}"),
        ],
        curves={name: [_point(row) for row in events if row["event"] == "evaluated"] for name, events in runs.items()},
        selection=_moments(runs["aced"], pool, settings.steps),
        noise_curve={name: _noise(runs[name]) for name in ("i_acid", "h_acid", "aced")},
        zero_shot_examples=_zero_shot(settings, box),
        vlm_kinds=[KindAccuracy(kind, k["questions"], k["accuracy"], k["blind"]) for kind, k in vlm["kinds"].items()],
        vlm_samples=_answers(vlm["samples"], box.vqa),
        onnx_files=_files(onnx),
        licences=[
            LicenceRow(source["package"], source["version"], source["licence"], rows_of[_short(source["package"])])
            for source in box.manifest["sources"]
        ],
        limits=LIMITS,
    )


def _rows_by_source(pools: list[Pool]) -> Counter[str]:
    """Training rows of each source: pool and trusted pairs."""
    return Counter(str(pool.metadata(row).get("source")) for pool in pools for row in range(len(pool)))


def _short(package: str) -> str:
    """The name by which rows call a package."""
    return _APT_SOURCES.get(package, package.rsplit("/", 1)[-1])


def _point(row: dict[str, Any]) -> CurvePoint:
    compute = 3 * row["trained"] + row["scored"]
    return {
        "trained": row["trained"],
        "scored": row["scored"],
        "compute": compute,
        "zero_shot": zero_shot_of(row["metrics"]),
    }


def _noise(events: list[dict[str, Any]]) -> list[tuple[int, float, float]]:
    """Averages over blocks of steps: one super-batch alone is noisy."""
    rows = [(e["step"], e["statistics"]) for e in events if e["event"] == "selected"]
    block = max(1, len(rows) // 25)
    result = []
    for start in range(0, len(rows) - block + 1, block):
        part = rows[start : start + block]
        chosen = sum(s["noisy_selected"] for _, s in part) / len(part)
        drawn = sum(s["noisy_candidates"] for _, s in part) / len(part)
        result.append((part[-1][0], chosen, drawn))
    return result


def _moments(events: list[dict[str, Any]], pool: Pool, steps: int, count: int = 10) -> list[SelectionMoment]:
    wanted = {1, steps // 2, steps}
    moments = []
    for event in events:
        if event["event"] != "selected" or event["step"] not in wanted:
            continue
        draw = random.Random(event["step"])
        passed = sorted(set(event["candidates"]) - set(event["picked"]))
        moments.append(
            SelectionMoment(
                event["step"],
                [_thumb(pool, row) for row in draw.sample(event["picked"], count)],
                [_thumb(pool, row) for row in draw.sample(passed, count)],
                _noisy_share(pool, event["picked"]),
                _noisy_share(pool, passed),
            )
        )
    return moments


def _noisy_share(pool: Pool, rows: list[int]) -> float:
    return sum(pool.metadata(row).get("noisy") is True for row in rows) / len(rows)


def _thumb(pool: Pool, row: int) -> Thumb:
    facts = pool.metadata(row)
    caption = pool.text(row)
    return Thumb(pool.image(row, 10**7), caption, facts.get("true_caption", caption), facts.get("noisy") is True)


def _zero_shot(settings: Settings, box: Box, count: int = 12) -> list[ZeroShotExample]:
    student = aced.load(settings.directory / "student")
    task = load_task("unseen_concept", box.evaluation, student)
    pool = Pool([box.evaluation / "unseen_concept" / "test"])
    classes = class_embeddings(student, task.texts, task.templates)
    drawn = random.Random(0).sample(range(len(task.labels)), count)
    examples = []
    for row in drawn:
        scores = student.scale * student.encode_image(task.images[row : row + 1]) @ classes.T
        share, best = torch.softmax(scores[0], dim=0).topk(3)
        top = [(task.texts[int(c)], float(s)) for c, s in zip(best, share, strict=True)]
        examples.append(ZeroShotExample(pool.image(row, 10**7), task.texts[int(task.labels[row])], top))
    return examples


def _answers(samples: list[dict[str, Any]], folder: Path, count: int = 16) -> list[VlmSample]:
    captions = [s for s in samples if s["kind"] == "caption"]
    answers = [s for s in samples if s["kind"] != "caption"]
    drawn = random.Random(0).sample(answers, min(count, len(answers))) + captions
    return [VlmSample(_open(s["image"], folder), s["question"], s["said"], s["truth"], s["right"]) for s in drawn]


def _open(path: str, folder: Path) -> Image.Image:
    try:
        return to_rgb(open_picture(inside(folder, Path(path).relative_to(folder.resolve()))))
    except (TypeError, ValueError) as error:  # a PictureError, a ReadError, or a path that is not in the folder
        raise DataError(f"{printable(path)}: {error}", remedy="remove the demo's folder and start again") from None


def _files(onnx: dict[str, Any]) -> list[OnnxFile]:
    report = onnx["report"]
    return [
        OnnxFile(
            part=graph["part"],
            precision=graph["precision"],
            megabytes=graph["bytes"] / 1e6,
            milliseconds=graph["latency_ms"]["1"],
            torch_milliseconds=report["torch_latency_ms"][graph["part"]]["1"],
            min_cosine=graph["min_cosine"],
            zero_shot=onnx["zero_shot_by_precision"][graph["precision"]],
        )
        for graph in report["graphs"]
    ]
