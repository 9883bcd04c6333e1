# SPDX-License-Identifier: Apache-2.0
"""Configs, runs and files of a third round of attacks."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import aced_sdk
from aced_sdk import config, planning, towers
from aced_sdk.cache.manifest import read_manifest
from aced_sdk.cache.rows import Layout, RowWriter
from aced_sdk.engine.state import load_tensors
from aced_sdk.errors import ConfigError, EngineError, EvaluationError, ModelError
from aced_sdk.evaluation import tasks
from aced_sdk.files import ReadError, alone, sha256
from aced_sdk.training import run as trained
from tests import tiny
from tests.security.sandbox import run


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    tiny.write_pool(folder / "pool", 32, 1)
    towers.save(tiny.encoder(), folder / "reference")
    return folder


def iid(folder: Path, pool: Path, **changes: Any) -> config.DistillConfig:
    plain = {"curation": config.Iid(sub_batch=8), "objective": config.Objective()}
    return tiny.distillation(folder / "run", pool, None, **(plain | changes))


# Runs


def test_a_student_that_is_not_finite_is_not_saved(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = trained.train

    def overflowing(settings: Any, parts: Any, resume_from: Any) -> Any:
        done = train(settings, parts, resume_from)
        next(parts.student.model.parameters()).data.mul_(float("inf"))
        return done

    monkeypatch.setattr(trained, "train", overflowing)
    with pytest.raises(EngineError, match="non-finite values"):
        aced_sdk.distill(iid(tmp_path, world / "pool", schedule=config.Schedule(steps=1)))
    assert not (tmp_path / "run" / "student").exists()


def test_weight_decay_has_a_bound() -> None:
    with pytest.raises(ConfigError, match="weight_decay"):
        config.Optimizer(weight_decay=1e300)


def test_a_run_whose_steps_were_all_skipped_is_an_error(world: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    aced_sdk.cache_embeddings(world / "reference", world / "pool", cache)
    image = torch.full((32, 16), torch.inf)
    RowWriter(cache, Layout(read_manifest(cache), 32)).write(np.arange(32), image, -image)
    teacher = config.Frozen(model=str(world / "reference"), cache=cache)
    objective = config.Objective(distillation=(config.Distillation(weight=1.0),))
    short = iid(tmp_path, world / "pool", teacher=teacher, objective=objective, schedule=config.Schedule(steps=2))
    with pytest.raises(EngineError, match="nothing was trained: all of the 2 steps were skipped"):
        aced_sdk.distill(short)


def _load(folder: Path) -> Any:
    return load_tensors(folder, "loop.safetensors")


def test_a_checkpoint_larger_than_the_memory_is_named(tmp_path: Path) -> None:
    size = 10**12
    header = json.dumps({"x": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    with (tmp_path / "loop.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", len(header)) + header)
        stream.truncate(8 + len(header) + size)
    assert run(_load, tmp_path, seconds=5).refused("cannot be read")


def test_an_old_checkpoint_that_cannot_be_removed_is_named(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("aced_sdk.engine.checkpoint.shutil.rmtree", forbidden)
    with pytest.raises(EngineError, match="an older one not removed: Permission denied"):
        aced_sdk.distill(iid(tmp_path, world / "pool"))


# Memory


def test_a_plan_embeds_few_large_pictures(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    forward = towers.DualEncoder.forward

    def counted(self: Any, images: Any, tokens: Any) -> Any:
        seen.append(len(images))
        if len(seen) > 3:
            raise RuntimeError("DefaultCPUAllocator: not enough memory")
        return forward(self, images, tokens)

    monkeypatch.setattr(towers.DualEncoder, "forward", counted)
    monkeypatch.setitem(planning.estimate.__globals__, "_MAX_PIXELS", 1)
    settings = iid(tmp_path, world / "pool")
    aced_sdk.plan(settings)
    assert seen == [1, 1, 1]
    with pytest.raises(ModelError, match="cannot embed 1 pictures"):
        aced_sdk.plan(settings)


def test_a_task_larger_than_the_memory_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.write_pool(tmp_path / "t" / "test", 4, 1)
    (tmp_path / "t" / "dataset_type.txt").write_text("retrieval")
    monkeypatch.setattr(tasks, "memory_limit", lambda: 1000)
    with pytest.raises(EvaluationError, match="GB of memory"):
        tasks.load_task("t", tmp_path, tiny.encoder())


def test_a_file_that_is_nearly_all_a_hole_has_no_digest(tmp_path: Path) -> None:
    with (tmp_path / "0.tar").open("wb") as stream:
        info = tarfile.TarInfo("big.bin")
        info.size = 8 * 10**12
        stream.write(info.tobuf(tarfile.GNU_FORMAT))
        stream.truncate(info.size + 2048)
    with pytest.raises(ReadError, match="is a sparse file of"):
        sha256(tmp_path / "0.tar")


# Configs


@pytest.mark.parametrize(
    ("kind", "values", "field"),
    [
        (config.Schedule, {"steps": True}, "steps"),
        (config.Data, {"shards": ("x",), "max_unusable_fraction": True}, "max_unusable_fraction"),
        (config.Engine, {"threads": False}, "threads"),
        (config.Frozen, {"model": "x", "cache": ""}, "cache"),
    ],
)
def test_yes_is_no_number_and_a_path_is_not_empty(
    kind: type[config.Config], values: dict[str, Any], field: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        kind(**values)
    assert caught.value.field == field


def test_a_writer_that_waits_says_so(tmp_path: Path) -> None:
    code = "import pathlib, sys\nfrom aced_sdk.files import alone\n"
    code += "with alone(pathlib.Path(sys.argv[1]), 'x', wait=True): print('in')"
    command = [sys.executable, "-c", code, str(tmp_path)]
    with alone(tmp_path, "x"):
        waiting = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert waiting.stderr is not None
        assert "waiting for another process that works on x" in waiting.stderr.readline()
    assert waiting.communicate(timeout=20)[0] == "in\n"
