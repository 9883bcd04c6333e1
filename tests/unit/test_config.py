# SPDX-License-Identifier: Apache-2.0
"""What a user writes is checked at once, and every mistake names its place and its remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

import aced_sdk as aced
from aced_sdk.errors import ConfigError

VALUES: dict[str, Any] = {
    "student": {"architecture": "ViT-B-32"},
    "data": {"shards": ["a.tar"]},
    "reference": {"model": "reference"},
    "curation": {"method": "joint", "sub_batch": 8, "super_batch": 40, "num_chunks": 4},
    "objective": {"distillation": [{"loss": "softmax", "weight": 2.0}]},
    "schedule": {"steps": 10},
    "directory": "run",
}


def mistake(**changes: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        aced.DistillConfig(**(VALUES | changes))
    assert caught.value.remedy
    assert f"[field: {caught.value.field}]" in str(caught.value)
    return caught.value


def test_an_unknown_field_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="unknown field 'loss_from'") as caught:
        aced.Joint(loss_from="softmax")
    assert "loss" in caught.value.remedy
    error = mistake(shedule={"steps": 1})
    assert (error.field, error.remedy) == ("shedule", "did you mean 'schedule'?")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"schedule": {"steps": 0}}, "schedule.steps"),
        ({"schedule": {}}, "schedule.steps"),
        ({"schedule": {"steps": 5, "warmup": 0.6, "cooldown": 0.6}}, "schedule.cooldown"),
        ({"curation": {"method": "joint", "sub_batch": 10, "super_batch": 40, "num_chunks": 4}}, "curation.num_chunks"),
        ({"curation": {"method": "joint", "sub_batch": 16, "super_batch": 40}}, "curation.super_batch"),
        ({"curation": {"method": "independent", "sub_batch": 16, "super_batch": 40}}, "curation.super_batch"),
        ({"curation": {"method": "joint", "gain": float("nan")}}, "curation.gain"),
        ({"curation": {"method": "static", "keep_fraction": 1.5}}, "curation.keep_fraction"),
        ({"objective": {"distillation": [{}, {"weight": -1}]}}, "objective.distillation.1.weight"),
        ({"objective": {"contrastive": {"weight": 0}}}, "objective.contrastive.weight"),
        ({"data": {"shards": []}}, "data.shards"),
        ({"engine": {"zero_stage": 4}}, "engine.zero_stage"),
        ({"reference": None}, "reference"),
        ({"reference": None, "curation": {"method": "iid"}}, "teacher"),
        ({"evaluation": {"tasks": ["cifar10"]}}, "evaluation.data_root"),
        ({"seed": -1}, "seed"),
    ],
)
def test_a_mistake_names_its_dotted_field(changes: dict[str, Any], field: str) -> None:
    assert mistake(**changes).field == field


def test_impossible_batch_sizes_tell_possible_ones() -> None:
    error = mistake(curation={"method": "joint", "sub_batch": 16, "super_batch": 40, "num_chunks": 4})
    assert "40" in error.cause
    assert error.remedy == "take 32"


def test_yaml_round_trip_keeps_every_value(tmp_path: Path) -> None:
    config = aced.DistillConfig(**VALUES)
    config.to_yaml(tmp_path / "deep" / "config.yaml")
    again = aced.DistillConfig.from_yaml(tmp_path / "deep" / "config.yaml")
    assert again == config
    assert again.hash() == config.hash()
    written = yaml.safe_load((tmp_path / "deep" / "config.yaml").read_text())
    assert written["optimizer"]["betas"] == [0.9, 0.95]  # defaults are written too
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    ("text", "cause"),
    [("steps: [1", "is not YAML"), ("- a\n- b", "does not hold a mapping"), ("1: 2", "does not hold a mapping")],
)
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, text: str, cause: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=cause):
        aced.DistillConfig.from_yaml(path)
    with pytest.raises(ConfigError, match="No such file"):
        aced.DistillConfig.from_yaml(tmp_path / "none.yaml")


def test_the_hash_changes_with_any_value_and_only_then() -> None:
    config = aced.DistillConfig(**VALUES)
    assert config.hash() == aced.DistillConfig(**VALUES).hash()
    others = [
        config.replace(seed=1),
        config.replace(schedule=config.schedule.replace(steps=11)),
        config.replace(curation=aced.Joint(sub_batch=8, super_batch=40, num_chunks=8)),
        config.replace(objective=aced.Objective(distillation=(aced.Distillation(weight=3.0),))),
    ]
    assert len({config.hash(), *(other.hash() for other in others)}) == 5


def test_replace_checks_like_a_new_config_and_leaves_the_old_one() -> None:
    config = aced.DistillConfig(**VALUES)
    assert config.replace(seed=3).seed == 3
    assert config.seed == 0
    with pytest.raises(ConfigError, match="needs a reference"):
        config.replace(reference=None)
    with pytest.raises(ConfigError, match="unknown field 'sede'"):
        config.replace(sede=1)
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3  # type: ignore[misc]


def test_methods_say_what_they_read() -> None:
    reads = {
        score: (aced.Joint(score=score).needs_student, aced.Joint(score=score).needs_reference)
        for score in ("learnability", "easy_reference", "hard_learner")
    }
    assert reads == {"learnability": (True, True), "easy_reference": (False, True), "hard_learner": (True, False)}
    assert aced.Joint(sub_batch=256, super_batch=1280).filter_ratio == pytest.approx(0.8)
    assert (aced.Iid().candidates, aced.StaticFilter().candidates) == (256, 256)
    config = aced.DistillConfig(**VALUES)
    assert config.teachers == (config.reference,)
    assert config.replace(teacher=aced.Frozen(model="t")).teachers == (aced.Frozen(model="t"),)
    assert config.replace(objective=aced.Objective()).teachers == ()


def test_mistakes_of_nested_configs_are_listed_one_by_one() -> None:
    with pytest.raises(ConfigError, match=r"^5 mistakes: ") as caught:
        aced.DistillConfig(student={"archtecture": "x"}, data={"shard": "x"}, directory="x")  # type: ignore[arg-type]
    fields = [one.field for one in caught.value.mistakes]
    assert fields == ["student.architecture", "student.archtecture", "data.shards", "data.shard", "schedule"]
    assert str(caught.value).count("mistakes") == 1


def test_one_path_stands_for_a_list_of_shards(tmp_path: Path) -> None:
    assert aced.Data(shards="pics").shards == ("pics",)  # type: ignore[arg-type]
    assert aced.Data(shards=tmp_path).shards == (str(tmp_path),)  # type: ignore[arg-type]
    for wrong in (3, None, b"pics", []):
        with pytest.raises(ConfigError, match="shards"):
            aced.Data(shards=wrong)  # type: ignore[arg-type]


def test_all_mistakes_are_listed_at_once_with_sensible_digits() -> None:
    with pytest.raises(ConfigError, match="3 mistakes") as caught:
        aced.Joint(gain=-0.123456789, super_batch=0, gian=2)
    text = str(caught.value)
    assert "gain: Input should be greater than 0 (got -0.123457)" in text
    assert "super_batch: Input should be greater than 0 (got 0)" in text
    assert "unknown field 'gian' (did you mean 'gain'?)" in text


def test_only_near_names_are_suggested() -> None:
    with pytest.raises(ConfigError) as caught:
        aced.Student(architecture="ViT-B-32", freeze=True)
    assert caught.value.remedy == "known fields here: architecture, init_bias, init_scale, mean, resize, std"
    with pytest.raises(ConfigError) as caught:
        aced.DistillConfig(**{**VALUES, "objective": {"distillation": [{"los": "softmax"}]}})
    assert (caught.value.field, caught.value.remedy) == ("objective.distillation.0.los", "did you mean 'loss'?")


@pytest.mark.parametrize(
    ("curation", "cause", "remedy"),
    [
        ({"method": "joimt"}, "unknown method 'joimt'", "did you mean 'joint'?"),
        ({"method": "best"}, "unknown method 'best'", "use one of iid, static, independent, joint"),
        ({"sub_batch": 3}, "'method' is missing", "use one of iid, static, independent, joint"),
    ],
)
def test_a_wrong_or_missing_method_is_named(curation: dict[str, Any], cause: str, remedy: str) -> None:
    found = mistake(curation=curation)
    assert (found.cause, found.field) == (cause, "curation.method")
    assert found.remedy.startswith(remedy)  # curations of other modules may follow


def test_a_text_instead_of_a_config_is_one_mistake_with_its_fields() -> None:
    found = mistake(teacher="some/folder")
    assert "'teacher' takes a mapping of fields" in found.cause
    assert not found.mistakes
    assert "model" in found.remedy


def test_a_tab_in_yaml_is_named(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("student:\n\tarchitecture: x\n")
    with pytest.raises(ConfigError, match="line 2, column 1") as caught:
        aced.DistillConfig.from_yaml(tmp_path / "c.yaml")
    assert caught.value.remedy == "indent with spaces, not with tabs"


def test_a_frozen_model_that_nothing_reads_is_known() -> None:
    reference = aced.Frozen(model="reference")
    kd = aced.Objective(distillation=(aced.Distillation(),))
    base = aced.DistillConfig(
        student=aced.Student(architecture="ViT-B-32"),
        data=aced.Data(shards="a.tar"),
        schedule=aced.Schedule(steps=1),
        directory="run",
    )
    assert base.unused is None
    assert base.replace(reference=reference).unused == "reference"
    assert base.replace(teacher=reference).unused == "teacher"
    assert base.replace(reference=reference, objective=kd).unused is None
    assert base.replace(reference=reference, curation=aced.Joint()).unused is None
    assert base.replace(reference=reference, teacher=aced.Frozen(model="other"), objective=kd).unused == "reference"
