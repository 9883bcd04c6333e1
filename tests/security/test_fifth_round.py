# SPDX-License-Identifier: Apache-2.0
"""Attacks on data, runs, texts and GGUF files that a fifth round found."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest
import tiny
from PIL import Image

from aced_sdk.data import Pool
from aced_sdk.engine import checkpoints
from aced_sdk.errors import ConfigError, DataError, EvaluationError
from aced_sdk.evaluation import kinds, tasks
from aced_sdk.files.writing import alone
from aced_sdk.processing.plain import PictureError, open_picture
from export.runtime.cleaning import clean_text


def test_a_folder_is_not_waited_for_by_its_own_holder(tmp_path: Path) -> None:
    with (
        alone(tmp_path, "a run"),
        pytest.raises(ConfigError, match="would be in one folder"),
        alone(tmp_path, "embeddings", wait=True),
    ):
        pass
    with alone(tmp_path, "embeddings", wait=True):
        pass


def test_large_animations_are_refused(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    stream = io.BytesIO()
    frames[0].save(stream, "WEBP", save_all=True, append_images=frames[1:])
    assert open_picture(stream.getvalue(), max_pixels=4 * 64 * 64).size == (64, 64)
    with pytest.raises(PictureError, match="too many pixels"):
        open_picture(stream.getvalue(), max_pixels=4 * 64 * 64 - 1)


def test_names_of_a_shard_have_a_bound_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aced_sdk.data.tars._MAX_LETTERS", 50)
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for number in range(8):
            tar.addfile(tarfile.TarInfo(f"{number:06d}.a.png"))
    with pytest.raises(DataError, match="names of more than 50 letters together"):
        Pool([tmp_path / "0.tar"])


@pytest.mark.parametrize("digits", [4301, 9000])
def test_entities_of_many_digits_are_no_character(digits: int) -> None:
    text = f"a &#{'9' * digits}; b"
    assert clean_text(text, "lower") == "a \ufffd b"
    assert tiny.encoder().tokenize([text]).shape == (1, 8)


def test_multilabel_tasks_have_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "task" / "test").mkdir(parents=True)
    (tmp_path / "task" / "dataset_type.txt").write_text("multilabel")
    (tmp_path / "task" / "classnames.txt").write_text("red\nblue\n")
    (tmp_path / "task" / "zeroshot_classification_templates.txt").write_text("a {c}\n")
    tiny.write_tar(tmp_path / "task" / "test" / "0.tar", [{"png": tiny.picture(0)}] * 3)
    monkeypatch.setattr(kinds, "_MAX_SCORES", 5)
    with pytest.raises(EvaluationError, match="3 pictures and 2 classes, too many to rank"):
        tasks.load_task("task", tmp_path, tiny.encoder())


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_a_checkpoint_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-00000004").mkdir(parents=True, mode=0)
    assert checkpoints(tmp_path) == []
