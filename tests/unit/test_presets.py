# SPDX-License-Identifier: Apache-2.0
"""Presets are the papers' methods and models: their sizes, their MACs, and runs that they start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import ARCHITECTURE, encoder, write_pool

import aced_sdk as aced
from aced_sdk import presets, towers
from aced_sdk.errors import ConfigError, ModelError

Make = Callable[..., presets.Preset]
NAMES = [name for name in presets.__all__ if name not in ("Options", "Preset")]


def make(name: str) -> Make:
    function: Make = getattr(presets, name)
    return function


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> presets.Options:
    """What a tiny run of any preset needs, but its directory."""
    root = tmp_path_factory.mktemp("presets")
    return {
        "student": aced.Student(architecture=ARCHITECTURE),
        "data": aced.Data(shards=(str(write_pool(root / "pool")),)),
        "reference": aced.Frozen(model=str(towers.save(encoder(1), root / "reference")), cache=root / "one"),
        "teacher": aced.Frozen(model=str(towers.save(encoder(2), root / "teacher")), cache=root / "two"),
        "sub_batch": 8,
        "super_batch": 16,
        "num_chunks": 4,
        "examples": 24,
        "engine": aced.Engine(kind="single", device="cpu", threads=1),
    }


def test_they_are_found_under_the_package() -> None:
    assert aced.presets is presets
    assert {"iid", "softmax_kd", "i_acid", "h_acid", "aced", "aced_f0", "aced_f1", "aced_f2"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_each_is_a_plain_config_in_a_file(name: str, tmp_path: Path) -> None:
    preset = make(name)()
    preset.to_yaml(tmp_path / "preset.yaml")
    plain = aced.DistillConfig.from_yaml(tmp_path / "preset.yaml")
    assert (type(plain), plain.hash()) == (aced.DistillConfig, preset.hash())
    assert presets.Preset.from_yaml(tmp_path / "preset.yaml") == preset
    assert preset.directory == Path("runs") / name
    text = make(name).__doc__ or ""
    assert any(says in text for says in ("Cost: ", "As `mobileclip_s0`"))
    assert any(says in text for says in ("Known: ", "(known: ", "Believed: ", "Not in the paper"))


@pytest.mark.parametrize(
    ("name", "method", "losses", "needs"),
    [
        ("iid", "iid", [], (False, False)),
        ("softmax_kd", "iid", ["softmax"], (False, False)),
        ("sigmoid_kd", "iid", ["sigmoid"], (False, False)),
        ("feature_kd", "iid", ["feature"], (False, False)),
        ("interactive_kd", "iid", ["interactive"], (False, False)),
        ("relational_kd", "iid", ["relational"], (False, False)),
        ("static", "static", [], (False, True)),
        ("static_kd", "static", ["softmax"], (False, True)),
        ("i_acid", "joint", [], (False, True)),
        ("i_acid_kd", "joint", ["softmax"], (False, True)),
        ("h_acid", "joint", [], (True, True)),
        ("h_acid_independent", "independent", [], (True, True)),
        ("aced", "joint", ["softmax"], (True, True)),
        ("aced_iid_distill", "joint", ["softmax"], (True, True)),
        ("flexi_aced", "joint", ["softmax"], (True, True)),
    ],
)
def test_each_method_is_the_papers(name: str, method: str, losses: list[str], needs: tuple[bool, bool]) -> None:
    preset = make(name)()
    curation = preset.curation
    assert (curation.method, [term.loss for term in preset.objective.distillation]) == (method, losses)
    assert (curation.needs_student, curation.needs_reference) == needs
    assert (preset.reference is not None, len(preset.teachers)) == (needs[1], len(losses))
    assert preset.objective.needs_iid_batch == (name == "aced_iid_distill")
    assert (curation.sub_batch, preset.schedule.steps) == (32_768, 3_000_000_000 // 32_768)
    if method in ("joint", "independent"):
        assert (curation.candidates, curation.filter_ratio) == (163_840, pytest.approx(0.8))


@pytest.mark.parametrize(("name", "gmacs"), [("aced_f0", 3.30), ("aced_f1", 7.14), ("aced_f2", 10.29)])
def test_the_papers_models_cost_what_the_paper_says(name: str, gmacs: float) -> None:
    preset = make(name)()
    profile = preset.student.profile()
    assert profile.macs == pytest.approx(gmacs * 1e9, rel=0.01)
    assert profile.text_macs == pytest.approx(1.397e9, rel=0.01)
    assert isinstance(preset.curation, aced.Joint)
    assert (preset.curation.num_chunks, preset.schedule.steps) == (16, 13_000_000_000 // 32_768)
    assert (preset.schedule.shape, preset.schedule.warmup, preset.schedule.cooldown) == ("rsqrt", 0.1, 0.1)
    assert preset.optimizer.learning_rate == 1e-3


@pytest.mark.parametrize(
    ("name", "gmacs"), [("mobileclip_s0", 5.37), ("mobileclip_s1", 7.64), ("mobileclip_s2", 10.81)]
)
def test_mobileclips_towers_cost_what_their_docstrings_say(name: str, gmacs: float) -> None:
    preset = make(name)()
    assert preset.student.profile().macs == pytest.approx(gmacs * 1e9, rel=0.01)
    assert preset.engine.micro_batch is None  # batch norm forbids it


def test_flexi_aceds_scoring_is_cheap_and_its_price_is_the_docstrings() -> None:
    preset = presets.flexi_aced()
    assert isinstance(preset.curation, aced.Joint)
    whole, small = preset.student.profile().macs, preset.student.profile(preset.curation.scoring_size).macs
    assert small / whole == pytest.approx(0.286, abs=0.001)
    share, ratio = preset.curation.scoring_fraction, preset.curation.candidates / preset.curation.sub_batch
    cost = (ratio * small / whole + 3 * (1 - share + share * small / whole)) / 3
    assert cost == pytest.approx(1.12, abs=0.005)
    assert "0.286" in str(presets.flexi_aced.__doc__)
    assert "Cost: 1.12" in str(presets.flexi_aced.__doc__)


def test_siglip2s_finish_is_a_short_stage_of_acid_from_a_folder(world: presets.Options, tmp_path: Path) -> None:
    preset = presets.siglip2_finish()
    assert isinstance(preset.curation, aced.Joint)
    assert preset.curation.filter_ratio == 0.5
    assert (preset.optimizer.learning_rate, preset.optimizer.weight_decay) == (1e-5, 0.0)
    assert (preset.objective.contrastive.loss, preset.objective.distillation) == ("sigmoid", ())
    with pytest.raises(ModelError, match="there is no folder"):
        preset.student.profile()
    start = towers.save(encoder(3), tmp_path / "start")
    options = world | {"student": aced.Student(architecture=f"local-dir:{start}"), "directory": tmp_path / "run"}
    run = aced.distill(presets.siglip2_finish(**options))
    assert run.student.scale != towers.load(start).scale
    assert run.student.scale == pytest.approx(towers.load(start).scale, rel=1e-4)


def test_options_are_sizes_or_fields() -> None:
    small = presets.aced(sub_batch=64, examples=640, gain=2.0, seed=3)
    assert isinstance(small.curation, aced.Joint)
    assert (small.curation.super_batch, small.curation.gain, small.schedule.steps) == (320, 2.0, 10)
    assert (small.seed, small.engine.micro_batch) == (3, None)
    assert presets.iid(sub_batch=64, super_batch=128, num_chunks=2, gain=2.0).curation == aced.Iid(sub_batch=64)
    whole = presets.aced(curation=aced.Joint(sub_batch=32, super_batch=64), examples=3200)
    assert (whole.curation.candidates, whole.schedule.steps, whole.engine.micro_batch) == (64, 100, None)
    assert presets.aced().engine.micro_batch == 1024
    assert presets.aced(schedule=aced.Schedule(steps=7)).schedule.steps == 7
    assert presets.aced(teacher=None).teachers == (presets.aced().reference,)
    assert presets.softmax_kd(weight=2.0).objective.distillation[0].weight == 2.0
    assert presets.static(keep_fraction=0.1).curation == aced.StaticFilter(sub_batch=32_768, keep_fraction=0.1)
    student = aced.Student(architecture=ARCHITECTURE, init_scale=20.0)
    other = presets.aced(student=student).replace(seed=1)
    assert (other.student.init_scale, other.student.profile().macs) == (20.0, encoder().profile().macs)
    with pytest.raises(ConfigError, match="did you mean 'directory'"):
        make("aced")(directry="runs/x")
    with pytest.raises(ConfigError, match="not a multiple"):
        presets.aced(sub_batch=64, super_batch=100)


@pytest.mark.parametrize("name", ["iid", "softmax_kd", "static_kd", "i_acid_kd", "h_acid_independent", "aced"])
def test_a_preset_plans_and_runs(name: str, world: presets.Options, tmp_path: Path) -> None:
    options: dict[str, Any] = {**world, "directory": tmp_path / "run"}
    if name == "static_kd":
        options["keep_fraction"] = 0.5
    config = make(name)(**options)
    plan = aced.plan(config)
    scores = config.curation.needs_student
    assert (plan.trained, plan.scored) == (24, 48 if scores else 0)
    assert plan.cost_over_iid == pytest.approx(5 / 3 if scores else 1.0)
    run = aced.distill(config)
    assert (run.step, run.metrics["trained"], run.metrics["scored"]) == (3, plan.trained, plan.scored)


@pytest.mark.parametrize(("name", "own"), [("flexi_aced", {"scoring_size": 8}), ("aced_iid_distill", {})])
def test_the_costly_and_the_cheap_variant_run(
    name: str, own: dict[str, int], world: presets.Options, tmp_path: Path
) -> None:
    run = aced.distill(make(name)(**own, **world, directory=tmp_path / "run"))
    assert (run.step, run.metrics["scored"]) == (3, 48)
