# SPDX-License-Identifier: Apache-2.0
"""Hostile run folders and configs: nothing outside is read or written, every refusal has a name, nothing hangs."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import aced_sdk as aced
from aced_sdk.config import DistillConfig, Engine, Optimizer
from aced_sdk.engine import checkpoints, step_of
from aced_sdk.engine.checkpoint import state_digest
from aced_sdk.engine.deepspeed_engine import deepspeed_json
from aced_sdk.files import file_digests
from tests.security.sandbox import run

SECRET = "-----BEGIN PRIVATE KEY-----"  # no line break: a log would be cut before it


def config(root: Path, **changes: Any) -> DistillConfig:
    """Four steps without selection, a checkpoint every two."""
    values: dict[str, Any] = {
        "curation": aced.Iid(sub_batch=8),
        "objective": aced.Objective(),
        "schedule": aced.Schedule(steps=4),
    }
    return tiny.distillation(root / "run", root / "pool", None, **(values | changes))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    root = tmp_path_factory.mktemp("runs")
    tiny.write_pool(root / "pool", pairs=16)
    aced.distill(config(root))
    return root


@pytest.fixture
def copy(world: Path, tmp_path: Path) -> Path:
    """The same, to be spoilt, beside something private."""
    shutil.copytree(world, tmp_path, dirs_exist_ok=True)
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "key").write_text(SECRET)
    return tmp_path


def spoil(root: Path, change: Callable[[Path, dict[str, Any]], None]) -> None:
    """Change the newest checkpoint and its state as somebody who writes the digests too; drop the older checkpoint."""
    shutil.rmtree(root / "run" / "checkpoints" / "step-00000002")
    folder = root / "run" / "checkpoints" / "step-00000004"
    state = json.loads((folder / "state.json").read_text())
    del state["digest"]
    change(folder, state)
    state["files"] = file_digests(folder, ["state.json"])
    (folder / "state.json").write_text(json.dumps(state | {"digest": state_digest(state)}))


def _resume(root: Path) -> int:
    return aced.resume(root / "run").step


def _report(root: Path) -> str:
    return aced.report(root / "run").read_text(encoding="utf-8")


def _distill(root: Path, **changes: Any) -> int:
    return aced.distill(config(root, **changes)).step


def untouched(root: Path) -> bool:
    return {path.name: path.read_text() for path in (root / "private").iterdir()} == {"key": SECRET}


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def device(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


def link_out(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(path.parents[1] / "private" / "key")


def folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


ATTACKS = (pipe, device, link_out, folder)
attacks = pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)


# -- links and pipes in a run's folder ----------------------------------------------------------------------------


@attacks
@pytest.mark.parametrize("file", [".lock", "events.jsonl", "config.yaml"])
def test_resume_takes_only_regular_files_of_the_run(copy: Path, file: str, attack: Callable[[Path], None]) -> None:
    attack(copy / "run" / file)
    assert run(_resume, copy).refused()
    assert untouched(copy)


@attacks
@pytest.mark.parametrize("file", [".lock", "events.jsonl"])
def test_a_new_run_writes_only_to_regular_files(copy: Path, file: str, attack: Callable[[Path], None]) -> None:
    shutil.rmtree(copy / "run")
    (copy / "run").mkdir()
    attack(copy / "run" / file)
    assert run(_distill, copy).refused()
    assert untouched(copy)


@attacks
@pytest.mark.parametrize("file", ["events.jsonl", "config.yaml"])
def test_a_report_shows_nothing_from_outside(copy: Path, file: str, attack: Callable[[Path], None]) -> None:
    attack(copy / "run" / file)
    outcome = run(_report, copy)
    if file == "events.jsonl":
        assert outcome.refused()
    else:
        assert "PRIVATE KEY" not in outcome.returned()
    assert untouched(copy)


def test_planted_links_are_replaced_by_what_is_written(copy: Path) -> None:
    shutil.rmtree(copy / "run")
    (copy / "run").mkdir()
    (copy / "run" / "config.yaml").symlink_to(copy / "private" / "key")
    (copy / "run" / "report.html").symlink_to(copy / "private" / "key")
    (copy / "run" / "student").symlink_to(copy / "private")
    assert run(_distill, copy).returned() == 4
    assert "<html" in run(_report, copy).returned()
    assert untouched(copy)
    assert not any((copy / "run" / name).is_symlink() for name in ("config.yaml", "report.html", "student"))


@pytest.mark.parametrize("place", ["checkpoints", "checkpoints/step-00000004"])
def test_a_link_in_place_of_checkpoints_is_not_followed(copy: Path, place: str) -> None:
    path = copy / "run" / place
    path.rename(copy / "elsewhere")
    path.symlink_to(copy / "elsewhere")
    before = sorted(str(p) for p in (copy / "elsewhere").rglob("*"))
    outcome = run(_resume, copy)
    if place == "checkpoints":
        assert outcome.refused("checkpoints", "link")
    else:
        assert outcome.returned() == 4  # from step 2 on
    assert sorted(str(p) for p in (copy / "elsewhere").rglob("*")) == before


@pytest.mark.parametrize("attack", [pipe, link_out], ids=lambda attack: attack.__name__)
@pytest.mark.parametrize("file", ["state.json", "loop.safetensors", "weights.safetensors", "optimizer.safetensors"])
def test_a_checkpoint_holds_only_regular_files(copy: Path, file: str, attack: Callable[[Path], None]) -> None:
    shutil.rmtree(copy / "run" / "checkpoints" / "step-00000002")
    path = copy / "run" / "checkpoints" / "step-00000004" / file
    attack(path)
    if attack is link_out:
        path.unlink()
        path.symlink_to(copy / "private" / "key")
    outcome = run(_resume, copy)
    if file == "state.json" and attack is not link_out:  # the checkpoint is not complete
        assert outcome.returned() == 4
    else:
        assert outcome.refused("older checkpoint")
    if file == "loop.safetensors":
        assert run(_report, copy).returned()
    assert untouched(copy)


# -- what a checkpoint says ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["step-99999999999999999999", "step-²", "step--0000001", "step-0000000４", "step-0000001e", "step-000000004"],
)
def test_folders_of_odd_names_are_no_checkpoints(copy: Path, name: str) -> None:
    shutil.copytree(copy / "run" / "checkpoints" / "step-00000004", copy / "run" / "checkpoints" / name)
    (copy / "run" / ".student.tmp").mkdir()
    (copy / "run" / "checkpoints" / ".step-00000004.host-99999999999999999999.aa.tmp").mkdir()
    assert run(_resume, copy).returned() == 4
    assert [step_of(path) for path in checkpoints(copy / "run")] == [2, 4]


def test_a_planted_later_checkpoint_costs_no_checkpoint_of_the_run(copy: Path) -> None:
    shutil.copytree(copy / "run" / "checkpoints" / "step-00000004", copy / "run" / "checkpoints" / "step-99999999")
    assert run(_resume, copy).returned() == 4  # the planted one is damaged: its state is of another step
    shutil.rmtree(copy / "run" / "checkpoints" / "step-00000002")
    (copy / "run" / "events.jsonl").unlink()
    assert run(_distill_beside, copy).returned() == [4, 99999999]


def _distill_beside(root: Path) -> list[int]:
    """Train anew in a folder where a later checkpoint was planted."""
    from aced_sdk.training import assemble, open_inputs, train_and_save

    made = config(root)
    made = made.replace(engine=made.engine.replace(keep_checkpoints=1))
    train_and_save(made, assemble(made, open_inputs(made), lambda *_: None))
    return [step_of(path) for path in checkpoints(root / "run")]


STATES: dict[str, Any] = {
    "a list": [],
    "another step": {"step": 3, "trained": 32},
    "a text": {"step": 4, "trained": "32"},
    "a negative number": {"step": 4, "trained": -1},
    "a huge number": {"step": 4, "trained": 10**30},
    "a number too large for JSON": '{"step": 4, "trained": ' + "9" * 5000 + "}",
    "a truth": {"step": 4, "trained": True},
    "a fraction": {"step": 4, "trained": 1.5},
    "deep": "[" * 100_000,
    "nothing at all": "",
}


@pytest.mark.parametrize("name", STATES)
def test_a_hostile_state_of_a_run_is_refused(copy: Path, name: str) -> None:
    given = STATES[name]

    def change(folder: Path, state: dict[str, Any]) -> None:
        if isinstance(given, dict):
            state.update(given)

    spoil(copy, change)
    if not isinstance(given, dict):
        text = given if isinstance(given, str) else json.dumps(given)
        (copy / "run" / "checkpoints" / "step-00000004" / "state.json").write_text(text)
    assert run(_resume, copy).refused("older checkpoint")


TENSORS: dict[str, tuple[str, Callable[[dict[str, torch.Tensor]], Any]]] = {
    "counts below 0": ("loop", lambda t: t["counts"].fill_(-1)),
    "counts beyond all steps": ("loop", lambda t: t["counts"].fill_(2**31 - 1)),
    "counts of another type": ("loop", lambda t: t.update(counts=t["counts"].double())),
    "counts of another pool": ("loop", lambda t: t.update(counts=t["counts"][:5].clone())),
    "no counts": ("loop", lambda t: t.pop("counts")),
    "no generator": ("loop", lambda t: t.pop("generator")),
    "a generator of another type": ("loop", lambda t: t.update(generator=t["generator"].float())),
    "a generator of another size": ("loop", lambda t: t.update(generator=t["generator"][:9].clone())),
    "a generator of noise": ("loop", lambda t: t["generator"].fill_(255)),
    "torch's generator": ("loop", lambda t: t.update(torch=torch.zeros(3, 3))),
    "moments of another shape": ("optimizer", lambda t: t.update({"0.exp_avg": torch.zeros(1)})),
    "moments of another name": ("optimizer", lambda t: t.update({"²": torch.zeros(1)})),
    "moments of no parameter": ("optimizer", lambda t: t.update({"999.exp_avg": torch.zeros(1)})),
    "moments without a number": ("optimizer", lambda t: t.update({"x.exp_avg": torch.zeros(1)})),
    "moments left out": ("optimizer", lambda t: t.pop("0.exp_avg_sq")),
    "steps of a matrix": ("optimizer", lambda t: t.update({"0.step": torch.zeros(2, 2)})),
    "weights of another shape": ("weights", lambda t: t.update({"x": torch.zeros(1)})),
}


@pytest.mark.parametrize("name", TENSORS)
def test_hostile_tensors_of_a_checkpoint_are_refused(copy: Path, name: str) -> None:
    file, change = TENSORS[name]

    def spoilt(folder: Path, _: object) -> None:
        tensors = load_file(folder / f"{file}.safetensors")
        change(tensors)
        save_file(tensors, folder / f"{file}.safetensors")

    spoil(copy, spoilt)
    assert run(_resume, copy, mib=2048).refused()


def _long_header(path: Path) -> None:
    """Ten million bytes of a header that names nothing; its reader takes ten times as much memory."""
    tensors = b",".join(b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % n for n in range(200_000))
    path.write_bytes(struct.pack("<Q", len(tensors) + 2) + b"{" + tensors + b"}")


def test_a_header_of_many_tensors_is_not_read(copy: Path) -> None:
    spoil(copy, lambda folder, _: _long_header(folder / "weights.safetensors"))
    assert run(_resume, copy).refused("weights.safetensors", "header")


def test_a_report_that_cannot_be_written_has_a_name(copy: Path) -> None:
    (copy / "run" / "report.html").mkdir()
    assert run(_report, copy).refused("report.html")


# -- configs ------------------------------------------------------------------------------------------------------

YAML: dict[str, str] = {
    "billion laughs": "a0: &a0 [x, x]\n" + "".join(f"a{n + 1}: &a{n + 1} [*a{n}, *a{n}]\n" for n in range(30)),
    "a tag": "seed: !!python/object/apply:os.system [true]\n",
    "deep": "a: " + "[" * 100_000,
    "wide": "[" + "[]," * 1_000_000 + "]",
    "large": "# " + "x" * 5_000_000,
    "a huge number": "seed: " + "9" * 100_000,
    "sexagesimal": "seed: " + "59:" * 20_000 + "0",
    "a date that is none": "seed: 2024-99-99",
    "not UTF-8": "\udcff",
    "a NUL": "seed: \0",
    "keys that are lists": "? [a]\n: 1",
    "control characters": "\x1b[31m: 1",
}


def _from_yaml(path: Path) -> str:
    return DistillConfig.from_yaml(path).hash()


@pytest.mark.parametrize("name", YAML)
def test_hostile_yaml_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.yaml").write_bytes(YAML[name].encode(errors="surrogateescape"))
    assert run(_from_yaml, tmp_path / "config.yaml", mib=512).refused()


@attacks
def test_a_config_is_a_regular_file(copy: Path, attack: Callable[[Path], None]) -> None:
    attack(copy / "run" / "config.yaml")
    outcome = run(_from_yaml, copy / "run" / "config.yaml", mib=512)
    assert outcome.refused()
    assert "PRIVATE KEY" not in outcome.value


NUMBERS: dict[str, tuple[str, Any]] = {
    "steps": ("schedule", {"steps": 10**30}),
    "more steps": ("schedule", {"steps": 10**4000}),
    "super_batch": ("curation", {"method": "joint", "sub_batch": 8, "num_chunks": 4, "super_batch": 10**12}),
    "sub_batch": ("curation", {"method": "iid", "sub_batch": 10**12}),
    "num_chunks": ("curation", {"method": "joint", "num_chunks": 10**12}),
    "gain": ("curation", {"method": "independent", "gain": 1e300}),
    "scoring_size": ("curation", {"method": "joint", "scoring_size": 10**9}),
    "workers": ("data", {"shards": ["a.tar"], "workers": 10**9}),
    "threads": ("engine", {"threads": 10**9}),
    "checkpoints": ("engine", {"keep_checkpoints": 10**400}),
    "scoring_batch": ("engine", {"scoring_batch": 10**30}),
    "betas": ("optimizer", {"betas": [5, 5]}),
    "a rate": ("optimizer", {"learning_rate": 1e999}),
    "a rate that is no number": ("optimizer", {"learning_rate": float("nan")}),
    "seed": ("seed", 10**30),
    "directory": ("directory", "a\0b"),
    "evaluation": ("evaluation", {"every": 10**30}),
}


def _config(field: str, value: Any) -> str:
    values: dict[str, Any] = {
        "student": {"architecture": tiny.ARCHITECTURE},
        "data": {"shards": ["a.tar"]},
        "schedule": {"steps": 10},
        "directory": "run",
        "reference": {"model": "reference"},
    }
    return aced.plan(DistillConfig(**(values | {field: value}))).__str__()


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_no_machine_can_take_are_refused(name: str) -> None:
    field, value = NUMBERS[name]
    assert run(_config, field, value, mib=512).refused(f"[field: {field}")


DEEPSPEED: dict[str, str] = {"a list": "[1]", "a text": '"x"', "deep": "[" * 100_000, "large": " " * 2_000_000}


def _deepspeed(given: Any) -> dict[str, Any]:
    return deepspeed_json(Engine(deepspeed=given), Optimizer(), 7)


@pytest.mark.parametrize("name", DEEPSPEED)
def test_a_hostile_deepspeed_json_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "d.json").write_text(DEEPSPEED[name])
    assert run(_deepspeed, tmp_path / "d.json").refused("engine.deepspeed")


@attacks
def test_a_deepspeed_json_is_a_regular_file(tmp_path: Path, attack: Callable[[Path], None]) -> None:
    (tmp_path / "private").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "private" / "key").write_text(SECRET)
    attack(tmp_path / "run" / "d.json")
    outcome = run(_deepspeed, tmp_path / "run" / "d.json")
    assert outcome.refused("engine.deepspeed")
    assert "PRIVATE KEY" not in outcome.value


def _start_deepspeed(given: dict[str, Any]) -> None:
    from aced_sdk.engine import build_engine

    build_engine(torch.nn.Linear(2, 2), Engine(kind="deepspeed", device="cpu", deepspeed=given), Optimizer())


@pytest.mark.parametrize("given", [{"zero_optimization": "x"}, {"train_batch_size": -1}, {"aio": 5}], ids=str)
def test_what_deepspeed_refuses_has_a_name(given: dict[str, Any]) -> None:
    assert run(_start_deepspeed, given, mib=4096, seconds=60).refused("engine.deepspeed")
