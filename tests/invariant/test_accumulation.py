# SPDX-License-Identifier: Apache-2.0
"""Micro-batches give the gradient of the whole batch, for every objective, with dropout and with scores reused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import ARCHITECTURE, distillation, write_world
from torch import Tensor, nn

import aced_sdk as aced
from aced_sdk import towers
from aced_sdk.config import Contrastive, Data, Distillation, DistillConfig, Frozen, Objective
from aced_sdk.curation import Embeddings
from aced_sdk.data import SuperBatch
from aced_sdk.engine.events import Event, StepDone
from aced_sdk.engine.single import SingleProcess
from aced_sdk.errors import ConfigError
from aced_sdk.objectives import build_objective
from aced_sdk.training.parts import Trainee
from aced_sdk.training.step import Gradient, can_accumulate, is_quiet, learn

OBJECTIVES = {
    "sigmoid": Objective(),
    "sigmoid in slabs": Objective(contrastive=Contrastive(chunk=3)),
    "sigmoid positives": Objective(contrastive=Contrastive(repeated="positives", chunk=3)),
    "softmax": Objective(contrastive=Contrastive(loss="softmax")),
    "softmax masked": Objective(contrastive=Contrastive(loss="softmax", repeated="masked", chunk=3)),
    "distillation alone": Objective(contrastive=Contrastive(weight=0), distillation=(Distillation(chunk=2),)),
    "every distillation": Objective(
        distillation=tuple(
            Distillation(loss=loss, weight=0.5, teacher=number % 2)
            for number, loss in enumerate(("softmax", "sigmoid", "feature", "interactive", "relational"))
        )
    ),
    "a second batch": Objective(distillation=(Distillation(batch="iid", weight=2.0), Distillation(loss="feature"))),
}


class Towers(nn.Module):
    """Two small towers in float64 that take pictures of any size."""

    def __init__(self, seed: int, dropout: float = 0.0, normed: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.image = nn.Sequential(
                nn.AdaptiveAvgPool2d(4),
                nn.Flatten(),
                nn.Linear(48, 10),
                nn.BatchNorm1d(10) if normed else nn.Tanh(),
                nn.Dropout(dropout),
                nn.Linear(10, 6),
            ).double()
            self.words = nn.Embedding(20, 8).double()
            self.text = nn.Sequential(nn.Dropout(dropout), nn.Tanh(), nn.Linear(8, 6)).double()
        self.log_scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
        self.bias = nn.Parameter(torch.tensor(-3.0, dtype=torch.float64))

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        image, text = self.image(images.double() / 255), self.text(self.words(tokens).mean(dim=1))
        return F.normalize(image, dim=1), F.normalize(text, dim=1), self.log_scale.exp(), self.bias


def single(module: nn.Module) -> SingleProcess:
    return SingleProcess(module.double(), aced.Engine(kind="single", device="cpu"), aced.Optimizer())


def config(objective: Objective, sub_batch: int, micro_batch: int | None, **curation: Any) -> DistillConfig:
    return DistillConfig(
        student=aced.Student(architecture=ARCHITECTURE),
        data=Data(shards=("pool",)),
        reference=Frozen(model="reference"),
        teacher=(Frozen(model="one"), Frozen(model="two")),
        curation=aced.Joint(**({"sub_batch": sub_batch, "super_batch": sub_batch, "num_chunks": 1} | curation)),
        objective=objective,
        schedule=aced.Schedule(steps=1),
        engine=aced.Engine(kind="single", micro_batch=micro_batch),
        directory=Path("run"),
    )


def batch_of(pairs: int, seed: int) -> tuple[SuperBatch, list[Embeddings]]:
    """Pairs whose captions repeat, and two teachers' embeddings of them."""
    noise = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (pairs, 3, 8, 8), dtype=torch.uint8, generator=noise)
    tokens = torch.randint(0, 20, (max(2, pairs // 2), 3), generator=noise)
    tokens = tokens[torch.randint(0, len(tokens), (pairs,), generator=noise)]
    sides = F.normalize(torch.randn(2, 2, pairs, 6, dtype=torch.float64, generator=noise), dim=-1)
    teachers = [Embeddings(image, text, 15.0, -6.0) for image, text in sides]
    return SuperBatch(images, tokens, torch.arange(pairs)), teachers


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """By name; none at all is zeros."""
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in module.named_parameters()}


def close(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-10, atol=1e-10, msg=lambda text, n=name: f"{n}: {text}")


def learned(
    objective: Objective, sub_batch: int, micro_batch: int | None, seed: int, dropout: float = 0.0, **curation: Any
) -> tuple[Gradient, nn.Module]:
    made = config(objective, sub_batch, micro_batch, **curation)
    module = Towers(seed, dropout).train()
    pairs = sub_batch * (2 if objective.needs_iid_batch else 1)
    torch.manual_seed(seed)
    batch, teachers = batch_of(pairs, seed)
    return learn(made, single(module), build_objective(objective), batch, teachers), module


sizes = st.integers(1, 4).flatmap(lambda k: st.integers(1, 4).map(lambda m: (k * m, m)))


@pytest.mark.parametrize("name", OBJECTIVES)
@settings(max_examples=12, deadline=None)
@given(sizes=sizes, seed=st.integers(0, 2**16))
def test_micro_batches_give_the_gradient_of_the_whole_batch(name: str, sizes: tuple[int, int], seed: int) -> None:
    sub_batch, micro_batch = sizes
    whole, module = learned(OBJECTIVES[name], sub_batch, None, seed)
    small, other = learned(OBJECTIVES[name], sub_batch, micro_batch, seed)
    close(gradients(module), gradients(other))
    assert small.loss == pytest.approx(whole.loss, abs=1e-10)
    assert small.parts == pytest.approx(whole.parts, abs=1e-10)
    assert (small.student.scale, small.student.bias) == (whole.student.scale, whole.student.bias)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_there_is_a_gradient_to_compare(name: str) -> None:
    _, module = learned(OBJECTIVES[name], 8, 2, seed=0)
    weights = {name: gradient for name, gradient in gradients(module).items() if name.endswith("weight")}
    assert all(gradient.abs().max() > 1e-4 for gradient in weights.values())


@pytest.mark.parametrize("name", ["sigmoid positives", "every distillation", "a second batch"])
@pytest.mark.parametrize("size", [None, 4])
def test_dropout_is_the_same_in_both_passes(name: str, size: int | None) -> None:
    objective, seed = OBJECTIVES[name], 3
    curation = {"scoring_size": size, "scoring_fraction": 0.25}
    found, other = learned(objective, 8, 2, seed, dropout=0.4, **curation)
    # The same micro-batches, all graphs kept, one backward pass through all of them.
    module = Towers(seed, 0.4).train()
    pairs = 16 if objective.needs_iid_batch else 8
    torch.manual_seed(seed)
    batch, teachers = batch_of(pairs, seed)
    small = [place for place in range(pairs) if size is not None and place % 8 in (3, 7)]
    full = [place for place in range(pairs) if place not in small]
    places = [part for rows in (full, small) for part in torch.tensor(rows, dtype=torch.int64).split(2) if len(part)]
    outs = []
    for rows in places:
        images = batch.images[rows]
        cheap = size is not None and int(rows[0]) in small
        outs.append(module(towers.shrink(images, 4) if cheap else images, batch.tokens[rows]))
    order = torch.cat(places).argsort()
    image, text = (torch.cat([out[side] for out in outs])[order] for side in (0, 1))
    student = Embeddings(image, text, module.log_scale.exp(), module.bias)
    terms = total(objective, student, teachers, batch.tokens)
    terms.backward()
    close(gradients(module), gradients(other))
    assert found.loss == pytest.approx(terms.item(), abs=1e-10)


def total(objective: Objective, student: Embeddings, teachers: Sequence[Embeddings], tokens: Tensor) -> Tensor:
    built, captions = build_objective(objective), torch.unique(tokens[:8], dim=0, return_inverse=True)[1]
    own, second = torch.arange(8), torch.arange(8, len(student))
    loss = built(student[own], [t[own] for t in teachers], captions=captions).total
    if objective.needs_iid_batch:
        loss = loss + built(student[second], [t[second] for t in teachers], batch="iid").total
    return loss


def test_scores_stand_in_for_the_first_pass() -> None:
    class Counting(Towers):
        forwards = 0

        def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            self.forwards += len(images)
            return super().forward(images, tokens)

    objective = OBJECTIVES["every distillation"]
    batch, teachers = batch_of(8, 0)
    plain, reusing = Counting(0), Counting(0)
    learn(config(objective, 8, 2), single(plain), build_objective(objective), batch, teachers)
    with torch.no_grad():
        image, text, scale, bias = Towers(0)(batch.images, batch.tokens)
    known = Embeddings(image, text, scale.item(), bias.item())
    learn(config(objective, 8, 2), single(reusing), build_objective(objective), batch, teachers, known)
    close(gradients(plain), gradients(reusing))
    assert (plain.forwards, reusing.forwards) == (16, 8)


def test_noise_in_training_is_noticed_and_not_used_up() -> None:
    batch, _ = batch_of(4, 0)
    before = torch.get_rng_state()
    assert is_quiet(single(Towers(0)), batch)
    assert not is_quiet(single(Towers(0, dropout=0.1)), batch)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_loss_that_is_not_finite_brings_no_gradient() -> None:
    for micro_batch in (None, 2):
        batch, teachers = batch_of(8, 0)
        teachers[0] = Embeddings(teachers[0].image * float("nan"), teachers[0].text, 1.0)
        module = Towers(0)
        objective = OBJECTIVES["every distillation"]
        found = learn(config(objective, 8, micro_batch), single(module), build_objective(objective), batch, teachers)
        assert math.isnan(found.loss)
        assert all(p.grad is None for p in module.parameters())


def test_batch_norm_is_refused_with_micro_batches_alone() -> None:
    can_accumulate(config(Objective(), 8, None), Towers(0, normed=True))
    can_accumulate(config(Objective(), 8, 2), Towers(0))
    with pytest.raises(ConfigError, match="1 batch norms") as caught:
        can_accumulate(config(Objective(), 8, 2), Towers(0, normed=True))
    assert caught.value.field == "engine.micro_batch"


# -- whole runs ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


def trained(world: Path, directory: Path, engine: dict[str, Any], **changes: Any) -> tuple[list[StepDone], Tensor]:
    """The steps of a run, and what its student says of a picture and a text: what no gradient reaches may differ."""
    made = distillation(directory, world / "pool", world / "reference", **changes)
    reference = made.reference and made.reference.replace(cache=world / "cache")
    heard: list[Event] = []
    aced.distill(
        made.replace(reference=reference, engine=made.engine.replace(**engine)),
        callbacks=[heard.append],
    )
    student = towers.load(directory / "student")
    pixels = torch.linspace(0, 255, 3 * 16 * 16).to(torch.uint8).view(1, 3, 16, 16)
    said = torch.cat([student.encode_image(pixels), student.encode_text(["red cat boat"])])
    return [event for event in heard if isinstance(event, StepDone)], said


RUNS: dict[str, dict[str, Any]] = {
    "aced": {},
    "easy reference": {"curation": aced.Joint(sub_batch=8, super_batch=16, num_chunks=4, score="easy_reference")},
    "a second batch": {"objective": Objective(distillation=(Distillation(weight=2.0, batch="iid"),))},
    "cheap scoring": {"curation": aced.Joint(sub_batch=8, super_batch=16, num_chunks=4, scoring_size=8)},
    "repeated captions": {"objective": Objective(contrastive=Contrastive(repeated="positives"))},
}


@pytest.mark.parametrize("kind", RUNS)
def test_micro_batches_make_the_student_that_whole_batches_make(world: Path, tmp_path: Path, kind: str) -> None:
    steps, said = trained(world, tmp_path / "whole", {}, **RUNS[kind])
    for micro_batch in (8, 4, 1) if kind == "aced" else (4,):
        others, also = trained(world, tmp_path / str(micro_batch), {"micro_batch": micro_batch}, **RUNS[kind])
        assert [step.loss for step in others] == pytest.approx([step.loss for step in steps], abs=1e-5)
        norms = [step.gradient_norm for step in others]
        assert norms == pytest.approx([step.gradient_norm for step in steps], rel=1e-4)
        torch.testing.assert_close(also, said, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("dropout", "second", "pairs"), [(0.0, False, 6 * 8 + 2), (0.5, False, 6 * 16 + 2), (0.0, True, 6 * 16 + 2)]
)
def test_a_run_reuses_its_scores_where_training_has_no_noise(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dropout: float, second: bool, pairs: int
) -> None:
    seen: list[int] = []
    forward = Trainee.forward
    monkeypatch.setattr(Trainee, "forward", lambda self, x, t: (seen.append(len(x)), forward(self, x, t))[1])
    vision = ARCHITECTURE["vision_cfg"] | {"patch_dropout": dropout}
    student = aced.Student(architecture=ARCHITECTURE | {"vision_cfg": vision})
    objective = RUNS["a second batch"]["objective"] if second else Objective()
    trained(world, tmp_path / "run", {"micro_batch": 4}, student=student, objective=objective)
    assert sum(seen) == pairs  # two of them asked whether there is noise


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_deepspeed_accumulates_as_one_process_does(world: Path, tmp_path: Path, stage: int) -> None:
    steps, said = trained(world, tmp_path / "single", {"micro_batch": 2})
    deepspeed = {"kind": "deepspeed", "zero_stage": stage, "micro_batch": 2}
    others, also = trained(world, tmp_path / "deepspeed", deepspeed)
    assert [step.loss for step in others] == pytest.approx([step.loss for step in steps], abs=1e-5)
    assert [s.gradient_norm for s in others] == pytest.approx([s.gradient_norm for s in steps], rel=1e-4)
    torch.testing.assert_close(also, said, rtol=0, atol=1e-4)


def test_the_second_batch_is_counted_apart(world: Path, tmp_path: Path) -> None:
    steps, _ = trained(world, tmp_path / "run", {}, **RUNS["a second batch"])
    assert [(step.trained, step.scored, step.distilled) for step in steps] == [
        (8 * n, 16 * n, 8 * n) for n in range(1, 7)
    ]
    assert set(steps[0].parts) == {"contrastive", "softmax"}
    plain, _ = trained(world, tmp_path / "plain", {})
    assert plain[-1].distilled == 0
    assert plain[0].parts["softmax"] != steps[0].parts["softmax"]
    assert plain[0].parts["contrastive"] == steps[0].parts["contrastive"]


def test_noise_of_a_run_on_a_gpu_is_restored_on_a_cpu() -> None:
    from aced_sdk.training.progress import noise_state, set_noise_state

    states = noise_state(torch.device("cpu"))
    assert set(states) == {"torch"}
    first = torch.rand(3)
    set_noise_state(states | {"cuda": torch.zeros(16, dtype=torch.uint8)}, torch.device("cpu"))
    assert torch.equal(torch.rand(3), first)
