# SPDX-License-Identifier: Apache-2.0
"""The rows of the table: which config each method is, what may be chosen for it, and one run of it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import aced_sdk as aced
from aced_sdk import towers
from aced_sdk.config import Curation, SelectionLoss
from aced_sdk.engine.events import Event
from aced_sdk.files import home, write_json
from aced_sdk.training.events import Evaluated, RunEnded, Selected
from benchmarks.ordering.world import SIDE, STUDENT, Material, World, WorldConfig, make_world

SUB_BATCH = 128
Split = Literal["validation", "evaluation"]
SEEN = ("unseen_style_twemoji", "unseen_style_openmoji")
STAMPS = ("tux_paint_photos", "tux_paint_drawings")
TASKS: dict[Split, tuple[str, ...]] = {
    "validation": ("validation_style", "validation_concept"),
    "evaluation": (*SEEN, "unseen_concept", "retrieval_unseen_concept", *STAMPS),
}


@dataclass(frozen=True)
class Knobs:
    """What a row may be tuned in.

    Attributes:
        weight: lambda of its distillation term.
        gain: of its sampler.
        keep_fraction: that its static filter keeps.
        f: filter ratio.
        chunks: n of the joint sampler.
        learning_rate: peak.
    """

    weight: float = 5.0
    gain: float = 1.0
    keep_fraction: float = 0.2
    f: float = 0.8
    chunks: int = 16
    learning_rate: float = 1e-3

    @classmethod
    def of(cls, choice: Mapping[str, float]) -> Knobs:
        """The defaults with some values chosen."""
        return cls(**choice)  # type: ignore[arg-type]


def _weights(*values: float) -> tuple[dict[str, float], ...]:
    return tuple({"weight": value} for value in values)


_RATES = tuple({"learning_rate": value} for value in (5e-4, 1e-3, 2e-3))
_GAINS = tuple({"gain": value} for value in (0.5, 1.0, 3.0))
# Three settings for every row, in the one thing it has to choose; chosen on the validation split of a world apart.
CHOICES: dict[str, tuple[dict[str, float], ...]] = {
    "iid": _RATES,
    "softmax_kd": _weights(1, 5, 20),
    "sigmoid_kd": _weights(0.2, 1, 5),
    "feature_kd": _weights(10, 100, 1000),
    "interactive_kd": _weights(0.3, 1, 3),
    "i_acid": _GAINS,
    "i_acid_kd": _weights(1, 5, 20),
    "h_acid_independent": _GAINS,
    "h_acid": _GAINS,
    "aced": _weights(1, 5, 20),
    "aced_iid_distill": _weights(1, 5, 20),
    "static": tuple({"keep_fraction": value} for value in (0.1, 0.2, 0.4)),
    "static_kd": tuple({"keep_fraction": value} for value in (0.1, 0.2, 0.4)),
    "trusted": _RATES,
}
ROWS = tuple(CHOICES)
CURVES = ("iid", "softmax_kd", "i_acid", "h_acid", "aced", "static_kd", "trusted")  # looked at four times
_LOSS_OF: dict[str, str] = {
    "softmax_kd": "softmax",
    "sigmoid_kd": "sigmoid",
    "feature_kd": "feature",
    "interactive_kd": "interactive",
    "i_acid_kd": "softmax",
    "aced": "softmax",
    "aced_cheap": "softmax",
    "aced_iid_distill": "softmax",
    "static_kd": "softmax",
}


def method(row: str, knobs: Knobs, form: SelectionLoss = "auto") -> tuple[Curation, aced.Objective]:
    """Curation and objective of a row: all that the rows differ in, but for the trusted set's shards."""
    b = SUB_BATCH
    super_batch = round(b / (1 - knobs.f))
    joint = aced.Joint(sub_batch=b, super_batch=super_batch, num_chunks=knobs.chunks, gain=knobs.gain, loss=form)
    curations: dict[str, Curation] = {
        "i_acid": joint.replace(score="easy_reference"),
        "i_acid_kd": joint.replace(score="easy_reference"),
        "h_acid": joint,
        "aced": joint,
        "aced_cheap": joint.replace(scoring_size=SIDE // 2),
        "aced_iid_distill": joint,
        "h_acid_independent": aced.Independent(sub_batch=b, super_batch=super_batch, gain=knobs.gain),
        "static": aced.StaticFilter(sub_batch=b, keep_fraction=knobs.keep_fraction),
        "static_kd": aced.StaticFilter(sub_batch=b, keep_fraction=knobs.keep_fraction),
    }
    loss = _LOSS_OF.get(row)
    if loss is None:
        objective = aced.Objective()
    else:
        batch = "iid" if row == "aced_iid_distill" else "same"
        objective = aced.Objective(distillation=(aced.Distillation(loss=loss, weight=knobs.weight, batch=batch),))
    return curations.get(row, aced.Iid(sub_batch=b)), objective


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        row: the method.
        world: what it trains in.
        steps: of training.
        split: what it is judged on.
        knobs: its settings.
        reference: `large` is the world's own (pretrained trunks); `equal` and `small` are towers of the student's size
            and of less than half of it, trained on the world's trusted pairs.
        form: of the loss in the joint sampler's scores.

    Weights, order and draws have the world's seed.
    """

    row: str
    world: WorldConfig
    steps: int
    split: Split = "evaluation"
    knobs: Knobs = field(default_factory=Knobs)
    reference: Literal["large", "equal", "small"] = "large"
    form: SelectionLoss = "auto"

    @property
    def result(self) -> Path:
        """Where its figures lie once it is done."""
        text = json.dumps(asdict(self) | {"recipe": 1, "world": self.world.name()}, sort_keys=True)
        return home() / "ordering" / "jobs" / f"{self.row}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"

    def cost(self) -> float:
        """Forward passes of the student per trained example, a step's backward pass counted as two."""
        curation, objective = method(self.row, self.knobs, self.form)
        trained = 6.0 if objective.needs_iid_batch else 3.0
        scored = curation.candidates / curation.sub_batch if curation.needs_student else 0.0
        size = curation.scoring_side
        if isinstance(curation, aced.Joint) and size is not None:
            share = _pass_at(size)
            trained *= 1 - curation.scoring_fraction * (1 - share)
            scored *= share
        return trained + scored


@cache
def _pass_at(size: int) -> float:
    """MACs of a forward pass on pictures of that side, as a share of one at the student's own."""
    student = towers.build(aced.Student(architecture=STUDENT), 0)
    return student.profile(size).macs / student.profile().macs


def job_config(job: Job, world: World, directory: Path, reference: aced.Frozen | aced.Stored) -> aced.DistillConfig:
    """The config that a job stands for."""
    curation, objective = method(job.row, job.knobs, job.form)
    root = world.validation if job.split == "validation" else world.evaluation
    shards = world.trusted if job.row == "trusted" else world.pool
    every = max(1, job.steps // 4) if job.split == "evaluation" and job.row in CURVES else 0
    tasks = tuple(name for name in TASKS[job.split] if (root / name).is_dir())  # no stamps without apt
    return aced.DistillConfig(
        student=aced.Student(architecture=STUDENT),
        data=aced.Data(shards=(str(shards),), prepared=home() / "prepared"),
        reference=reference,
        curation=curation,
        objective=objective,
        optimizer=aced.Optimizer(learning_rate=job.knobs.learning_rate, weight_decay=0.05),
        schedule=aced.Schedule(steps=job.steps, warmup=0.1),
        engine=aced.Engine(kind="single", device="cpu", threads=1, scoring_batch=160, checkpoint_every=10**9),
        evaluation=aced.Evaluation(tasks=tasks, data_root=root, every=every),
        seed=job.world.seed,
        directory=directory,
    )


def run_job(job: Job, material: Material) -> dict[str, Any]:
    """Train, evaluate, and keep the figures; what is there already is not run again."""
    if job.result.is_file():
        done: dict[str, Any] = json.loads(job.result.read_text(encoding="utf-8"))
        return done
    world = make_world(job.world, material)
    directory = home() / "ordering" / "runs" / f"{job.result.stem}-{os.getpid()}"
    shutil.rmtree(directory, ignore_errors=True)
    curve: list[dict[str, Any]] = []
    picked: list[Mapping[str, float]] = []
    ended: list[RunEnded] = []

    def hear(event: Event) -> None:
        if isinstance(event, Evaluated):
            curve.append({"step": event.step} | figures(event.metrics))
        elif isinstance(event, Selected):
            picked.append(event.statistics)
        elif isinstance(event, RunEnded):
            ended.append(event)

    aced.distill(job_config(job, world, directory, _reference(job, world)), callbacks=[hear])
    result = {
        "job": asdict(job),
        "figures": {name: value for name, value in curve[-1].items() if name != "step"},
        "curve": curve,
        "trained": ended[0].trained,
        "scored": ended[0].scored,
        "seconds": ended[0].seconds,
        "noisy_selected": mean(p["noisy_selected"] for p in picked) if picked else None,
        "unique_coverage": picked[-1].get("unique_coverage") if picked else None,
        "auc": world.auc,
    }
    write_json(job.result, result)
    shutil.rmtree(directory)
    return result


def figures(metrics: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Shares in 0..1: seen concepts in new styles, unseen concepts, their retrieval, another domain, and the mean."""
    if "validation_style" in metrics:
        return {"score": mean(metrics[task]["acc5"] for task in TASKS["validation"])}
    found = metrics["retrieval_unseen_concept"]
    result = {
        "zero_shot": mean(metrics[task]["acc5"] for task in SEEN),
        "held_out_concepts": metrics["unseen_concept"]["acc5"],
        "retrieval": (found["merged_image_to_text_r5"] + found["merged_text_to_image_r5"]) / 2,
    }
    stamps = [metrics[task]["acc5"] for task in STAMPS if task in metrics]
    if stamps:
        result["other_domain"] = mean(stamps)
    return result | {"score": mean(result.values())}


SMALL: dict[str, Any] = STUDENT | {
    "vision_cfg": STUDENT["vision_cfg"] | {"width": 64, "layers": 1},
    "text_cfg": STUDENT["text_cfg"] | {"width": 64, "heads": 2},
}


def _reference(job: Job, world: World) -> aced.Frozen | aced.Stored:
    """The model that selects and teaches; towers trained on the trusted pairs are made where they are missing."""
    if job.reference == "large":
        return world.reference
    folder = world.directory / f"reference-{job.reference}"
    if not (folder / "student" / "aced.json").is_file():
        alone = replace(job, row="trusted", steps=1500, knobs=Knobs(learning_rate=2e-3), reference="large")
        shutil.rmtree(folder, ignore_errors=True)
        config = job_config(alone, world, folder, world.reference)
        architecture = SMALL if job.reference == "small" else STUDENT
        aced.distill(config.replace(student=aced.Student(architecture=architecture), evaluation=aced.Evaluation()))
    return aced.Frozen(model=str(folder / "student"))
