# SPDX-License-Identifier: Apache-2.0
"""Run folders, logs and names of a second round of attacks."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pwd
import resource
import shutil
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import aced_sdk
from aced_sdk import towers
from aced_sdk.config import Frozen
from aced_sdk.engine.events import Warned
from aced_sdk.files import alone, home, whole_file, whole_folder
from aced_sdk.reporting import JsonlWriter
from tests import tiny
from tests.security.sandbox import run

STEP = {
    "event": "step_done", "step": 1, "loss": 1.0, "parts": {"a": 1.0}, "learning_rate": 0.1, "gradient_norm": 1.0,
    "trained": 8, "scored": 16, "seconds": 1.0, "data_seconds": 0.1,
}  # fmt: skip


# Run folders


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pool, a reference, and a run of 4 steps whose last checkpoint and student are gone."""
    folder = tmp_path_factory.mktemp("world")
    tiny.write_pool(folder / "pool", 32, 1)
    towers.save(tiny.encoder(), folder / "reference")
    begin(folder)
    return folder


def begin(folder: Path) -> None:
    os.environ["ACED_HOME"] = str(folder / "home")
    config = tiny.distillation(folder / "run", folder / "pool", folder / "reference")
    reference = Frozen(model=str(folder / "reference"))  # its cache lies where its fingerprint says
    try:
        aced_sdk.distill(config.replace(reference=reference, schedule=config.schedule.replace(steps=4)))
    finally:
        del os.environ["ACED_HOME"]
    shutil.rmtree(folder / "run/student")
    shutil.rmtree(folder / "run/checkpoints/step-00000004")


@pytest.fixture
def left(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ACED_HOME", str(world / "home"))
    shutil.copytree(world / "run", tmp_path / "run")
    return tmp_path / "run"


def test_an_untouched_run_is_resumed_without_a_warning(left: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert aced_sdk.resume(left).step == 4


def test_an_altered_config_is_told(left: Path) -> None:
    values = yaml.safe_load((left / "config.yaml").read_text())
    values["optimizer"]["learning_rate"] = 0.5
    (left / "config.yaml").write_text(yaml.safe_dump(values))
    with pytest.warns(UserWarning, match="not the config that the run was started with"):
        aced_sdk.resume(left)


def test_lost_checkpoints_are_told(left: Path) -> None:
    shutil.rmtree(left / "checkpoints")
    with pytest.warns(UserWarning, match="checkpoints are gone"):
        aced_sdk.resume(left)


def test_a_run_is_not_resumed_with_another_reference(left: Path, world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "reference", tmp_path / "kept")
    try:
        shutil.rmtree(world / "reference")
        towers.save(tiny.encoder(5), world / "reference")
        with pytest.raises(aced_sdk.errors.CacheError, match="a reference or teacher has changed"):
            aced_sdk.resume(left)
    finally:
        shutil.rmtree(world / "reference")
        shutil.copytree(tmp_path / "kept", world / "reference")


def resumed(folder: str) -> int:
    return aced_sdk.resume(folder).step


@pytest.mark.parametrize("name", ["x", "step-00000002/state.json"])
def test_a_pipe_among_checkpoints_is_not_waited_for(left: Path, name: str) -> None:
    path = left / "checkpoints" / name
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    assert run(resumed, str(left), seconds=60).returned() == 4


def test_draw_counts_without_a_dimension_are_named(left: Path) -> None:
    from safetensors.torch import load_file, save_file

    from aced_sdk.engine.checkpoint import state_digest
    from aced_sdk.files import file_digests

    folder = left / "checkpoints/step-00000002"
    tensors = load_file(folder / "loop.safetensors")
    save_file(tensors | {"counts": tensors["counts"][0].clone()}, folder / "loop.safetensors")
    state = json.loads((folder / "state.json").read_text()) | {"files": file_digests(folder, ["state.json"])}
    del state["digest"]
    (folder / "state.json").write_text(json.dumps(state | {"digest": state_digest(state)}))
    with pytest.raises(aced_sdk.AcedError, match="counts of 1 pairs"):
        aced_sdk.resume(left)


# Logs and reports


def log(folder: Path, *rows: dict[str, Any], head: bytes = b"") -> str:
    folder.mkdir(exist_ok=True)
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in (STEP, *rows))
    (folder / "events.jsonl").write_bytes(head + lines)
    return str(folder)


def reported(folder: str) -> int:
    return aced_sdk.report(folder).stat().st_size


def test_fields_that_nobody_reads_do_not_stay_in_memory(tmp_path: Path) -> None:
    large = b'"x":[' + b"[]," * 1_000_000 + b"[]]"
    lines = b"{" + large + b"," + json.dumps(STEP).encode()[1:] + b"\n"
    started = b'{"event":"run_started","step":0,"steps":1,"facts":{' + large + b"}}\n"
    outcome = run(reported, log(tmp_path / "r", head=lines * 4 + started * 4), seconds=90, mib=2048)
    assert outcome.returned()
    assert outcome.mib < 350


def test_long_warnings_are_cut(tmp_path: Path) -> None:
    row = {"event": "warned", "step": 1, "cause": "&" * 90_000, "remedy": "<" * 90_000}
    assert run(reported, log(tmp_path / "r", *[row] * 50), seconds=90).returned() < 2_000_000


def test_a_page_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    folder = log(tmp_path / "r")
    (tmp_path / "r" / "report.html").mkdir()
    assert run(reported, folder, seconds=60).refused("report.html")


def in_folder(folder: str) -> int:
    os.chdir(folder)
    return reported(".")


def test_a_style_beside_the_log_is_not_taken_up(tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "matplotlibrc").write_text("text.usetex: True\nfigure.facecolor: red\n")
    assert run(in_folder, log(tmp_path / "r"), seconds=60).returned()


def full_disk(folder: str) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    with JsonlWriter(Path(folder) / "events.jsonl") as writer:
        for _ in range(100):
            writer(Warned(0, "x" * 100, ""))


def test_a_log_on_a_full_disk_is_named(tmp_path: Path) -> None:
    assert run(full_disk, str(tmp_path)).refused("event log")


def echoed(folder: str) -> bytes:
    import sys

    from aced_sdk.cli import main

    raw = io.BytesIO()
    sys.argv, sys.stdout = ["aced", "report", folder], io.TextIOWrapper(raw, "utf-8", write_through=True)
    with contextlib.suppress(SystemExit):
        main()
    return raw.getvalue()


@pytest.mark.parametrize("name", ["r\x1b]0;x\x07", "r\udcff"])
def test_names_of_run_folders_reach_the_terminal_escaped(tmp_path: Path, name: str) -> None:
    shown = run(echoed, log(tmp_path / name), seconds=60).returned()
    assert b"report.html" in shown
    assert b"\x1b" not in shown


# Names


def test_home_without_a_user_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(*_: Any) -> Any:
        raise KeyError

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    for name in ("HOME", "ACED_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(aced_sdk.AcedError, match="cannot be expanded"):
        home()


@pytest.mark.parametrize("write", [whole_file, whole_folder])
def test_a_long_name_leaves_room_for_the_temporary_one(tmp_path: Path, write: Callable[[Path], Any]) -> None:
    target = tmp_path / ("🙂" * 60)
    with write(target):
        pass
    assert target.exists()


def test_a_nul_byte_in_a_folder_is_named() -> None:
    with pytest.raises(aced_sdk.AcedError):
        aced_sdk.report("a\0b")
    with pytest.raises(aced_sdk.AcedError), alone(Path("a\0b"), "a run"):
        pass
