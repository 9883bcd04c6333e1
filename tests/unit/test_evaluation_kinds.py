# SPDX-License-Identifier: Apache-2.0
"""Evaluation kinds of one's own: found by their key, with a main metric, and checked before a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_evaluation import classification
from tiny import distillation, encoder, write_pool

import aced_sdk as aced
from aced_sdk import towers
from aced_sdk.errors import EvaluationError
from aced_sdk.evaluation import KINDS, Task, ZeroShot, main_metric
from aced_sdk.towers import DualEncoder


@pytest.fixture(autouse=True)
def kinds() -> Iterator[None]:
    """What a test adds stays its own."""
    before = dict(KINDS)
    yield
    KINDS.clear()
    KINDS.update(before)


class Own(ZeroShot):
    """Metrics of a function."""

    def __init__(self, made: Callable[[Task], Any], main: str | tuple[str, ...] = "mine") -> None:
        self.made, self.main_metric = made, main

    def metrics(self, encoder: DualEncoder, images: torch.Tensor, task: Task) -> Any:
        return self.made(task)


def folder(root: Path, kind: str) -> Path:
    (classification(root) / "shapes" / "dataset_type.txt").write_text(kind)
    return root


def test_metrics_of_ones_own_enter_the_means(tmp_path: Path) -> None:
    KINDS["own"] = Own(lambda task: {"mine": np.float32(0.25), "count": len(task.images), "other": 2.0})
    report = aced.evaluate(encoder(), ["shapes"], folder(tmp_path, "own")).to_dict()
    assert report["tasks"]["shapes"] == {"mine": 0.25, "count": 20.0, "other": 2.0}
    assert all(type(value) is float for value in report["tasks"]["shapes"].values())
    assert (report["main"], report["mean"], report["grouped"]) == ({"shapes": 0.25}, 0.25, {"other": 0.25})
    KINDS["own"] = Own(lambda task: {"a": 1.0, "b": 0.0, "c": 7.0}, ("a", "b"))
    assert aced.evaluate(encoder(), ["shapes"], tmp_path).main == {"shapes": 0.5}


def test_the_main_metrics_of_the_package_are_as_documented(tmp_path: Path) -> None:
    def main(kind: str, metrics: dict[str, float]) -> float:
        nothing = torch.empty(0)
        return main_metric(Task("a", kind, nothing, nothing, [], nothing, [], {}), metrics)

    assert main("classification", {"acc5": 0.9, "acc1": 0.5}) == 0.5
    assert main("multilabel", {"mean_average_precision": 0.4}) == 0.4
    assert main("retrieval", {"image_to_text_r1": 0.2, "text_to_image_r1": 0.4}) == pytest.approx(0.3)


@pytest.mark.parametrize("word", ["samename", "SameName", "SAMENAME\n"])
def test_a_kind_is_found_by_its_key_alone(tmp_path: Path, word: str) -> None:
    class SameName(ZeroShot):
        def metrics(self, encoder: DualEncoder, images: torch.Tensor, task: Task) -> dict[str, float]:
            return {"acc1": -1.0}

    KINDS["SameName"] = SameName()
    assert aced.evaluate(encoder(), ["shapes"], folder(tmp_path, word)).tasks == {"shapes": {"acc1": -1.0}}
    assert aced.evaluate(encoder(), ["shapes"], folder(tmp_path, "classification")).main["shapes"] >= 0


@pytest.mark.parametrize(
    ("metrics", "cause"),
    [
        ({"mine": torch.tensor(0.5)}, r"the metric 'mine' of the task 'shapes' is tensor\(0.5"),
        ({"mine": 0.5, "more": "0.5"}, "'more' of the task 'shapes' is '0.5'"),
        ({"mine": None}, "'mine' of the task 'shapes' is None"),
        ({"mine": float("nan")}, "'mine' of the task 'shapes' is nan"),
        ({"other": 0.5}, "'mine' of the task 'shapes' is 'missing'"),
        ({}, "'mine' of the task 'shapes' is 'missing'"),
    ],
)
def test_a_metric_that_is_no_number_fails_before_the_first_step(
    tmp_path: Path, metrics: dict[str, Any], cause: str
) -> None:
    KINDS["own"] = Own(lambda task: metrics)
    root, model = folder(tmp_path / "tasks", "own"), encoder(1)
    with pytest.raises(EvaluationError, match=cause):
        aced.evaluate(model, ["shapes"], root)
    pool, reference = write_pool(tmp_path / "pool", pairs=16), towers.save(model, tmp_path / "reference")
    config = distillation(tmp_path / "run", pool, reference)
    heard: list[Any] = []
    with pytest.raises(EvaluationError, match=cause) as caught:
        aced.distill(config.replace(evaluation={"tasks": ["shapes"], "data_root": root}), callbacks=[heard.append])
    assert "'own'" in caught.value.remedy
    assert not [event for event in heard if event.name == "step_done"]


def test_a_kind_without_its_parts_is_refused_before_pictures_are_read(tmp_path: Path) -> None:
    class Partial:
        has_classes = True

    KINDS["partial"] = Partial()  # type: ignore[assignment]
    with pytest.raises(EvaluationError, match="'partial' has no main_metric, check_size, label, collect, metrics"):
        aced.evaluate(encoder(), ["shapes"], folder(tmp_path, "partial"))
    with pytest.raises(EvaluationError, match="unknown kind of task: 'other'") as caught:
        aced.evaluate(encoder(), ["shapes"], folder(tmp_path, "other"))
    assert "aced --import MODULE" in caught.value.remedy
