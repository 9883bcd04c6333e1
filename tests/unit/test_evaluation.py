# SPDX-License-Identifier: Apache-2.0
"""Zero-shot and retrieval against their definitions, written out in float64; tasks in CLIP_benchmark's layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tiny import encoder, picture, write_tar

import aced_sdk as aced
from aced_sdk.engine.events import Evaluated, Event, RunEnded, RunStarted, StepDone
from aced_sdk.errors import EvaluationError
from aced_sdk.evaluation import (
    STABLE_EVAL,
    EvaluateEvery,
    EvaluationReport,
    class_embeddings,
    load_task,
    retrieval,
    zero_shot,
)
from aced_sdk.evaluation.tasks import expand_names
from aced_sdk.towers import DualEncoder

CLASSES = ["cat", "boat", "tree", "red house", "blue star", "square"]
TEMPLATES = ["a picture of a {c}.", "a small {c}"]
Array = NDArray[np.float64]


@pytest.fixture(scope="module")
def tower() -> DualEncoder:
    return encoder()


def classification(root: Path, name: str = "shapes", broken: bool = False) -> Path:
    samples = [{"png": picture(n), "cls": str(n % len(CLASSES)).encode()} for n in range(20)]
    if broken:
        samples += [{"png": b"?", "cls": b"0"}, {"png": picture(1), "cls": b"6"}, {"png": picture(1)}]
    write_tar(root / name / "test" / "0.tar", samples)
    (root / name / "classnames.txt").write_text("\n".join(CLASSES) + "\n")
    (root / name / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES))
    return root


def captions(root: Path, name: str = "captions") -> Path:
    texts = ["a red cat", "a boat\na small boat", "a tree", "a red cat", "a house\na tree", "stars"]
    samples = [{"png": picture(n), "txt": text.encode()} for n, text in enumerate(texts)]
    samples.insert(2, {"png": b"?", "txt": b"a text whose picture is broken"})
    write_tar(root / name / "test" / "0.tar", samples)
    (root / name / "dataset_type.txt").write_text("retrieval\n")
    return root


def unit(count: int, seed: int) -> Array:
    rows = np.random.default_rng(seed).normal(size=(count, 6))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("classes", [3, 12])
def test_accuracy_is_its_definition(classes: int) -> None:
    images, embedded = unit(40, 0), unit(classes, 1)
    labels = np.random.default_rng(2).integers(0, classes, 40)
    hits = {1: 0, 5: 0}
    for image, label in zip(images, labels, strict=True):
        ranked = sorted(range(classes), key=lambda c: -float(image @ embedded[c]))
        for k in hits:
            hits[k] += label in ranked[:k]
    found = zero_shot(torch.from_numpy(images), torch.from_numpy(embedded), torch.from_numpy(labels))
    assert found == pytest.approx({"acc1": hits[1] / 40, "acc5": hits[5] / 40})


def test_recall_is_its_definition_with_texts_and_pictures_of_many() -> None:
    images, texts = unit(30, 3), unit(14, 4)
    own = np.random.default_rng(5).random((30, 14)) < 0.15
    own[np.arange(30), np.arange(30) % 14] = True
    expected = {}
    for k in (1, 5):
        to_text = [own[i, np.argsort(-(texts @ images[i]))[:k]].any() for i in range(30)]
        to_image = [own[np.argsort(-(images @ texts[t]))[:k], t].any() for t in range(14)]
        expected |= {f"image_to_text_r{k}": np.mean(to_text), f"text_to_image_r{k}": np.mean(to_image)}
    found = retrieval(torch.from_numpy(images), torch.from_numpy(texts), torch.from_numpy(own))
    assert found == pytest.approx(expected)
    assert 0 < found["image_to_text_r1"] < found["image_to_text_r5"]


def test_a_class_is_the_normalised_mean_of_its_prompts(tower: DualEncoder) -> None:
    found = class_embeddings(tower, CLASSES[:3], TEMPLATES)
    for number, name in enumerate(CLASSES[:3]):
        mean = sum(tower.encode_text(template.replace("{c}", name))[0].double() for template in TEMPLATES)
        torch.testing.assert_close(found[number].double(), mean / mean.norm(), atol=1e-6, rtol=0)


def test_a_classification_task_is_read_and_what_is_broken_is_counted(tmp_path: Path, tower: DualEncoder) -> None:
    task = load_task("shapes", classification(tmp_path, broken=True), tower)
    assert (task.kind, task.texts, task.templates) == ("zero_shot", CLASSES, TEMPLATES)
    assert task.labels.tolist() == [n % 6 for n in range(20)]
    assert task.images.shape == (20, 3, 16, 16)
    assert task.skipped == {"unreadable picture": 1, "class out of range": 1, "no class": 1}


def test_a_retrieval_task_has_a_text_a_line_and_none_of_a_broken_picture(tmp_path: Path, tower: DualEncoder) -> None:
    task = load_task("captions", captions(tmp_path), tower)
    assert task.texts == ["a red cat", "a boat", "a small boat", "a tree", "a house", "stars"]
    assert [torch.nonzero(own).flatten().tolist() for own in task.labels] == [[0], [1, 2], [3], [0], [3, 4], [5]]
    assert task.skipped == {"unreadable picture": 1}


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        ("classnames.txt", "cannot read .*classnames"),
        ("zeroshot_classification_templates.txt", "cannot read .*templates"),
        ("empty", "templates.txt is empty"),
        ("test/0.tar", "the task 'shapes' cannot be read"),
        ("labels", "no usable sample"),
    ],
)
def test_a_task_with_something_missing_is_told(tmp_path: Path, tower: DualEncoder, damage: str, cause: str) -> None:
    folder = classification(tmp_path) / "shapes"
    if damage == "labels":
        write_tar(folder / "test" / "0.tar", [{"png": picture(0), "cls": b"x"}])
    elif damage == "empty":
        (folder / "zeroshot_classification_templates.txt").write_text("\n")
    else:
        (folder / damage).unlink()
    with pytest.raises(EvaluationError, match=cause):
        load_task("shapes", tmp_path, tower)


def test_an_unknown_task_names_the_known_ones(tmp_path: Path, tower: DualEncoder) -> None:
    with pytest.raises(EvaluationError, match="no task 'cifar'") as caught:
        aced.evaluate(tower, ["cifar"], classification(tmp_path))
    assert "shapes" in caught.value.remedy
    with pytest.raises(EvaluationError, match="no task is named"):
        aced.evaluate(tower, [], tmp_path)
    with pytest.raises(EvaluationError, match="no task 'imagenet1k'"):
        aced.evaluate(tower, data_root=tmp_path)


def test_stable_eval_has_its_27_tasks() -> None:
    names = expand_names(["a", "stable_eval"])
    assert names[0] == "a"
    assert len(names) == len(set(names)) == 28
    assert {group: len(tasks) for group, tasks in STABLE_EVAL.items()} == {
        "imagenet": 1, "imagenet_shift": 5, "object": 10, "scene": 9, "retrieval": 2,
    }  # fmt: skip


def test_a_report_tells_tasks_groups_and_the_mean(tmp_path: Path, tower: DualEncoder) -> None:
    root = captions(classification(classification(tmp_path, "cifar10"), "shapes", broken=True))
    report = aced.evaluate(tower, ["cifar10", "shapes", "captions"], root).to_dict()
    assert set(report) == {"tasks", "main", "grouped", "mean", "skipped"}
    assert set(report["tasks"]["captions"]) == {
        "image_to_text_r1", "image_to_text_r5", "text_to_image_r1", "text_to_image_r5",
    }  # fmt: skip
    assert report["main"]["cifar10"] == report["tasks"]["cifar10"]["acc1"]
    assert report["skipped"]["cifar10"] == {}
    assert report["skipped"]["shapes"]["no class"] == 1
    fixed = EvaluationReport(
        {
            "cifar10": {"acc1": 0.5, "acc5": 1.0},
            "dtd": {"acc1": 0.1, "acc5": 0.2},
            "mine": {"image_to_text_r1": 0.2, "text_to_image_r1": 0.4},
        },
        {},
    ).to_dict()
    assert fixed["grouped"] == {"object": 0.5, "scene": 0.1, "other": pytest.approx(0.3)}
    assert fixed["mean"] == pytest.approx(0.3)


def test_the_callback_evaluates_every_so_many_steps_and_at_the_end(tmp_path: Path, tower: DualEncoder) -> None:
    task = load_task("shapes", classification(tmp_path), tower)
    heard: list[Event] = []
    callback = EvaluateEvery(tower, [task], 3, [heard.append])
    callback(RunStarted(0, 7, "hash"))
    tower.train()
    for step in range(1, 8):
        callback(StepDone(step, 1.0, {}, 0.1, 1.0, step * 8, step * 16, 0.1, 0.0))
    assert tower.training
    tower.eval()
    callback(RunEnded(7, 1.0, 56, 112))
    assert [event.step for event in heard] == [3, 6, 7]
    last = heard[-1]
    assert isinstance(last, Evaluated)
    assert last.metrics == aced.evaluate(tower, ["shapes"], tmp_path).tasks
    assert (last.trained, last.scored) == (56, 112)
