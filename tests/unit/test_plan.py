# SPDX-License-Identifier: Apache-2.0
"""What a run will cost, told before it starts, and what it did cost."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import distillation, encoder, write_pool

import aced_sdk as aced
from aced_sdk import towers
from aced_sdk.errors import ConfigError, DataError, ModelError


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("plan")
    return write_pool(root / "pool", pairs=64), towers.save(encoder(1, embed_dim=24), root / "reference")


def test_a_plan_counts_macs_and_examples_as_the_method_needs_them(world: tuple[Path, Path], tmp_path: Path) -> None:
    pool, reference = world
    config = distillation(tmp_path / "run", pool, reference)
    macs = encoder().profile().macs
    aced_plan = aced.plan(config)
    assert (aced_plan.pairs, aced_plan.trained, aced_plan.scored) == (64, 48, 96)
    assert aced_plan.macs == macs * (3 * 48 + 96)
    assert aced_plan.cost_over_iid == pytest.approx(5 / 3)
    easy = aced.plan(config.replace(curation=config.curation.replace(score="easy_reference")))
    assert (easy.scored, easy.macs, easy.cost_over_iid) == (0, macs * 3 * 48, 1.0)
    iid = aced.plan(config.replace(curation=aced.Iid(sub_batch=8), objective=aced.Objective(), reference=None))
    assert (iid.trained, iid.scored, iid.cost_over_iid) == (48, 0, 1.0)
    assert not (tmp_path / "run").exists()


def test_a_plan_adds_up_memory_and_disk(world: tuple[Path, Path], tmp_path: Path) -> None:
    pool, reference = world
    parameters = encoder().profile().parameters
    config = distillation(tmp_path / "run", pool, reference)
    plan = aced.plan(config)
    assert plan.memory == 16 * parameters
    embeddings, checkpoints = 64 * 24 * 2 * 2, 2 * 12 * parameters
    assert plan.disk == embeddings + checkpoints
    prepared = config.replace(data=config.data.replace(prepared=tmp_path / "p"))
    assert aced.plan(prepared).disk == plan.disk + 64 * (3 * 16 * 16 + 4 * 8)
    assert plan.seconds > 0


def test_a_plan_is_one_readable_line(world: tuple[Path, Path], tmp_path: Path) -> None:
    text = str(aced.plan(distillation(tmp_path / "run", *world)))
    for part in ("64 pairs", "48 examples trained, 96 scored", "1.67 x an IID step", "MB of weights", "min of steps"):
        assert part in text
    assert "\n" not in text


def test_a_plan_meets_the_mistakes_of_a_run(world: tuple[Path, Path], tmp_path: Path) -> None:
    pool, reference = world
    small = distillation(tmp_path / "run", pool, reference)
    with pytest.raises(ConfigError, match="a step draws 128 candidates, and 64 pairs can be drawn from") as caught:
        aced.plan(small.replace(curation=small.curation.replace(super_batch=128)))
    assert caught.value.field == "curation.super_batch"
    with pytest.raises(DataError, match="there is no shard"):
        aced.plan(distillation(tmp_path / "run", tmp_path / "none", reference))
    with pytest.raises(ModelError, match="there is no folder"):
        aced.plan(distillation(tmp_path / "run", pool, tmp_path / "none"))


def test_cheap_scoring_second_batches_and_micro_batches_are_counted(tmp_path: Path) -> None:
    pool = write_pool(tmp_path / "pool")
    made = distillation(tmp_path / "run", pool, towers.save(encoder(1), tmp_path / "reference"))
    assert aced.plan(made).cost_over_iid == pytest.approx(5 / 3)  # f = .5
    student = encoder()
    small = student.profile(8).macs / student.profile().macs
    cheap = made.replace(curation=made.curation.replace(scoring_size=8))
    assert aced.plan(cheap).cost_over_iid == pytest.approx((2 * small + 3 * (0.5 + 0.5 * small)) / 3)
    second = aced.Objective(distillation=(aced.Distillation(batch="iid"),))
    assert aced.plan(made.replace(objective=second)).cost_over_iid == pytest.approx(8 / 3)
    again = made.replace(curation=aced.Iid(sub_batch=8), engine=made.engine.replace(micro_batch=4))
    assert aced.plan(again).cost_over_iid == pytest.approx(4 / 3)


def test_a_reference_that_scores_alone_has_no_scoring_size() -> None:
    with pytest.raises(aced.AcedError, match="the reference's alone"):
        aced.Joint(score="easy_reference", scoring_size=8)


def test_the_collapse_level_stands_between_the_narrowest_draws_and_even_ones() -> None:
    level = aced.Joint(sub_batch=256, super_batch=1280, collapse_margin=0.1).collapse_level
    assert level == pytest.approx(0.28)
    assert aced.Joint(sub_batch=256, super_batch=1280, collapse_margin=0.0).collapse_level == 0
