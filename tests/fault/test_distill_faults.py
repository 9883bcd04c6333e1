# SPDX-License-Identifier: Apache-2.0
"""What goes wrong in a run is skipped and counted, or told with a remedy; what was kept stays whole."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import ARCHITECTURE, distillation, encoder, picture, run_in, write_pool, write_world
from torch import Tensor

import aced_sdk as aced
from aced_sdk import towers
from aced_sdk.config import DistillConfig
from aced_sdk.data import FullOrder, Pool
from aced_sdk.engine import checkpoints, step_of
from aced_sdk.engine.events import Event, StepDone, StepSkipped
from aced_sdk.errors import (
    CacheError,
    ConfigError,
    DataError,
    EngineError,
    EvaluationError,
    ModelError,
    UnsupportedError,
)
from aced_sdk.reporting import read_events
from aced_sdk.training import run as room


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


def iid(directory: Path, pool: Path, **data: Any) -> DistillConfig:
    made = distillation(directory, pool, None, curation=aced.Iid(sub_batch=8), objective=aced.Objective())
    return made.replace(data=made.data.replace(**data))


# -- data ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [700, 5000, 30000, 30720, None])
def test_a_truncated_tar_is_told_before_the_run(tmp_path: Path, cut: int | None) -> None:
    pool = write_pool(tmp_path / "pool", pairs=64)
    shard = pool / "0001.tar"
    content = shard.read_bytes()
    whole_members = -(-len(content.rstrip(b"\0")) // 512) * 512  # what a writer leaves that died before closing
    shard.write_bytes(content[: whole_members if cut is None else cut])
    with pytest.raises(DataError, match=r"0001\.tar is broken or cut off") as caught:
        aced.distill(iid(tmp_path / "run", pool))
    assert caught.value.field == "data.shards"


def test_a_tar_with_a_destroyed_header_is_told(tmp_path: Path) -> None:
    pool = write_pool(tmp_path / "pool", pairs=64)
    content = bytearray((pool / "0001.tar").read_bytes())
    content[30 * 1024 : 30 * 1024 + 512] = b"\xaa" * 512
    (pool / "0001.tar").write_bytes(content)
    with pytest.raises(DataError, match=r"0001\.tar is broken or cut off"):
        aced.distill(iid(tmp_path / "run", pool))


def test_a_file_that_is_no_tar_is_told(tmp_path: Path) -> None:
    pool = write_pool(tmp_path / "pool", pairs=8)
    (pool / "0001.tar").write_bytes(b"<html>not found</html>")
    with pytest.raises(DataError, match=r"0001\.tar is broken"):
        aced.distill(iid(tmp_path / "run", pool))


def test_single_bad_pairs_are_replaced(tmp_path: Path) -> None:
    bad = {
        0: {"png": picture(0), "txt": b" "},
        9: {"png": picture(9)[:70], "txt": b"a cat"},
        17: {"png": b"", "txt": b"a boat"},
        30: {"png": picture(30, (300, 300)), "txt": b"a huge tree"},
        40: {"json": b"{"},
    }
    pool = write_pool(tmp_path / "pool", pairs=64, broken=bad)
    seen: list[int] = []

    def listen(event: Event) -> None:
        seen.extend(event.candidates if event.name == "selected" else ())  # type: ignore[attr-defined]

    curation = aced.Joint(sub_batch=8, super_batch=16, num_chunks=4, score="hard_learner")
    made = iid(tmp_path / "run", pool, max_unusable_fraction=0.2, max_pixels=50_000).replace(curation=curation)
    run = aced.distill(made, callbacks=[listen])
    assert run.step == 6
    assert len(seen) == 96
    assert not set(seen) & set(bad)
    assert len(set(seen)) == 59
    warned = [row for row in read_events(tmp_path / "run" / "events.jsonl") if row["event"] == "warned"]
    assert "pairs were skipped" in warned[-1]["cause"]
    assert "pairs were skipped" in aced.report(tmp_path / "run").read_text(encoding="utf-8")


def test_what_was_left_out_beforehand_is_told(tmp_path: Path) -> None:
    pool = write_pool(tmp_path / "pool", pairs=64, broken={5: {"png": b"?", "txt": b"x"}})
    aced.distill(iid(tmp_path / "run", pool, prepared=tmp_path / "p", max_unusable_fraction=0.2))
    first = next(row for row in read_events(tmp_path / "run" / "events.jsonl") if row["event"] == "warned")
    assert first["cause"] == "1 of 64 pairs are unusable and left out"


@pytest.mark.parametrize("prepared", [False, True])
def test_too_many_bad_pairs_stop_the_run(tmp_path: Path, prepared: bool) -> None:
    bad = {row: {"png": b"?", "txt": b"x"} for row in range(0, 64, 4)}
    pool = write_pool(tmp_path / "pool", pairs=64, broken=bad)
    made = iid(tmp_path / "run", pool, prepared=tmp_path / "p" if prepared else None)
    with pytest.raises(DataError, match="pairs are unusable") as caught:
        aced.distill(made.replace(curation=aced.Iid(sub_batch=64), schedule=aced.Schedule(steps=40)))
    assert caught.value.field == "data.max_unusable_fraction"
    assert "unreadable picture" in caught.value.cause
    towers.save(encoder(1), tmp_path / "reference")
    for attempt in range(2):  # the second finds the cache complete, and must stop all the same
        with pytest.raises(DataError, match="16 of 64 pairs are unusable"):
            aced.distill(distillation(tmp_path / f"aced{attempt}", pool, tmp_path / "reference"))


def test_a_missing_task_is_told_before_anything_is_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACED_HOME", str(tmp_path / "home"))
    pool = write_pool(tmp_path / "pool", pairs=64)
    towers.save(encoder(1), tmp_path / "reference")
    held_out = aced.Evaluation(tasks=("nothing",), data_root=tmp_path / "pool")
    made = distillation(tmp_path / "run", pool, tmp_path / "reference").replace(evaluation=held_out)
    with pytest.raises(EvaluationError, match="no task 'nothing'"):
        aced.distill(made)
    assert not list(tmp_path.rglob("rows.bin"))


# -- steps --------------------------------------------------------------------------------------------------------


def poison(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Makes the losses of some steps (1 is the first) NaN."""
    original, count = room.build_losses, [0]

    def poisoned(*inputs: Any) -> Any:
        real = original(*inputs)

        def loss(student: Any, teachers: Any = (), **more: Any) -> Any:
            count[0] += 1
            terms = real(student, teachers, **more)
            return type(terms)(terms.total * float("nan"), terms.parts) if count[0] in steps else terms

        return loss

    monkeypatch.setattr(room, "build_losses", poisoned)


@pytest.mark.parametrize("micro_batch", [None, 4])
@pytest.mark.parametrize("kind", ["single", "deepspeed"])
def test_a_loss_that_is_not_finite_is_skipped(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, micro_batch: int | None
) -> None:
    poison(monkeypatch, {2, 3, 5})
    heard: list[Event] = []
    engine = aced.Engine(kind=kind, device="cpu", max_nonfinite_steps=2, micro_batch=micro_batch)
    run = aced.distill(run_in(world, tmp_path / "run", engine=engine), callbacks=[heard.append])
    skipped = [(event.step, event.in_a_row) for event in heard if isinstance(event, StepSkipped)]
    assert skipped == [(2, 1), (3, 2), (5, 1)]
    assert (run.step, run.metrics["trained"], run.metrics["scored"]) == (6, 24, 96)
    assert all(torch.isfinite(tensor).all() for tensor in run.student.model.state_dict().values())


def test_a_skipped_step_names_its_pairs(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, {2})
    heard: list[Event] = []
    made = run_in(world, tmp_path / "run", curation=aced.Iid(sub_batch=16))
    aced.distill(made, callbacks=[heard.append])
    (skipped,) = [event for event in heard if isinstance(event, StepSkipped)]
    order = FullOrder([range(64)], 16, seed=0)
    rows = order.rows(np.arange(16), order.start(), 2)[:, 1]  # the second step's pairs
    assert skipped.keys == tuple(f"{row:06d}" for row in rows[:8])


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_pairs_whose_embeddings_are_broken_are_named_first(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, micro_batch: int | None
) -> None:
    original, pool = towers.DualEncoder.forward, Pool([world / "pool"])
    culprit = towers.load(world / "reference").resize(pool.image(37, 10**6))

    def poisoned(self: towers.DualEncoder, images: Tensor, tokens: Tensor) -> towers.Embeddings:
        out = original(self, images, tokens)
        hit = (images == culprit).flatten(1).all(dim=1)
        return dataclasses.replace(out, image=out.image.masked_fill(hit[:, None], float("nan")))

    monkeypatch.setattr(towers.DualEncoder, "forward", poisoned)
    heard: list[Event] = []
    engine = aced.Engine(kind="single", device="cpu", micro_batch=micro_batch, max_nonfinite_steps=0)
    made = run_in(world, tmp_path / "run", curation=aced.Iid(sub_batch=16), engine=engine)
    with pytest.raises(EngineError, match="whose pairs are 000037"):
        aced.distill(made, callbacks=[heard.append])
    assert [event.keys for event in heard if isinstance(event, StepSkipped)] == [("000037",)]


def test_micro_batches_of_a_student_with_batch_norm_are_refused(world: Path, tmp_path: Path) -> None:
    convolutional = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16}
    student = aced.Student(architecture=ARCHITECTURE | {"vision_cfg": convolutional})
    engine = aced.Engine(kind="single", device="cpu", micro_batch=4)
    with pytest.raises(ConfigError, match="batch norms") as caught:
        aced.distill(run_in(world, tmp_path / "run", student=student, engine=engine))
    assert caught.value.field == "engine.micro_batch"
    assert aced.distill(run_in(world, tmp_path / "whole", student=student)).step == 6


def test_losses_that_stay_not_finite_stop_the_run(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, set(range(4, 100)))
    told = r"not finite in 2 steps in a row, up to step 5, whose pairs are \d{6}, \d{6}, \d{6} and 5 more"
    with pytest.raises(EngineError, match=told) as caught:
        aced.distill(run_in(world, tmp_path / "run", engine=aced.Engine(
            kind="single", device="cpu", checkpoint_every=2, max_nonfinite_steps=1)))  # fmt: skip
    assert caught.value.field == "optimizer.learning_rate"
    assert [step_of(path) for path in checkpoints(tmp_path / "run")] == [2]
    for tensor in load_file(checkpoints(tmp_path / "run")[0] / "weights.safetensors").values():
        assert torch.isfinite(tensor).all()
    monkeypatch.undo()
    assert aced.resume(tmp_path / "run").step == 6


# -- folders ------------------------------------------------------------------------------------------------------


def test_a_directory_that_holds_a_run_is_refused(world: Path, tmp_path: Path) -> None:
    made = run_in(world, tmp_path / "run")
    aced.distill(made)
    student = (tmp_path / "run" / "student" / "open_clip_model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="holds a run already") as caught:
        aced.distill(made.replace(seed=5))
    assert caught.value.field == "directory"
    assert (tmp_path / "run" / "student" / "open_clip_model.safetensors").read_bytes() == student
    assert DistillConfig.from_yaml(tmp_path / "run" / "config.yaml").seed == 0


def test_a_start_that_failed_over_its_config_may_be_made_again(world: Path, tmp_path: Path) -> None:
    made = run_in(world, tmp_path / "run")
    with pytest.raises(DataError):
        aced.distill(made.replace(data=aced.Data(shards=(str(tmp_path / "typo"),))))
    assert aced.distill(made).step == 6


def test_there_is_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="holds no run"):
        aced.resume(tmp_path)


def test_resume_after_a_break_before_the_first_checkpoint_starts_anew(world: Path, tmp_path: Path) -> None:
    def stop(event: Event) -> None:
        if isinstance(event, StepDone):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        aced.distill(run_in(world, tmp_path / "run"), callbacks=[stop])
    assert checkpoints(tmp_path / "run") == []
    assert aced.resume(tmp_path / "run").step == 6


@pytest.mark.parametrize("file", ["weights.safetensors", "optimizer.safetensors", "loop.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["flipped bit", "cut off", "missing"])
def test_a_damaged_checkpoint_is_named_and_the_older_one_is_used(
    world: Path, tmp_path: Path, whole: dict[str, Tensor], file: str, damage: str
) -> None:
    aced.distill(run_in(world, tmp_path / "run"))
    path = checkpoints(tmp_path / "run")[-1] / file
    content = bytearray(path.read_bytes())
    if damage == "flipped bit":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "cut off":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.unlink()
    if (file, damage) == ("state.json", "missing"):  # an incomplete one does not count
        run = aced.resume(tmp_path / "run")
    else:
        with pytest.warns(UserWarning, match=r"step-00000006 cannot be read: .*; resuming from step-00000004"):
            run = aced.resume(tmp_path / "run")
    assert run.step == 6
    for name, tensor in run.student.model.state_dict().items():
        assert torch.equal(tensor, whole[name]), name


@pytest.fixture(scope="module")
def whole(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The weights of an uninterrupted run."""
    run = aced.distill(run_in(world, tmp_path_factory.mktemp("whole") / "run"))
    return run.student.model.state_dict()


def test_a_run_whose_checkpoints_are_all_damaged_is_not_resumed(world: Path, tmp_path: Path) -> None:
    aced.distill(run_in(world, tmp_path / "run"))
    for checkpoint in checkpoints(tmp_path / "run"):
        (checkpoint / "loop.safetensors").write_bytes(b"torn")
    with pytest.raises(EngineError, match="step-00000006 cannot be read"):
        aced.resume(tmp_path / "run")


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("change", ["captions", "shards swapped", "shard missing"])
def test_a_run_is_not_resumed_on_other_data(tmp_path: Path, change: str, prepared: bool) -> None:
    pool = write_pool(tmp_path / "pool", pairs=64)
    aced.distill(iid(tmp_path / "run", pool, prepared=tmp_path / "prepared" if prepared else None))
    first, second, *_ = sorted(pool.glob("*.tar"))
    if change == "captions":
        text = first.read_bytes()
        assert b"red" in text
        first.write_bytes(text.replace(b"red", b"rad"))
    elif change == "shards swapped":
        content = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(content)
    else:
        second.unlink()
    with pytest.raises(DataError, match="the shards have changed") as caught:
        aced.resume(tmp_path / "run")
    assert caught.value.field == "data.shards"


def test_a_cache_of_another_model_is_refused(world: Path, tmp_path: Path) -> None:
    towers.save(encoder(7), tmp_path / "other")
    aced.cache_embeddings(tmp_path / "other", world / "pool", tmp_path / "cache")
    reference = aced.Frozen(model=str(world / "reference"), cache=tmp_path / "cache")
    with pytest.raises(CacheError, match="of another model") as caught:
        aced.distill(run_in(world, tmp_path / "run", reference=reference))
    assert caught.value.field == "cache"


def test_a_missing_reference_is_told(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no folder") as caught:
        aced.distill(run_in(world, tmp_path / "run", reference=aced.Frozen(model=str(tmp_path / "none"))))
    assert caught.value.field == "reference.model"


def test_several_processes_are_refused(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    made = run_in(world, tmp_path / "run")
    for verb in (lambda: aced.distill(made), lambda: aced.resume(tmp_path / "run")):
        with pytest.raises(UnsupportedError, match="distillation over ranks is planned") as caught:
            verb()
        assert caught.value.reported_by == 0
    assert not (tmp_path / "run").exists()
