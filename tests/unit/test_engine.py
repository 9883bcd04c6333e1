# SPDX-License-Identifier: Apache-2.0
"""Steps: every engine takes the same ones, keeps them exactly, and leaves the weights alone where a gradient broke."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aced_sdk.config import Engine as EngineConfig
from aced_sdk.config import Optimizer, Schedule
from aced_sdk.engine import (
    Launch,
    TrainingEngine,
    build_engine,
    checkpoints,
    factor,
    load_checkpoint,
    read_launch,
    save_checkpoint,
    step_of,
    thread_limit,
)
from aced_sdk.engine.base import parameter_groups
from aced_sdk.engine.deepspeed_engine import deepspeed_json
from aced_sdk.engine.state import save_state
from aced_sdk.errors import ConfigError, EngineError, UnsupportedError

OPTIMIZER = Optimizer(learning_rate=1e-2, weight_decay=0.1, clip_norm=0.5)
KINDS = [("single", 0), ("deepspeed", 0), ("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3)]


class Small(nn.Module):
    """Two layers, a scale and a statistic, and a frozen layer."""

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.layers = nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.GELU(), nn.Linear(8, 1))
        self.scale = nn.Parameter(torch.ones(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.layers(self.frozen(x))


def made(kind: str, stage: int, **changes: Any) -> TrainingEngine:
    torch.manual_seed(0)
    config = EngineConfig(kind=kind, zero_stage=stage, device="cpu", **changes)
    return build_engine(Small((1,) if stage == 3 else ()), config, OPTIMIZER)  # stage 3 takes no 0-dim parameters


def data(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(6, 4, generator=generator), torch.randn(6, 1, generator=generator)


def take(engine: TrainingEngine, steps: range, parts: int = 1) -> list[float]:
    norms = []
    for step in steps:
        x, y = data(step)
        for part in range(parts):
            loss = (engine.forward(x[part::parts]) - y[part::parts]).square().mean() / parts
            engine.backward(loss, last=part == parts - 1)
        norms.append(engine.step(1e-2 * (step + 1)))
    return norms


def weights(engine: TrainingEngine) -> dict[str, Tensor]:
    """What is trained; under stage 3 the module itself has stubs of it."""
    return {name: tensor.clone() for name, tensor in engine.weights().items()}


# -- schedule and launch ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Schedule(steps=10, warmup=0.2), {0: 0.5, 1: 1.0, 2: 1.0, 6: 0.5, 9: 0.0380602}),
        (Schedule(steps=10, shape="constant", warmup=0.2, cooldown=0.4), {0: 0.5, 2: 1.0, 6: 1.0, 8: 0.5, 9: 0.25}),
        (Schedule(steps=100, shape="rsqrt", warmup=0.1, cooldown=0.2), {9: 1.0, 40: 0.5, 90: 0.5 / 3}),
        (Schedule(steps=4, shape="constant", warmup=0, cooldown=0), {0: 1.0, 3: 1.0}),
    ],
)
def test_schedule_shapes(schedule: Schedule, expected: dict[int, float]) -> None:
    assert {step: factor(schedule, step) for step in expected} == pytest.approx(expected)
    assert all(0 < factor(schedule, step) <= 1 for step in range(schedule.steps))


ADDRESS = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
SLURM = ADDRESS | {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "4"}
MPI = ADDRESS | {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}
TORCHRUN = ADDRESS | {"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "4"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Launch(0, 0, 1)),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}, Launch(0, 0, 1)),
        (TORCHRUN, Launch(2, 0, 4)),
        (SLURM, Launch(3, 1, 4)),
        (MPI, Launch(1, 0, 2)),
        (MPI | SLURM, Launch(1, 0, 2)),  # mpirun starts its daemons through srun
        (SLURM | {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}, Launch(3, 1, 4)),
        (SLURM | TORCHRUN | {"LOCAL_WORLD_SIZE": "1"}, Launch(2, 0, 4)),  # srun started a torchrun on each node
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, Launch(0, 0, 1)),  # a batch script is no task of a step
        ({"LOCAL_RANK": "0"}, Launch(0, 0, 1)),
    ],
)
def test_a_launch_is_read(environment: dict[str, str], expected: Launch) -> None:
    assert read_launch(environment) == expected
    assert read_launch(environment, local_rank=str(expected.local_rank)) == expected


@pytest.mark.parametrize(
    ("environment", "field", "told"),
    [
        ({"RANK": "x", "WORLD_SIZE": "1"}, "RANK", "not a number"),
        ({"RANK": "0", "WORLD_SIZE": ""}, "WORLD_SIZE", "not a number"),
        ({"RANK": "0"}, "WORLD_SIZE", "RANK is set, and WORLD_SIZE is not"),
        ({"WORLD_SIZE": "2"}, "RANK", "WORLD_SIZE is set, and RANK is not"),
        (TORCHRUN | {"RANK": "4"}, "RANK", "rank 4 is invalid for a world size of 4"),
        (TORCHRUN | {"RANK": "-1"}, "RANK", "rank -1 is invalid"),
        (TORCHRUN | {"LOCAL_RANK": "1"}, "LOCAL_RANK", "--local_rank is 0, and LOCAL_RANK is 1"),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK", "--local_rank is 0, and LOCAL_RANK is 1"),
        (SLURM | {"RANK": "0", "WORLD_SIZE": "1"}, "WORLD_SIZE", "WORLD_SIZE is 1, and SLURM_STEP_NUM_TASKS is 4"),
        (SLURM | TORCHRUN, "RANK", "RANK is 2, and SLURM_PROCID is 3"),
        (MPI | TORCHRUN, "WORLD_SIZE", "WORLD_SIZE is 4, and OMPI_COMM_WORLD_SIZE is 2"),
        (TORCHRUN | {"MASTER_ADDR": ""}, "MASTER_ADDR", "MASTER_ADDR is not set"),
        (TORCHRUN | {"MASTER_ADDR": "tcp://host"}, "MASTER_ADDR", "not a host"),
        (TORCHRUN | {"MASTER_PORT": " "}, "MASTER_PORT", "MASTER_PORT is not set"),
        (TORCHRUN | {"MASTER_PORT": "65536"}, "MASTER_PORT", "not a port"),
        (TORCHRUN | {"MASTER_PORT": "http"}, "MASTER_PORT", "not a port"),
    ],
)
def test_contradictory_launch_variables_are_named(environment: dict[str, str], field: str, told: str) -> None:
    with pytest.raises(EngineError, match=told) as caught:
        read_launch(environment, local_rank="0")
    assert caught.value.field == field


def test_the_plain_engine_refuses_a_world(monkeypatch: pytest.MonkeyPatch) -> None:
    place = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UnsupportedError, match="2 were launched"):
        made("single", 0)


def test_decay_is_for_matrices_and_factors_for_the_longest_prefix() -> None:
    groups = parameter_groups(Small(), OPTIMIZER, {"layers": 0.1, "layers.3": 0.5})
    found = {
        (group["weight_decay"], group["factor"]): sorted(tuple(p.shape) for p in group["params"]) for group in groups
    }
    assert found == {(0.1, 0.1): [(8, 4)], (0.0, 0.1): [(8,)] * 2, (0.1, 0.5): [(1, 8)], (0.0, 0.5): [(1,)],
                     (0.0, 1.0): [()]}  # fmt: skip


def test_a_thread_limit_ends_with_its_block() -> None:
    before = torch.get_num_threads()
    with thread_limit(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


# -- DeepSpeed JSON -----------------------------------------------------------------------------------------------


def test_the_users_deepspeed_json_lies_over_the_typed_fields(tmp_path: Path) -> None:
    zero = {"reduce_bucket_size": 1000, "stage3_param_persistence_threshold": "auto"}
    given = {"zero_optimization": zero, "train_batch_size": "auto", "flops_profiler": {}}
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps(given))
    for value in (given, path):
        result = deepspeed_json(EngineConfig(zero_stage=2, deepspeed=value), OPTIMIZER, 7)
        assert result["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 1000}
        assert result["gradient_clipping"] == 0.5
        assert deepspeed_json(EngineConfig(), OPTIMIZER, 7)["gradient_clipping"] == 0  # the engine clips at stage 0
        assert "train_batch_size" not in result
        assert result["flops_profiler"] == {}
        sharded = [deepspeed_json(EngineConfig(zero_stage=3, deepspeed=given), OPTIMIZER, 7) for given in (value, None)]
        assert [each["zero_optimization"]["reduce_bucket_size"] for each in sharded] == [1000, 7]


@pytest.mark.parametrize("key", ["optimizer", "scheduler", "fp16", "bf16", "gradient_clipping"])
def test_a_deepspeed_json_that_contradicts_the_config_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=f"sets '{key}'") as caught:
        deepspeed_json(EngineConfig(deepspeed={key: {"type": "Adam"}}), OPTIMIZER, 7)
    assert caught.value.field == "engine.deepspeed"
    deepspeed_json(EngineConfig(deepspeed={key: "auto"}), OPTIMIZER, 7)


def test_a_deepspeed_json_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "torn.json").write_text("{")
    for path in (tmp_path / "none.json", tmp_path / "torn.json"):
        with pytest.raises(ConfigError, match="cannot read"):
            deepspeed_json(EngineConfig(deepspeed=path), OPTIMIZER, 7)


# -- steps --------------------------------------------------------------------------------------------------------


def plain_loop(parts: int) -> tuple[dict[str, Tensor], list[float]]:
    """The steps of `take` as torch alone takes them."""
    torch.manual_seed(0)
    module = Small()
    matrices = [p for p in module.parameters() if p.requires_grad and p.ndim >= 2]
    others = [p for p in module.parameters() if p.requires_grad and p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    norms = []
    for step in range(5):
        x, y = data(step)
        for part in range(parts):
            ((module(x[part::parts]) - y[part::parts]).square().mean() / parts).backward()
        norms.append(float(nn.utils.clip_grad_norm_(matrices + others, 0.5)))
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (step + 1)
        optimizer.step()
        optimizer.zero_grad()
    return dict(module.state_dict()), norms


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(("kind", "stage"), KINDS)
def test_every_engine_takes_the_steps_that_torch_takes(kind: str, stage: int, parts: int) -> None:
    expected, norms = plain_loop(parts)
    engine = made(kind, stage)
    start = weights(engine)
    assert take(engine, range(5), parts) == pytest.approx(norms, rel=1e-4)
    engine.release()
    found = engine.module.state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].reshape(tensor.shape), tensor, atol=1e-6, rtol=1e-5, msg=name)
    assert not torch.equal(found["layers.0.weight"], start["layers.0.weight"])
    assert torch.equal(found["frozen.weight"], expected["frozen.weight"])


@pytest.mark.parametrize(("kind", "stage"), KINDS)
def test_a_kept_engine_goes_on_exactly(kind: str, stage: int, tmp_path: Path) -> None:
    engine = made(kind, stage)
    take(engine, range(3))
    save_state(tmp_path, engine.weights(), engine.moments())
    take(engine, range(3, 5))
    again = made(kind, stage)
    take(again, range(7, 8))  # anything else, to be forgotten
    again.load(tmp_path)
    take(again, range(3, 5))
    for name, tensor in weights(engine).items():
        assert torch.equal(weights(again)[name], tensor), name


@pytest.mark.parametrize(("kind", "stage"), KINDS)
def test_a_module_given_back_trains_on_in_another_engine(kind: str, stage: int) -> None:
    found = []
    for each in ((kind, stage), ("single", 0)):
        first = made(*each)
        take(first, range(3))
        first.release()
        second = build_engine(first.module, EngineConfig(kind=each[0], zero_stage=each[1], device="cpu"), OPTIMIZER)
        take(second, range(3, 5))
        second.release()
        found.append(second.module.state_dict())
    for name, tensor in found[1].items():
        torch.testing.assert_close(found[0][name].reshape(tensor.shape), tensor, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("kind", "stage"), KINDS)
def test_a_non_finite_loss_with_a_finite_gradient_changes_nothing(kind: str, stage: int, value: float) -> None:
    engine = made(kind, stage)
    take(engine, range(2))
    before = weights(engine)
    for losses in ((1.0, value), (value, 1.0)):  # of two micro-batches
        x, y = data(9)
        for number, added in enumerate(losses):
            engine.backward((engine.forward(x) - y).square().mean() + added, last=number == 1)
        assert not torch.isfinite(torch.tensor(engine.step(1e-2)))
    for name, tensor in weights(engine).items():
        if "running" not in name and "tracked" not in name:  # the forward pass counts batch statistics
            assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("kind", "stage"), KINDS)
def test_a_gradient_that_is_not_finite_changes_nothing(kind: str, stage: int, value: float) -> None:
    engine, untouched = made(kind, stage), made(kind, stage)
    take(engine, range(2))
    take(untouched, range(2))
    before = weights(engine)
    x, y = data(9)
    engine.backward(((engine.forward(x) - y) * value).sum())
    assert not torch.isfinite(torch.tensor(engine.step(1e-2)))
    for name, tensor in weights(engine).items():
        if "running" not in name and "tracked" not in name:  # the forward pass counts batch statistics
            assert torch.equal(tensor, before[name]), name
    untouched.forward(x)
    take(engine, range(2, 4))
    take(untouched, range(2, 4))
    for name, tensor in weights(engine).items():
        torch.testing.assert_close(tensor, weights(untouched)[name], atol=0, rtol=0, msg=name)


def test_bf16_keeps_float32_weights() -> None:
    engine = made("single", 0, precision="bf16")
    x, _ = data(0)
    out = engine.forward(x).detach()
    assert out.dtype in (torch.bfloat16, torch.float32)
    exact = made("single", 0).forward(x).detach()
    assert 0 < float((out - exact).abs().max()) < 0.1
    assert {p.dtype for p in engine.module.parameters()} == {torch.float32}


# -- checkpoints --------------------------------------------------------------------------------------------------


def test_checkpoints_are_pruned_and_the_newest_is_found(tmp_path: Path) -> None:
    engine = made("single", 0)
    assert checkpoints(tmp_path) == []
    for step in (5, 10, 100):
        take(engine, range(1))
        save_checkpoint(tmp_path, step, engine, {"position": step}, {"t": torch.tensor([step])}, keep=2)
    torn = tmp_path / "checkpoints" / "step-00000200"
    torn.mkdir()
    assert [step_of(path) for path in checkpoints(tmp_path)] == [10, 100]
    state, tensors = load_checkpoint(checkpoints(tmp_path)[-1], made("single", 0))
    assert state == {"step": 100, "position": 100}
    assert torch.equal(tensors["t"], torch.tensor([100]))


@pytest.mark.parametrize("name", ["state.json", "loop.safetensors", "weights.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("damage", ["torn", "gone"])
def test_a_damaged_checkpoint_is_told(tmp_path: Path, name: str, damage: str) -> None:
    engine = made("single", 0)
    take(engine, range(1))
    folder = save_checkpoint(tmp_path, 1, engine, {}, {"t": torch.zeros(1)}, keep=1)
    if damage == "gone":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes((folder / name).read_bytes()[:7])
    with pytest.raises(EngineError, match="cannot be read"):
        load_checkpoint(folder, engine)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    engine = made("single", 0)
    save_state(tmp_path, engine.weights(), engine.moments())
    for other in (nn.Linear(4, 4), Small()):
        if isinstance(other, Small):
            other.layers[3] = nn.Linear(8, 2)
        with pytest.raises(EngineError, match="of another model"):
            build_engine(other, EngineConfig(kind="single", device="cpu"), OPTIMIZER).load(tmp_path)
