# SPDX-License-Identifier: Apache-2.0
"""Run folders with something else in them, logs that make a report slow or large, configs with two meanings."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

import aced_sdk as aced
from aced_sdk import towers
from aced_sdk.config import DistillConfig, Engine, Optimizer, Schedule
from aced_sdk.engine.checkpoint import state_digest
from aced_sdk.engine.events import CheckpointSaved, Event
from aced_sdk.errors import AcedError, ConfigError, DataError, EngineError
from aced_sdk.files import file_digests, parse_yaml, whole_folder
from aced_sdk.reporting import run_report
from aced_sdk.reporting.thinning import Thinned
from aced_sdk.training import run as training
from aced_sdk.training.events import RunStarted
from tests import tiny
from tests.security.sandbox import run

STEP: dict[str, Any] = {
    "event": "step_done", "step": 1, "loss": 1.0, "parts": {"a": 1.0}, "learning_rate": 0.1, "gradient_norm": 1.0,
    "trained": 8, "scored": 16, "seconds": 1.0, "data_seconds": 0.1,
}  # fmt: skip


class _Stop(BaseException):
    pass


def stop_at(step: int) -> Callable[[Event], None]:
    def stop(event: Event) -> None:
        if isinstance(event, CheckpointSaved) and event.step == step:
            raise _Stop

    return stop


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pool, a reference, its cache, and a run that was interrupted at step 4 of 6."""
    folder = tmp_path_factory.mktemp("world")
    tiny.write_pool(folder / "pool", 32, 1)
    towers.save(tiny.encoder(), folder / "reference")
    with pytest.raises(_Stop):
        aced.distill(config_of(folder, folder / "run"), [stop_at(4)])
    return folder


def config_of(world: Path, directory: Path, **changes: Any) -> DistillConfig:
    config = tiny.distillation(directory, world / "pool", world / "reference")
    frozen = aced.Frozen(model=str(world / "reference"), cache=world / "cache")
    return config.replace(**({"reference": frozen} | changes))


@pytest.fixture
def left(world: Path, tmp_path: Path) -> Path:
    shutil.copytree(world / "run", tmp_path / "run")
    return tmp_path / "run"


# What lies in the folder


def test_a_second_start_leaves_the_config_of_the_first(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one still prepares: nothing of it but its config is on the disk."""
    real, prepares, go = training.open_or_write, threading.Event(), threading.Event()

    def slow(*args: Any, **named: Any) -> Any:
        prepares.set()
        go.wait(60)
        return real(*args)

    monkeypatch.setattr(training, "open_or_write", slow)
    first = config_of(world, tmp_path / "run")
    thread = threading.Thread(target=aced.distill, args=(first,))
    thread.start()
    assert prepares.wait(60)
    with pytest.raises(ConfigError, match="another process works on a run"):
        aced.distill(first.replace(seed=7))
    with pytest.raises(ConfigError, match="another process works on a run"):
        aced.resume(tmp_path / "run")
    go.set()
    thread.join()
    assert DistillConfig.from_yaml(tmp_path / "run/config.yaml") == first


def test_a_new_run_does_not_mix_with_checkpoints_of_an_older_one(world: Path, left: Path) -> None:
    (left / "config.yaml").unlink()
    (left / "events.jsonl").unlink()
    with pytest.raises(ConfigError, match="step-00000004 is not of this run"):
        aced.distill(config_of(world, left, seed=5))


@pytest.mark.parametrize("learn_from_it", [False, True])
def test_a_student_of_somebody_else_is_not_replaced(world: Path, tmp_path: Path, learn_from_it: bool) -> None:
    student = tmp_path / "run/student"
    shutil.copytree(world / "reference", student)
    before = sorted(path.name for path in student.iterdir())
    own = {"student": aced.Student(architecture=f"local-dir:{student}")} if learn_from_it else {}
    with pytest.raises(ConfigError, match="student is not of this run"):
        aced.distill(config_of(world, tmp_path / "run", **own))
    assert sorted(path.name for path in student.iterdir()) == before


def test_a_checkpoint_of_a_run_with_another_config_is_refused(world: Path, left: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    with pytest.raises(_Stop):
        aced.distill(config_of(world, other, seed=9), [stop_at(2)])
    shutil.copytree(left / "checkpoints/step-00000004", other / "checkpoints/step-00000004")
    with pytest.raises(EngineError, match="step-00000004 was written by a run with another config"):
        aced.resume(other)
    shutil.rmtree(other / "checkpoints/step-00000004")
    assert aced.resume(other).step == 6


def test_a_config_may_change_between_two_resumes(left: Path) -> None:
    values = yaml.safe_load((left / "config.yaml").read_text())
    values["schedule"]["steps"] = 8
    (left / "config.yaml").write_text(yaml.safe_dump(values))
    with pytest.warns(UserWarning, match="not the config"), pytest.raises(_Stop):
        aced.resume(left, [stop_at(6)])
    told: list[Event] = []
    with pytest.warns(UserWarning, match="not the config"):
        assert aced.resume(left, [told.append]).step == 8
    assert [event.step for event in told if isinstance(event, RunStarted)] == [6]


def test_a_log_with_another_name_is_not_written(world: Path, left: Path, tmp_path: Path) -> None:
    precious = "a file of somebody, without a line break at its end"
    (tmp_path / "precious").write_text(precious)
    (tmp_path / "new").mkdir()
    os.link(tmp_path / "precious", tmp_path / "new/events.jsonl")
    with pytest.raises(ConfigError, match="hard link"):
        aced.distill(config_of(world, tmp_path / "new"))
    assert (tmp_path / "precious").read_text() == precious


def edited(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def edit(checkpoint: Path) -> None:
        tensors = load_file(checkpoint / name)
        changed = {key: value if key.endswith(".step") else change(value) for key, value in tensors.items()}
        save_file(changed, checkpoint / name)

    return edit


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("weights.safetensors", lambda tensor: tensor > 0),
        ("weights.safetensors", lambda tensor: tensor.half()),
        ("weights.safetensors", lambda tensor: tensor.to(torch.complex64)),
        ("optimizer.safetensors", lambda tensor: tensor.to(torch.int64)),
        ("optimizer.safetensors", lambda tensor: tensor.half()),
        ("optimizer.safetensors", lambda tensor: tensor.to(torch.complex64)),
    ],
)
def test_tensors_of_another_type_are_not_converted(left: Path, name: str, change: Any) -> None:
    shutil.rmtree(left / "checkpoints/step-00000002")
    checkpoint = left / "checkpoints/step-00000004"
    edited(name, change)(checkpoint)
    state = json.loads((checkpoint / "state.json").read_text())
    del state["digest"]
    state["files"] = file_digests(checkpoint, ["state.json"])
    (checkpoint / "state.json").write_text(json.dumps(state | {"digest": state_digest(state)}))
    with pytest.raises(EngineError, match=r"holds torch\."):
        aced.resume(left)


def test_folders_that_are_put_in_one_place_replace_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, rivals = os.replace, iter(range(5))

    def contested(source: Any, target: Any) -> None:
        if Path(target) == tmp_path / "t" and next(rivals, None) is not None:
            Path(target).mkdir()
            (Path(target) / "rival").write_text("x")
        real(source, target)

    monkeypatch.setattr(os, "replace", contested)
    with whole_folder(tmp_path / "t") as folder:
        (folder / "mine").write_text("x")
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["t", "t/mine"]


# Reports


def log(folder: Path, *rows: dict[str, Any], times: int = 1) -> Path:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    with (folder / "events.jsonl").open("a") as stream:
        for _ in range(times):
            stream.write(lines)
    return folder


def test_a_pair_that_is_named_over_and_over_is_tried_once(left: Path, tmp_path: Path) -> None:
    noise = Image.effect_noise((3000, 3000), 50)
    noise.save(tmp_path / "whole.png", compress_level=1)
    content = (tmp_path / "whole.png").read_bytes()
    broken = {"png": content[: len(content) * 9 // 10], "txt": b"a picture that breaks off"}
    tiny.write_pool(tmp_path / "pool", 32, 1, broken={31: broken})
    config = DistillConfig.from_yaml(left / "config.yaml")
    config.replace(data=aced.Data(shards=(str(tmp_path / "pool"),))).to_yaml(left / "config.yaml")
    selected = {"event": "selected", "step": 4, "statistics": {}, "picked": [31] * 100_000, "candidates": [1, 2, 31]}
    log(left, selected)
    assert run(aced.report, left, seconds=60).returned()


def test_many_terms_of_many_steps_do_not_fill_the_memory(tmp_path: Path) -> None:
    parts = {f"term {number}": number + 0.125 for number in range(100)}
    log(tmp_path, STEP | {"parts": parts}, times=40_000)
    outcome = run(aced.report, tmp_path, seconds=120)
    outcome.returned()
    assert outcome.mib < 500  # all rows together take 600 MiB


def test_names_that_are_all_different_do_not_fill_the_memory() -> None:
    thinned = Thinned(values=10_000)
    for number in range(3000):
        thinned.add({"step": number, "parts": {f"{number} {name} {'x' * 640}": 1.0 for name in range(10)}})
    rows = thinned.rows()
    assert len({name for row in rows for name in row["parts"]}) < 5000
    assert (rows[0]["step"], rows[-1]["step"]) == (0, 2999)


def test_rows_stay_as_they_are_until_they_are_too_many() -> None:
    rows = [
        {"step": step, "loss": float(step), "parts": {"a": None}, "scores": {"picked": [1.0]}} for step in range(50)
    ]
    kept, thinned = Thinned(), Thinned(values=60)
    for row in rows:
        kept.add(row)
        thinned.add(row)
    assert kept.rows() == rows
    means = thinned.rows()
    assert len(means) < 30
    assert means[0] == rows[0]
    assert means[-1] == rows[-1]
    group = means[1]["step"] + 1
    assert group > 1
    for number, row in enumerate(means[1 : 50 // group]):
        last = (number + 1) * group - 1
        loss = pytest.approx(last - (group - 1) / 2)
        assert row == {"step": last, "loss": loss, "parts": {"a": None}, "scores": {"picked": [1.0]}}


def test_a_page_of_averaged_rows_has_the_totals_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_report, "Thinned", lambda: Thinned(values=200))
    started = {"event": "run_started", "step": 0, "steps": 200, "config_hash": "x", "facts": {"pairs": 32}}
    steps = [STEP | {"step": step, "trained": 8 * step, "loss": 9.0 - step / 50} for step in range(1, 201)]
    selected = [
        {"event": "selected", "step": step, "statistics": {"effective_pool_size": 9.0, "unique_coverage": 0.5}}
        for step in range(1, 201)
    ]
    log(tmp_path, started, *steps, started, *selected)
    page = aced.report(tmp_path).read_text()
    assert "200 of 200 steps, resumed 1 time." in page
    assert "3 min 20 s" in page
    assert "at first 8.98" in page


@pytest.mark.parametrize("kind", ["pipe", "not UTF-8", "control characters"])
def test_a_style_beside_the_log_is_not_read(left: Path, kind: str) -> None:
    if kind == "pipe":
        os.mkfifo(left / "matplotlibrc")
    else:
        (left / "matplotlibrc").write_bytes(b"\xff\xfe" if kind == "not UTF-8" else b"\x1b[31mevil: 1\nno colon\n")
    done = aced_command(["report", "."], cwd=left)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_matplotlib_may_not_read_is_named(left: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "/root/.config/matplotlib")

    monkeypatch.setattr(run_report, "line_chart", forbidden)
    with pytest.raises(DataError, match=r"/root/\.config/matplotlib: Permission denied"):
        aced.report(left)


# Configs


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed: 1\nsteps: 2\nseed: 3\n", "seed: the key stands more than once"),
        ("a: {b: 1, b: 2}\n", "b: the key stands more than once"),
        ("a: 1\n<<: {seed: 3}\n", "merges are not taken"),
        ("steps: 0100\n", "reads 0100 as another number"),
        ("steps: 1:30\n", "reads 1:30 as another number"),
        ("rate: 1:30.5\n", "base 60"),
    ],
)
def test_yaml_with_two_meanings_is_refused(text: str, words: str) -> None:
    with pytest.raises(AcedError, match=words):
        parse_yaml(text, "a config")


def test_plain_yaml_is_read_as_before() -> None:
    text = "a: 0\nb: -10\nc: 1_000\nd: 0x1f\ne: 1.5\nf: '0100'\ng: '1:30'\nh: 1e-3\ni: {b: 1}\nj: [{b: 1}, {b: 2}]\n"
    assert parse_yaml(text, "") == yaml.safe_load(text)


@pytest.mark.parametrize("given", ["{1: 2}", "{vision_cfg: {1: 2, a: 3}}", "{~: 1}", "{a: [{2: b}]}"])
def test_keys_that_are_no_texts_are_named(world: Path, tmp_path: Path, given: str) -> None:
    config_of(world, tmp_path / "run").to_yaml(tmp_path / "c.yaml")
    values = yaml.safe_load((tmp_path / "c.yaml").read_text())
    values["student"]["architecture"] = yaml.safe_load(given)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError):
        DistillConfig.from_yaml(tmp_path / "c.yaml")


def test_a_tilde_is_the_home_folder_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert aced.Data(shards=("~/pool",), prepared=Path("~/prepared")).prepared == tmp_path / "prepared"
    assert aced.Frozen(model="x", cache=Path("~/cache")).cache == tmp_path / "cache"


@pytest.mark.parametrize("path", ["\ud800", "x\0", "~nosuchuser/x"])
def test_a_path_of_a_config_that_no_file_can_have_is_named(path: str) -> None:
    with pytest.raises(ConfigError):
        aced.Data(shards=("x",), prepared=Path(path))


@pytest.mark.parametrize("target", ["/proc/x/y", "FILE/x", "", "a" * 300, "\ud800", "x\0"])
def test_a_config_that_cannot_be_written_is_named(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("FILE").write_text("")
    with pytest.raises(ConfigError):
        config_of(world, tmp_path / "run").to_yaml(target)


def test_a_name_that_is_not_utf8_is_refused_before_a_run_begins(world: Path, tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    with pytest.raises(ConfigError, match="UTF-8"):
        aced.distill(config_of(world, folder))
    assert not (folder / "config.yaml").exists()


def test_what_a_log_cannot_hold_is_refused() -> None:
    for make in (lambda: Schedule(steps=2**54), lambda: Optimizer(learning_rate=1e300)):
        with pytest.raises(ConfigError):
            make()


@pytest.mark.parametrize("key", ["flops_profiler", "autotuning"])
def test_what_deepspeed_measures_in_its_own_forward_pass_is_refused(world: Path, tmp_path: Path, key: str) -> None:
    pytest.importorskip("deepspeed")
    engine = Engine(device="cpu", threads=1, deepspeed={key: {"enabled": True}})
    with pytest.raises(ConfigError, match=key):
        aced.distill(config_of(world, tmp_path / "run", engine=engine))


# The command


def aced_command(arguments: list[str], cwd: Path, **changes: Any) -> subprocess.CompletedProcess[str]:
    root = str(Path(aced.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"} | changes
    command = [sys.executable, "-m", "aced_sdk.cli", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_a_terminal_in_latin1_gets_other_names_escaped(left: Path, tmp_path: Path) -> None:
    shutil.copytree(left, tmp_path / "漢")
    done = aced_command(["report", "漢"], tmp_path, PYTHONIOENCODING="latin-1")
    assert (done.returncode, done.stdout) == (0, "\\u6f22/report.html\n")


def test_a_run_needs_no_standard_error(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    assert aced.distill(config_of(world, tmp_path / "run", schedule=Schedule(steps=2))).step == 2


def test_an_error_is_one_line(left: Path, tmp_path: Path) -> None:
    (tmp_path / "a\nError: none").mkdir()
    done = aced_command(["report", "a\nError: none"], tmp_path)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
