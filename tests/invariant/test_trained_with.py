# SPDX-License-Identifier: Apache-2.0
"""Folders and caches carry the loss that a model was trained with, and runs score with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ARCHITECTURE, distillation, encoder, write_pool

import aced_sdk as aced
from aced_sdk import towers
from aced_sdk.config import Student
from aced_sdk.engine.events import Event, Warned
from aced_sdk.training.events import RunStarted


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pool(tmp_path_factory.mktemp("pool"), pairs=64)


def without_bias(folder: Path) -> Path:
    """A CLIP as its users have it: softmax-trained, without a logit bias."""
    made = encoder(1)
    del made.model_cfg["init_logit_bias"]
    made.model.logit_bias = None
    made.trained_with = "softmax"
    return towers.save(made, folder)


def run(directory: Path, pool: Path, reference: Path, **changes: Any) -> tuple[aced.Run, list[Event]]:
    heard: list[Event] = []
    config = distillation(directory, pool, reference).replace(**changes)
    return aced.distill(config, callbacks=[heard.append]), heard


def warnings_of(heard: list[Event]) -> list[str]:
    return [event.cause for event in heard if isinstance(event, Warned) and "close to random" in event.cause]


def test_a_cache_and_a_folder_carry_the_loss(tmp_path: Path, pool: Path) -> None:
    clip, siglip = without_bias(tmp_path / "clip"), towers.save(encoder(1), tmp_path / "siglip")
    assert (towers.load(clip).trained_with, towers.load(siglip).trained_with) == ("softmax", "sigmoid")
    for folder, loss in ((clip, "softmax"), (siglip, "sigmoid")):
        made = aced.cache_embeddings(folder, pool, tmp_path / f"cache-{loss}")
        assert made.rows(torch.arange(4), torch.device("cpu")).trained_with == loss
    (siglip / "aced.json").unlink()  # a folder of open_clip's own
    assert towers.load(siglip).trained_with == "sigmoid"


def test_a_student_trained_by_softmax_says_so_although_it_has_a_bias(tmp_path: Path, pool: Path) -> None:
    objective = aced.Objective(contrastive=aced.Contrastive(loss="softmax"))
    made, heard = run(tmp_path / "run", pool, without_bias(tmp_path / "clip"), objective=objective)
    assert made.student.bias != 0
    assert towers.load(tmp_path / "run" / "student").trained_with == "softmax"
    assert warnings_of(heard) == []


def test_a_run_warns_once_where_its_selection_is_close_to_random(tmp_path: Path, pool: Path) -> None:
    clip = without_bias(tmp_path / "clip")
    curation = distillation(tmp_path / "x", pool, clip).curation
    _, heard = run(tmp_path / "auto", pool, clip)
    assert warnings_of(heard) == []
    with pytest.warns(UserWarning, match="close to random"):
        _, heard = run(tmp_path / "sigmoid", pool, clip, curation=curation.replace(loss="sigmoid"))
    assert len(warnings_of(heard)) == 1


def test_names_of_weights_load_them_and_architectures_do_not(tmp_path: Path, pool: Path) -> None:
    folder = towers.save(encoder(3), tmp_path / "trained")
    for name in (str(folder), f"local-dir:{folder}"):
        built = towers.build(Student(architecture=name), 0)
        assert built.fingerprint() == towers.load(folder).fingerprint()
    assert towers.build(Student(architecture=ARCHITECTURE), 0).fingerprint() != built.fingerprint()
    reference = towers.save(encoder(1), tmp_path / "reference")
    for student, said in ((str(folder), "trained weights"), (ARCHITECTURE, "new weights")):
        _, heard = run(tmp_path / said, pool, reference, student=Student(architecture=student))
        (started,) = (event for event in heard if isinstance(event, RunStarted))
        assert started.facts["student"] == said


def test_a_hub_name_is_fetched_not_built_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = towers.save(encoder(3), tmp_path / "trained")
    asked: list[str] = []

    def fetch(name: str, _: object) -> Path:
        asked.append(name)
        return folder

    monkeypatch.setattr("aced_sdk.towers.folder.fetch", fetch)
    built = towers.build(Student(architecture="hf-hub:org/model"), 0)
    assert asked == ["org/model"]
    assert built.fingerprint() == towers.load(folder).fingerprint()
