# SPDX-License-Identifier: Apache-2.0
"""Curations, losses and frozen sources of one's own: names that cannot collide, and mistakes that are found at once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from tiny import distillation, write_world
from torch import Tensor

import aced_sdk as aced
from aced_sdk.cache import FrozenModel
from aced_sdk.config import Curation, FrozenConfig, Iid, Joint
from aced_sdk.config.objective import DISTILLATION_LOSSES, LossKind
from aced_sdk.curation import Embeddings, Selector, check_picked
from aced_sdk.errors import ConfigError, CurationError
from aced_sdk.objectives import WeightedLosses, build_objective
from aced_sdk.objectives.build import WeightedLoss

HERE = __name__


@pytest.fixture(autouse=True)
def registries() -> Iterator[None]:
    """What a test registers stays its own."""
    known: tuple[dict[str, Any], ...] = (Curation.methods, FrozenConfig.kinds, DISTILLATION_LOSSES)
    before = [dict(registry) for registry in known]
    yield
    for registry, values in zip(known, before, strict=True):
        registry.clear()
        registry.update(values)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("own"), pairs=32)


def run_config(world: Path, directory: Path, **changes: Any) -> aced.DistillConfig:
    return distillation(directory, world / "pool", world / "reference").replace(**changes)


def normal(seed: int, pairs: int = 8) -> Embeddings:
    image, text = torch.nn.functional.normalize(
        torch.randn(2, pairs, 4, generator=torch.Generator().manual_seed(seed)), dim=-1
    )
    return Embeddings(image, text, 10.0, -10.0)


def cosine(student: Embeddings, teacher: Embeddings) -> Tensor:
    return 1 - (student.image * teacher.image).sum(dim=1).mean()


def per_pair(student: Embeddings, teacher: Embeddings) -> Tensor:
    return 1 - (student.image * teacher.image).sum(dim=1)


def number(student: Embeddings, teacher: Embeddings) -> float:
    return 0.5


def detached(student: Embeddings, teacher: Embeddings) -> Tensor:
    return cosine(student, teacher).detach()


def register_loss(name: str, kind: Any) -> None:
    DISTILLATION_LOSSES[name] = kind


def terms(*names: str, task: float = 1.0) -> aced.Objective:
    return aced.Objective(
        contrastive=aced.Contrastive(weight=task), distillation=[aced.Distillation(loss=name) for name in names]
    )


# Names of terms


def test_every_term_counts_whatever_its_loss_is_named() -> None:
    register_loss("contrastive", LossKind(f"{HERE}:cosine"))
    register_loss("softmax_2", LossKind(f"{HERE}:cosine"))
    student, teacher = normal(0), normal(1)
    found = build_objective(terms("contrastive", "softmax", "softmax", "softmax_2"))(student, [teacher])
    assert list(found.parts) == ["contrastive", "contrastive_2", "softmax", "softmax_2", "softmax_2_2"]
    torch.testing.assert_close(found.parts["contrastive_2"], cosine(student, teacher))
    task = build_objective(aced.Objective())(student).total
    soft = build_objective(terms("softmax", task=0.0))(student, [teacher]).total
    torch.testing.assert_close(found.total, task + 2 * soft + 2 * cosine(student, teacher))


def test_terms_of_one_name_are_refused() -> None:
    term = WeightedLoss("a", 1.0, "same", lambda student, teachers, captions: student.image.sum())
    with pytest.raises(ConfigError, match="two loss terms have the name 'a'"):
        WeightedLosses((term, term))


# Selectors


@pytest.mark.parametrize(
    ("picked", "cause"),
    [
        (torch.arange(5), "5 of 16 candidates, and the sub-batch has 4"),
        (torch.arange(3), "3 of 16 candidates"),
        (torch.arange(0), "0 of 16 candidates"),
        (torch.zeros(4, dtype=torch.int64), "candidate 0 4 times"),
        (torch.tensor([3, 5, 7, 5]), "candidate 5 2 times"),
        (torch.arange(4) + 13, "index 16 of 16 candidates"),
        (torch.arange(4) - 1, "index -1 of 16 candidates"),
        (torch.arange(16) < 4, r"bool \[16\]"),
        (torch.arange(4.0), r"float32 \[4\]"),
        (torch.arange(4, dtype=torch.int32), r"int32 \[4\]"),
        (torch.arange(4)[None], r"int64 \[1, 4\]"),
        ([0, 1, 2, 3], "a list, not a tensor"),
        (None, "a NoneType, not a tensor"),
    ],
)
def test_only_a_sub_batch_can_be_selected(picked: Any, cause: str) -> None:
    with pytest.raises(CurationError, match=f"Mine selects {cause}") as caught:
        check_picked(picked, 4, 16, "Mine")
    assert "int64 [sub_batch]" in caught.value.remedy
    assert check_picked(torch.tensor([15, 0, 3, 2]), 4, 16, "Mine").tolist() == [15, 0, 3, 2]


class Twice(Curation):
    """Select the first candidate again and again."""

    target: ClassVar[str] = f"{HERE}:TwiceSelector"

    method: Literal["twice"] = "twice"
    super_batch: int = 16

    @property
    def candidates(self) -> int:
        return self.super_batch


class TwiceSelector(Selector):
    def select(
        self, student: Embeddings | None, reference: Embeddings | None, generator: torch.Generator | None = None
    ) -> Tensor:
        return torch.zeros(self.config.sub_batch, dtype=torch.int64)


def test_a_run_checks_what_its_selector_returns(world: Path, tmp_path: Path) -> None:
    Curation.methods["twice"] = Twice
    config = run_config(world, tmp_path / "run", curation=Twice(sub_batch=8))
    with pytest.raises(CurationError, match="TwiceSelector selects candidate 0 8 times"):
        aced.distill(config)


def test_fewer_candidates_than_the_sub_batch_are_refused() -> None:
    with pytest.raises(ConfigError, match="sub-batch of 32 cannot be selected from 16 candidates") as caught:
        Twice(sub_batch=32)
    assert caught.value.field == "super_batch"


# Registries


def test_a_method_belongs_to_one_class() -> None:
    with pytest.raises(ConfigError, match=r"Taken has the method 'joint' of aced_sdk.config.curation.Joint"):

        class Taken(Curation):
            method: Literal["joint"] = "joint"

    with pytest.raises(ConfigError, match=r"AlsoTaken has the kind 'stored'"):

        class AlsoTaken(aced.Frozen):
            kind: str = "stored"

    assert (Curation.methods["joint"], FrozenConfig.kinds["stored"]) == (Joint, aced.Stored)


def test_a_subclass_without_a_name_of_its_own_takes_over_nothing(world: Path, tmp_path: Path) -> None:
    class Knob(Joint):
        knob: float = 1.0

    class Mine(aced.Frozen):
        strength: float = 3.0

    assert (Curation.methods["joint"], FrozenConfig.kinds["frozen"]) == (Joint, aced.Frozen)
    plain = run_config(world, tmp_path)
    assert aced.DistillConfig(**plain.model_dump(mode="json")) == plain
    with pytest.raises(ConfigError, match="Knob has no method of its own") as caught:
        plain.replace(curation=Knob(sub_batch=8, super_batch=16, num_chunks=4))
    assert caught.value.field == "curation.method"
    with pytest.raises(ConfigError, match="Mine has no kind of its own") as caught:
        plain.replace(teacher=(aced.Frozen(model="a"), Mine(model="a")))
    assert caught.value.field == "teacher.1.kind"


def test_a_class_can_be_defined_again() -> None:
    def define() -> type[Curation]:
        class Again(Curation):
            method: Literal["again"] = "again"

        return Again

    first, second = define(), define()
    assert first is not second
    assert Curation.methods["again"] is second


BUILT: list[float] = []


class Strong(aced.Frozen):
    """A frozen source of one's own."""

    target: ClassVar[str] = f"{HERE}:StrongModel"

    kind: str = "strong"
    strength: float = 3.0


class StrongModel(FrozenModel):
    def __init__(self, config: Strong) -> None:
        super().__init__(config)
        BUILT.append(config.strength)
        with torch.no_grad():
            self.encoder.model.logit_scale += config.strength / 10  # type: ignore[operator]
        self.fingerprint = self.encoder.fingerprint()


def test_a_frozen_source_of_ones_own_survives_yaml_and_a_resume(world: Path, tmp_path: Path) -> None:
    FrozenConfig.kinds["strong"] = Strong
    mine = Strong(model=str(world / "reference"), strength=5.0)
    config = run_config(world, tmp_path / "run", reference=mine, teacher=[mine, aced.Stored(scale=2.0)])
    config.to_yaml(tmp_path / "config.yaml")
    again = aced.DistillConfig.from_yaml(tmp_path / "config.yaml")
    assert (again, type(again.reference)) == (config, Strong)
    assert again.hash() == config.hash()
    assert config.hash() != config.replace(reference=mine.replace(strength=1.0)).hash()

    def cut(event: Any) -> None:
        if event.name == "checkpoint_saved" and event.step == 4:
            raise KeyboardInterrupt

    BUILT.clear()
    config = config.replace(teacher=None)
    with pytest.raises(KeyboardInterrupt):
        aced.distill(config, callbacks=[cut])
    assert aced.resume(config.directory).step == 6
    assert BUILT == [5.0, 5.0]  # the reference is the teacher, too


def test_yaml_without_a_kind_is_read_by_its_fields(world: Path, tmp_path: Path) -> None:
    values = run_config(world, tmp_path).model_dump(mode="json")
    read = aced.DistillConfig(**(values | {"reference": {"model": "m", "cache": "c"}, "teacher": [{"scale": 2.0}]}))
    assert (read.reference, read.teacher) == (aced.Frozen(model="m", cache=Path("c")), (aced.Stored(scale=2.0),))
    with pytest.raises(ConfigError, match="unknown kind of frozen source 'best'") as caught:
        aced.DistillConfig(**(values | {"reference": {"kind": "best", "model": "m"}}))
    assert caught.value.field == "reference.kind"
    assert "use one of frozen, stored" in caught.value.remedy
    assert "aced --import MODULE" in caught.value.remedy
    with pytest.raises(ConfigError, match="Frozen is of kind 'frozen', not 'stored'"):
        aced.Frozen(model="m", kind="stored")
    for wrong in ({3: "m"}, "m", 3, [["m"]]):
        with pytest.raises(ConfigError) as caught:
            aced.DistillConfig(**(values | {"teacher": wrong}))
        assert (caught.value.field or "").startswith("teacher")


def test_roles_of_equal_values_and_different_classes_have_their_own_source(world: Path, tmp_path: Path) -> None:
    from aced_sdk.training.run import open_inputs

    FrozenConfig.kinds["strong"] = Strong
    BUILT.clear()
    model = str(world / "reference")
    teachers = (aced.Frozen(model=model), Strong(model=model), Strong(model=model, strength=1.0), Strong(model=model))
    config = run_config(world, tmp_path, teacher=teachers)
    inputs = open_inputs(config.replace(reference=aced.Frozen(model=model)))
    assert [type(source) for source in inputs.teachers] == [FrozenModel, StrongModel, StrongModel, StrongModel]
    assert inputs.teachers[1] is inputs.teachers[3]
    assert inputs.reference is inputs.teachers[0]
    assert len(inputs.frozen) == 3
    assert BUILT == [3.0, 1.0]


# Mistakes are found before anything is embedded


@pytest.mark.parametrize(
    ("target", "cause"),
    [
        ("nowhere:Thing", "no module 'nowhere'"),
        ("aced_sdk.nowhere:Thing", "no module 'aced_sdk.nowhere'"),
        (f"{HERE}:Nothing", "has no 'Nothing'"),
        (HERE, "is not 'module:name'"),
        (":Thing", "is not 'module:name'"),
        (None, "has no target"),
        (f"{HERE}:cosine", "is not a class"),
        (f"{HERE}:Bare", "cannot be built from Wrong"),
        (f"{HERE}:Other", "not a Selector|is no source of embeddings"),
    ],
)
@pytest.mark.parametrize("part", ["curation", "reference", "teacher"])
def test_a_wrong_target_is_named_with_its_field(
    world: Path, tmp_path: Path, part: str, target: str | None, cause: str
) -> None:
    if part == "curation":

        class Wrong(Iid):
            method: Literal["wrong"] = "wrong"  # type: ignore[assignment]

        Wrong.target = target  # type: ignore[assignment]
        config = run_config(world, tmp_path / "run", curation=Wrong(sub_batch=8))
    else:

        class WrongSource(aced.Frozen):
            kind: str = "wrong"

        WrongSource.target = target  # type: ignore[assignment]
        config = run_config(world, tmp_path / "run", **{part: WrongSource(model=str(world / "reference"))})
    for call in (aced.plan, aced.distill):
        with pytest.raises(ConfigError, match=cause) as caught:
            call(config)
        assert caught.value.field == part
    assert not (tmp_path / "cache").exists()


class Bare:
    def __init__(self) -> None:
        """Takes no config."""


class Other:
    def __init__(self, config: Any) -> None:
        self.config = config


@pytest.mark.parametrize(
    ("kind", "cause"),
    [
        (LossKind("nowhere:f"), "no module 'nowhere'"),
        (LossKind(f"{HERE}:nothing"), "has no 'nothing'"),
        (LossKind("cosine"), "is not 'module:name'"),
        (LossKind(f"{HERE}:HERE"), "it is not a function"),
        (LossKind(f"{HERE}:cosine", ("chunk",)), r"cannot be called with \(student, teacher, chunk\)"),
        (LossKind(f"{HERE}:per_pair"), r"returns float32 \[8\]"),
        (LossKind(f"{HERE}:number"), "returns float"),
    ],
)
def test_a_wrong_loss_is_named_before_anything_is_embedded(
    world: Path, tmp_path: Path, kind: LossKind, cause: str
) -> None:
    register_loss("mine", kind)
    config = run_config(world, tmp_path / "run", objective=terms("softmax", "mine"))
    for call in (aced.plan, aced.distill):
        with pytest.raises(ConfigError, match=cause) as caught:
            call(config)
        assert caught.value.field == "objective.distillation.1.loss"
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("kind", [f"{HERE}:cosine", LossKind(f"{HERE}:cosine", ("strength",))])
def test_a_wrong_entry_of_the_registry_is_refused(kind: Any) -> None:
    register_loss("mine", kind)
    with pytest.raises(ConfigError, match="'mine' is registered as") as caught:
        terms("mine")
    assert caught.value.field == "loss"


def test_an_objective_without_gradient_is_refused(world: Path, tmp_path: Path) -> None:
    register_loss("mine", LossKind(f"{HERE}:detached"))
    with pytest.raises(ConfigError, match="does not depend on the student") as caught:
        aced.plan(run_config(world, tmp_path / "run", objective=terms("mine", task=0.0)))
    assert caught.value.field == "objective"
    aced.plan(run_config(world, tmp_path / "run", objective=terms("mine")))


def test_an_unknown_name_points_to_the_import_of_a_module() -> None:
    for part in ({"curation": {"method": "mine"}}, {"objective": {"distillation": [{"loss": "mine"}]}}):
        with pytest.raises(ConfigError, match="'mine'") as caught:
            aced.DistillConfig(student={"architecture": "x"}, data={"shards": "x"}, schedule={"steps": 1}, **part)  # type: ignore[arg-type]
        assert "aced --import MODULE" in str(caught.value)
