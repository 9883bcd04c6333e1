# SPDX-License-Identifier: Apache-2.0
"""Zero-shot and retrieval against their definitions, written out in float64; tasks in CLIP_benchmark's layout."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from tiny import encoder, picture, write_tar

import aced_sdk as aced
from aced_sdk.engine.events import Event
from aced_sdk.errors import EvaluationError
from aced_sdk.evaluation import (
    STABLE_EVAL,
    EvaluateEvery,
    EvaluationReport,
    class_embeddings,
    expand_names,
    load_task,
    merged_retrieval,
    multilabel,
    open_task,
    retrieval,
    run_task,
    zero_shot,
)
from aced_sdk.evaluation.stable_eval import folder_names, group_of
from aced_sdk.towers import DualEncoder
from aced_sdk.training.events import Evaluated, RunEnded, RunStarted, StudentStep

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
    assert (found["acc1"], found["acc5"]) == pytest.approx((hits[1] / 40, hits[5] / 40))


def test_mean_per_class_recall_is_its_definition() -> None:
    images, embedded = unit(40, 0), unit(6, 1)
    labels = np.random.default_rng(2).choice([0, 0, 0, 1, 2, 4], 40)  # classes 3 and 5 have no picture
    guesses = (images @ embedded.T).argmax(axis=1)
    expected = np.mean([(guesses[labels == c] == c).mean() for c in np.unique(labels)])
    found = zero_shot(torch.from_numpy(images), torch.from_numpy(embedded), torch.from_numpy(labels))
    assert found["mean_per_class_recall"] == pytest.approx(expected)
    assert found["mean_per_class_recall"] != pytest.approx(found["acc1"])


def test_mean_average_precision_is_its_definition() -> None:
    images, classes = unit(30, 3), unit(7, 4)
    labels = np.random.default_rng(5).random((30, 7)) < 0.3
    labels[:, 2] = False  # a class without a picture counts as 0, as in CLIP_benchmark
    precisions = []
    for c in range(7):
        ranked = labels[np.argsort(-(images @ classes[c])), c]
        hits = [ranked[: place + 1].mean() for place in np.flatnonzero(ranked)]
        precisions.append(np.mean(hits) if hits else 0.0)
    found = multilabel(torch.from_numpy(images), torch.from_numpy(classes), torch.from_numpy(labels))
    assert found == {"mean_average_precision": pytest.approx(np.mean(precisions))}


def test_recall_is_its_definition_and_repeated_captions_are_texts_of_their_own() -> None:
    images, distinct = unit(30, 3), unit(14, 4)
    same = np.concatenate([np.arange(14), np.random.default_rng(5).integers(0, 14, 46)])
    owner = np.random.default_rng(6).permutation(np.arange(60) % 30)
    texts = distinct[same]
    expected, merged = {}, {}
    for k in (1, 5):
        to_text, to_image, to_distinct, from_distinct = [], [], [], []
        for i in range(30):
            # the plain top k; of equal scores torch.topk's choice counts, as in CLIP_benchmark
            best = torch.from_numpy(texts @ images.T).T[i].topk(k).indices
            to_text.append(any(owner[t] == i for t in best))
            ranked = np.argsort(-(distinct @ images[i]))[:k]
            to_distinct.append(any(i in owner[same == d] for d in ranked))
        for t in range(60):
            to_image.append(owner[t] in np.argsort(-(images @ texts[t]))[:k])
        for d in range(14):
            from_distinct.append(bool(set(owner[same == d]) & set(np.argsort(-(images @ distinct[d]))[:k])))
        expected |= {f"image_to_text_r{k}": np.mean(to_text), f"text_to_image_r{k}": np.mean(to_image)}
        merged |= {
            f"merged_image_to_text_r{k}": np.mean(to_distinct),
            f"merged_text_to_image_r{k}": np.mean(from_distinct),
        }
    given = (torch.from_numpy(images), torch.from_numpy(texts), torch.from_numpy(owner))
    found = retrieval(*given)
    assert found == pytest.approx(expected)
    assert merged_retrieval(*given, torch.from_numpy(same)) == pytest.approx(merged)
    assert found["image_to_text_r1"] < merged["merged_image_to_text_r1"]


def test_a_class_is_the_normalised_mean_of_its_prompts(tower: DualEncoder) -> None:
    found = class_embeddings(tower, CLASSES[:3], TEMPLATES)
    for number, name in enumerate(CLASSES[:3]):
        mean = sum(tower.encode_text(template.replace("{c}", name))[0].double() for template in TEMPLATES)
        torch.testing.assert_close(found[number].double(), mean / mean.norm(), atol=1e-6, rtol=0)


def test_a_classification_task_is_read_and_what_is_broken_is_counted(tmp_path: Path, tower: DualEncoder) -> None:
    task = load_task("shapes", classification(tmp_path, broken=True), tower, max_unusable_fraction=0.2)
    assert (task.kind, task.texts, task.templates) == ("classification", CLASSES, TEMPLATES)
    assert task.labels.tolist() == [n % 6 for n in range(20)]
    assert task.images.shape == (20, 3, 16, 16)
    assert task.skipped == {"unreadable picture": 1, "class out of range": 1, "no class": 1}


def test_a_retrieval_task_has_a_text_a_line_and_none_of_a_broken_picture(tmp_path: Path, tower: DualEncoder) -> None:
    task = load_task("captions", captions(tmp_path), tower, max_unusable_fraction=0.2)
    assert task.texts == ["a red cat", "a boat", "a small boat", "a tree", "a house", "stars"]
    assert task.captions.tolist() == [0, 1, 2, 3, 0, 4, 3, 5]
    assert task.labels.tolist() == [0, 1, 1, 2, 3, 4, 4, 5]
    assert task.skipped == {"unreadable picture": 1}


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        ("classnames.txt", "cannot read .*classnames"),
        ("zeroshot_classification_templates.txt", "cannot read .*templates"),
        ("empty", "templates.txt is empty"),
        ("test/0.tar", "the task 'shapes' cannot be read"),
        ("labels", r"1 of 1 samples .* unusable \(1 class is not a number\)"),
        ("blank class", "line 3 of .*classnames.txt is blank"),
        ("no place", "no place for the class: 'a thing'"),
        ("unknown kind", "unknown kind of task: 'detection'"),
    ],
)
def test_a_task_with_something_missing_is_told(tmp_path: Path, tower: DualEncoder, damage: str, cause: str) -> None:
    folder = classification(tmp_path) / "shapes"
    if damage == "labels":
        write_tar(folder / "test" / "0.tar", [{"png": picture(0), "cls": b"x"}])
    elif damage == "blank class":
        (folder / "classnames.txt").write_text("cat\nboat\n\ntree\n")
    elif damage == "no place":
        (folder / "zeroshot_classification_templates.txt").write_text("a {c}\na thing\n")
    elif damage == "unknown kind":
        (folder / "dataset_type.txt").write_text("detection\n")
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
        "imagenet": 1, "imagenet_shift": 4, "object": 10, "scene": 4, "retrieval": 2, "mean_only": 6,
    }  # fmt: skip


def test_published_folders_are_found_and_belong_to_their_groups(tmp_path: Path, tower: DualEncoder) -> None:
    classification(tmp_path, "wds_vtab-pets")
    assert open_task("pets", tmp_path).classes == CLASSES
    report = aced.evaluate(tower, ["pets", "wds_vtab-pets"], tmp_path)
    assert report.tasks["pets"] == report.tasks["wds_vtab-pets"]
    assert set(report.to_dict()["grouped"]) == {"object"}
    for task in expand_names(["stable_eval"]):
        assert len(set(folder_names(task))) >= 3
    groups = [group_of(name) for name in ("wds_vtab-dtd_test", "wds_fairness-geode", "wds_imagenet1k", "wds_mine")]
    assert groups == ["mean_only", "scene", "imagenet", "other"]


def test_a_report_tells_tasks_groups_and_the_mean(tmp_path: Path, tower: DualEncoder) -> None:
    root = captions(classification(classification(tmp_path, "cifar10"), "shapes", broken=True))
    report = aced.evaluate(tower, ["cifar10", "shapes", "captions"], root, max_unusable_fraction=0.2).to_dict()
    assert set(report) == {"tasks", "main", "grouped", "mean", "skipped"}
    names = [f"{way}_r{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5)]
    assert set(report["tasks"]["captions"]) == {prefix + name for prefix in ("", "merged_") for name in names}
    assert report["main"]["cifar10"] == report["tasks"]["cifar10"]["acc1"]
    assert report["skipped"]["cifar10"] == {}
    assert report["skipped"]["shapes"]["no class"] == 1
    fixed = EvaluationReport(
        {
            "cifar10": {"acc1": 0.5, "acc5": 1.0},
            "dtd": {"acc1": 0.1, "acc5": 0.2},
            "fmow": {"acc1": 0.1, "acc5": 0.2},
            "several": {"mean_average_precision": 0.4},
            "mine": {"image_to_text_r1": 0.2, "text_to_image_r1": 0.4},
        },
        {},
        {"cifar10": 0.5, "dtd": 0.1, "fmow": 0.1, "several": 0.4, "mine": 0.3},
    ).to_dict()
    assert fixed["grouped"] == {"object": 0.5, "scene": 0.1, "other": pytest.approx(0.35)}
    assert fixed["mean"] == pytest.approx((0.5 + 0.1 + 0.1 + 0.4 + 0.3) / 5)


def test_the_callback_evaluates_every_so_many_steps_and_at_the_end(tmp_path: Path, tower: DualEncoder) -> None:
    task = load_task("shapes", classification(tmp_path), tower)
    heard: list[Event] = []
    callback = EvaluateEvery(tower, [task], 3, [heard.append])
    callback(RunStarted(0, 7, "hash"))
    tower.train()
    for step in range(1, 8):
        callback(StudentStep(step, 1.0, {}, 0.1, 1.0, step * 8, 0.1, 0.0, step * 16))
    assert tower.training
    tower.eval()
    callback(RunEnded(7, 1.0, 56, 112))
    assert [event.step for event in heard] == [3, 6, 7]
    last = heard[-1]
    assert isinstance(last, Evaluated)
    assert last.metrics == aced.evaluate(tower, ["shapes"], tmp_path).tasks
    assert (last.trained, last.scored) == (56, 112)


def test_too_many_unusable_samples_give_no_figure(tmp_path: Path, tower: DualEncoder) -> None:
    root = classification(tmp_path, broken=True)
    with pytest.raises(EvaluationError, match=r"3 of 23 samples of the task 'shapes' are unusable") as caught:
        aced.evaluate(tower, ["shapes"], root)
    assert caught.value.field == "evaluation.max_unusable_fraction"
    write_tar(root / "blank" / "test" / "0.tar", [{"png": picture(0), "txt": b"a cat\n \n\n"}] * 1)
    (root / "blank" / "dataset_type.txt").write_text("retrieval")
    assert load_task("blank", root, tower).texts == ["a cat"]


def test_both_forms_of_a_template_are_read(tmp_path: Path, tower: DualEncoder) -> None:
    root = classification(tmp_path)
    (root / "shapes" / "zeroshot_classification_templates.txt").write_text("a {} here\n\na {c} there\n")
    assert load_task("shapes", root, tower).templates == ["a {c} here", "a {c} there"]


def test_a_multilabel_task_has_an_array_of_classes_per_picture(tmp_path: Path, tower: DualEncoder) -> None:
    def array(values: object) -> bytes:
        stream = io.BytesIO()
        np.save(stream, np.array(values))
        return stream.getvalue()

    rows = np.random.default_rng(0).integers(0, 2, (12, len(CLASSES)))
    samples = [{"png": picture(n), "npy": array(row)} for n, row in enumerate(rows)]
    broken = [array([1, 0]), array(["a"] * len(CLASSES)), b"no array", array([None] * len(CLASSES))]
    samples += [{"png": picture(1), "npy": content} for content in broken]
    folder = classification(tmp_path) / "shapes"
    (folder / "dataset_type.txt").write_text("multilabel\n")
    write_tar(folder / "test" / "0.tar", samples)
    task = load_task("shapes", tmp_path, tower, max_unusable_fraction=0.5)
    assert task.labels.tolist() == (rows > 0).tolist()
    assert task.skipped == {"no classes": 4}
    assert set(run_task(tower, task)) == {"mean_average_precision"}


def test_figures_of_a_task_are_those_of_the_towers_embeddings(tmp_path: Path, tower: DualEncoder) -> None:
    """Figures of `aced.evaluate` written out in float64, from the tars on."""
    root = captions(classification(tmp_path))
    write_tar(
        root / "captions" / "test" / "0.tar",
        [{"png": picture(n), "txt": f"{CLASSES[n % 6]} {n}\na {CLASSES[(n + 1) % 6]}".encode()} for n in range(9)],
    )
    pictures = [Image.open(io.BytesIO(picture(n))) for n in range(20)]
    images = np.concatenate([tower.encode_image([image]).double().numpy() for image in pictures])

    def text(words: str) -> Array:
        return np.asarray(tower.encode_text([words])[0].double())

    classes = []
    for name in CLASSES:
        mean = np.mean([text(f"a picture of a {name}."), text(f"a small {name}")], axis=0)
        classes.append(mean / np.linalg.norm(mean))
    guesses = [[float(image @ c) for c in classes] for image in images]
    ranked = [sorted(range(6), key=lambda c: -row[c]) for row in guesses]
    expected = {
        "acc1": np.mean([order[0] == n % 6 for n, order in enumerate(ranked)]),
        "acc5": np.mean([n % 6 in order[:5] for n, order in enumerate(ranked)]),
        "mean_per_class_recall": np.mean(
            [np.mean([ranked[n][0] == c for n in range(20) if n % 6 == c]) for c in range(6)]
        ),
    }
    found = aced.evaluate(tower, ["shapes", "captions"], root).tasks
    assert found["shapes"] == pytest.approx(expected)

    lines = [(n, line) for n in range(9) for line in (f"{CLASSES[n % 6]} {n}", f"a {CLASSES[(n + 1) % 6]}")]
    texts = np.stack([text(line) for _, line in lines])
    scores = texts @ images[:9].T
    for k in (1, 5):
        to_image = np.mean([owner in np.argsort(-row)[:k] for (owner, _), row in zip(lines, scores, strict=True)])
        assert found["captions"][f"text_to_image_r{k}"] == pytest.approx(to_image)
        distinct = list(dict.fromkeys(line for _, line in lines))
        merged = []
        for n in range(9):
            best = sorted(distinct, key=lambda line: -float(text(line) @ images[n]))[:k]
            merged.append(any((n, line) in lines for line in best))
        assert found["captions"][f"merged_image_to_text_r{k}"] == pytest.approx(np.mean(merged))
        assert found["captions"][f"image_to_text_r{k}"] <= found["captions"][f"merged_image_to_text_r{k}"]
    assert found["captions"]["merged_image_to_text_r5"] < 1
