# SPDX-License-Identifier: Apache-2.0
"""The DeepSpeed engine, on GPUs and, for tests and small runs, on a CPU."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aced_sdk.config import Engine as EngineConfig
from aced_sdk.config import Optimizer as OptimizerConfig
from aced_sdk.engine.base import adamw, marked, pick_device, precision, set_learning_rate
from aced_sdk.engine.launch import Launch
from aced_sdk.engine.ranks import Ranks, join
from aced_sdk.engine.state import load_weights, optimizer_state, read_state, trainable_state
from aced_sdk.errors import ConfigError, MissingPackageError
from aced_sdk.files import ReadError, printable, read_json
from aced_sdk.files.reading import MIB

_MOMENTS = ("exp_avg", "exp_avg_sq")
# What the config's own fields decide; torch_autocast also imports any module that the JSON names.
_DECIDED = (
    *("optimizer", "scheduler", "fp16", "bf16", "torch_autocast"),
    *("gradient_accumulation_steps", "gradient_clipping"),
)
_IN_ITS_FORWARD = ("flops_profiler", "autotuning")  # they measure DeepSpeed's own forward pass, which is not called
_BUCKET = 500_000_000  # DeepSpeed's own choice, in parameters
# what DeepSpeed's stage 3 hangs on modules; the next engine around them would call the functions of the last one
_LEFT_BEHIND = (
    "_external_params",
    "_original_parameters",
    "all_parameters",
    "applied_pre_backward_ref_cnt",
    "ds_external_parameters",
    "ds_grads_remaining",
    "ds_id",
    "ds_inflight_param_registry",
    "ds_recompute_parameters",
    "post_bwd_fn",
    "pre_bwd_fn",
)


class DeepSpeed:
    """See `aced_sdk.engine.base.TrainingEngine`. Needs a launch's processes to see one file system."""

    def __init__(
        self,
        module: nn.Module,
        config: EngineConfig,
        optimizer: OptimizerConfig,
        launch: Launch,
        factors: dict[str, float] | None = None,
    ) -> None:
        self.config = config
        self.clip_norm = optimizer.clip_norm
        self.device = pick_device(config, launch.local_rank)
        deepspeed = _import(self.device)
        _join(launch, self.device, config.timeout_seconds)
        self.ranks = Ranks(launch, self.device)
        self.module = module.to(self.device)
        self.optimizer = adamw(self.module, optimizer, factors)
        self._trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        values = deepspeed_json(config, optimizer, sum(parameter.numel() for parameter in self._trained))
        try:
            with _scalars_broadcast(self.module):
                self._engine, *_ = deepspeed.initialize(
                    model=self.module, optimizer=self.optimizer, config=values, dist_init_required=False
                )
        except Exception as error:  # DeepSpeed checks its JSON with errors of many kinds
            if config.deepspeed is None:
                raise
            raise ConfigError(
                f"DeepSpeed does not start with this JSON: {type(error).__name__}: {printable(error)}",
                remedy="correct it, or leave it out",
                field="engine.deepspeed",
            ) from error

    def forward(self, *inputs: Any) -> Any:
        # DeepSpeed's own forward switches autocast off around the module; stage 3's gathering hooks are on the module.
        # What else it does is to count the micro-batches: without, stage 3 keeps the last one's gradient alone.
        if self.config.zero_stage:
            self._engine.optimizer.clear_backward_seen_flag()
        with precision(self.config, self.device):
            return self.module(*inputs)

    def backward(self, loss: Tensor, last: bool = True) -> None:
        self._engine.set_gradient_accumulation_boundary(is_boundary=last)
        self._engine.backward(marked(loss))

    def step(self, learning_rate: float) -> float:
        norm = None
        if self.config.zero_stage == 0:  # higher stages keep no gradients on the parameters; DeepSpeed clips and tells
            norm = float(torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.clip_norm))
            if not math.isfinite(norm):
                self.module.zero_grad(set_to_none=True)
                return norm
        set_learning_rate(self._engine.optimizer, learning_rate)
        self._engine.step()
        return float(self._engine.get_global_grad_norm()) if norm is None else norm

    def weights(self) -> dict[str, Tensor]:
        kept: dict[str, Tensor] = {}
        state = self.module.state_dict()  # stage 3 leaves stubs of the parameters there
        names = set()
        for name, parameter in self.module.named_parameters(remove_duplicate=False):
            names.add(name)
            if parameter.requires_grad:
                with self._whole(parameter):
                    kept[name] = self._mine(parameter.detach())
        kept |= {name: self._mine(tensor) for name, tensor in state.items() if name not in names}
        return kept if self.ranks.rank == 0 else {}

    def moments(self) -> dict[str, Tensor]:
        if self.config.zero_stage == 0:
            return optimizer_state(self.optimizer) if self.ranks.rank == 0 else {}
        from deepspeed.utils import safe_get_full_optimizer_state

        first = self._engine.optimizer.optimizer.state.get(self._flat_groups()[0])
        if not first:  # no step was taken
            return {}
        self._link_moments()
        kept = {}
        for index, parameter in enumerate(self._trained):
            for key in _MOMENTS:
                kept[f"{index}.{key}"] = self._mine(safe_get_full_optimizer_state(parameter, key))
            kept[f"{index}.step"] = first["step"].cpu().clone()
        return kept if self.ranks.rank == 0 else {}

    def load(self, folder: Path) -> None:
        if self.config.zero_stage == 0:
            self.ranks.together(lambda: load_weights(folder, self.module, self.optimizer))
            return
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        own = trainable_state(self.module)
        shapes, types = ({name: getattr(t, of) for name, t in own.items()} for of in ("shape", "dtype"))
        parameters = {name: p for name, p in self.module.named_parameters(remove_duplicate=False) if p.requires_grad}
        shapes |= {name: getattr(p, "ds_shape", p.shape) for name, p in parameters.items()}
        trained = [getattr(p, "ds_shape", p.shape) for p in self._trained]
        weights, state = self.ranks.together(lambda: read_state(folder, shapes, trained, types))
        self.module.load_state_dict({n: t for n, t in weights.items() if n not in parameters}, strict=False)
        for name, parameter in parameters.items():
            value = weights[name].to(self.device)
            with self._whole(parameter, change=True):
                parameter.data.copy_(value)
            safe_set_full_fp32_param(parameter, value)
        self._start_moments(state)
        for index, values in state.items():
            for key in _MOMENTS:
                safe_set_full_optimizer_state(self._trained[index], values[key].to(self.device), key)

    def release(self) -> None:
        """Put parameters of the same values, of which DeepSpeed knows nothing, into the place of its own."""
        plain: dict[int, nn.Parameter] = {}
        held = [p for p in self.module.parameters() if p.requires_grad or hasattr(p, "ds_id")]
        for parameter in held:
            with self._whole(parameter):
                plain[id(parameter)] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
        self._engine.destroy()
        for parameter in held:  # caches of DeepSpeed hold the parameters on, but not with this process's shares of them
            parameter.__dict__.pop("ds_tensor", None)
        for part in self.module.modules():
            for name in _LEFT_BEHIND:
                part.__dict__.pop(name, None)
            part._parameters = {name: p if p is None else plain.get(id(p), p) for name, p in part._parameters.items()}

    def _mine(self, tensor: Tensor) -> Tensor:
        """A copy on the CPU, in rank 0 alone."""
        return tensor.detach().to("cpu", copy=True).contiguous() if self.ranks.rank == 0 else torch.empty(0)

    def _whole(self, parameter: nn.Parameter, change: bool = False) -> AbstractContextManager[Any]:
        """A parameter gathered from all processes for the length of a block; `change` takes over rank 0's values."""
        if self.config.zero_stage < 3 or not hasattr(parameter, "ds_id"):
            return nullcontext()
        import deepspeed

        gathered: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(
            [parameter], modifier_rank=0 if change else None
        )
        return gathered

    def _flat_groups(self) -> list[Tensor]:
        """This process's share of all trained weights, as DeepSpeed gives it to AdamW."""
        zero = self._engine.optimizer
        flat: list[Tensor] = (
            zero.fp32_partitioned_groups_flat if self.config.zero_stage == 3 else zero.single_partition_of_fp32_groups
        )
        return flat

    def _start_moments(self, state: dict[int, dict[str, Tensor]]) -> None:
        """Make AdamW's state where no step has made it yet: `state` is then set into it."""
        zero = self._engine.optimizer
        zero.optimizer.state.clear()
        for flat in self._flat_groups() if state else ():
            moments = {key: torch.zeros_like(flat) for key in _MOMENTS}
            zero.optimizer.state[flat] = {"step": state[0]["step"].clone()} | moments
        if state:
            self._link_moments()

    def _link_moments(self) -> None:
        """Link AdamW's state to parameters. DeepSpeed itself does so only if the first group has a state."""
        if self.config.zero_stage < 3:
            self._engine.optimizer._hp_optimizer_states_linked = False
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()


def _import(device: torch.device) -> Any:
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed reads it once, when it is first imported
    if device.type == "cpu" and (given := os.environ["DS_ACCELERATOR"]) != "cpu":
        cause = f"DS_ACCELERATOR is {printable(given, 80)}, and the engine's device is the CPU"
        raise ConfigError(cause, remedy="unset DS_ACCELERATOR", field="engine.device")
    try:
        import deepspeed
    except ValueError as error:  # another DS_ACCELERATOR that it does not know
        cause = f"deepspeed cannot be imported: {printable(error)}"
        raise ConfigError(cause, remedy="unset DS_ACCELERATOR", field="engine.kind") from error
    except ImportError as error:
        raise MissingPackageError(
            f"deepspeed cannot be imported: {error}",
            remedy="pip install deepspeed, or set engine.kind to 'single'",
            field="engine.kind",
        ) from error
    deepspeed.utils.logger.setLevel(logging.WARNING)
    return deepspeed


def _join(launch: Launch, device: torch.device, timeout_seconds: float) -> None:
    """Join the process group, and tell DeepSpeed of it."""
    import deepspeed

    join(launch, device, timeout_seconds)
    # It only speeds up exchanges of CPUs on one machine, and every first start would wait for a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ.setdefault("LOCAL_RANK", str(launch.local_rank))  # deepspeed.initialize insists on it
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)


@contextmanager
def _scalars_broadcast(module: nn.Module) -> Iterator[None]:
    """Rank 0's 0-dim parameters (CLIP's scale and bias) to all ranks: DeepSpeed's own broadcast fails over them.

    For the length of the block they carry the mark by which DeepSpeed knows parameters that it must not broadcast.
    """
    scalars = [parameter for parameter in module.parameters() if parameter.ndim == 0]
    for parameter in scalars:
        torch.distributed.broadcast(parameter.data, 0)
        parameter.ds_optim_param = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for parameter in scalars:
            del parameter.ds_optim_param  # type: ignore[attr-defined]


def deepspeed_json(config: EngineConfig, optimizer: OptimizerConfig, trained: int) -> dict[str, Any]:
    """The DeepSpeed JSON of a run: what the typed fields say, with the user's own JSON laid over it.

    Args:
        config: ZeRO stage and the user's JSON.
        optimizer: its clipping.
        trained: how many parameters are trained.

    Raises:
        ConfigError: if the user's file cannot be read or sets what the typed fields decide.
    """
    base: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # batches are counted by the loop; DeepSpeed only wants the field
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optimizer.clip_norm if config.zero_stage else 0.0,  # at stage 0 the engine clips itself
        "zero_optimization": {"stage": config.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    if config.zero_stage == 3:  # it allocates a bucket at the start, of 2 GB if nothing is said
        base["zero_optimization"]["reduce_bucket_size"] = min(trained, _BUCKET)
    given = config.deepspeed
    if isinstance(given, Path):
        try:
            given = read_json(given, MIB)
        except ReadError as error:
            raise ConfigError(
                f"cannot read {printable(given)}: {error.cause}", remedy="name a JSON file", field="engine.deepspeed"
            ) from None
    if not isinstance(given, dict | None):
        raise ConfigError(
            f"{printable(config.deepspeed)} holds no object", remedy="name a JSON file", field="engine.deepspeed"
        )
    for key, value in (given or {}).items():
        if value == "auto":
            continue
        if key in _DECIDED:
            raise ConfigError(
                f"the DeepSpeed JSON sets '{key}', which the config decides",
                remedy='remove it or write "auto"; use optimizer, schedule and engine.precision',
                field="engine.deepspeed",
            )
        if key in base and (type(value) is not type(base[key]) or (key == "steps_per_print" and value < 1)):
            kind = {int: "a number above 0", bool: "true or false", float: "a number"}.get(type(base[key]), "an object")
            raise ConfigError(
                f"'{key}' in the DeepSpeed JSON is {printable(repr(value), 80)}",
                remedy=f"write {kind}, or remove it",
                field="engine.deepspeed",
            )
        if key == "zero_optimization" and value.get("stage", "auto") not in ("auto", config.zero_stage):
            raise ConfigError(
                f"the DeepSpeed JSON sets stage {printable(repr(value['stage']), 80)} of ZeRO, "
                f"and engine.zero_stage is {config.zero_stage}",
                remedy="remove it, and set engine.zero_stage",
                field="engine.deepspeed",
            )
        if key in _IN_ITS_FORWARD and isinstance(value, dict) and value.get("enabled") not in (None, False, "auto"):
            raise ConfigError(
                f"the DeepSpeed JSON sets '{key}', which measures a forward pass that is not taken here",
                remedy="remove it; aced.plan counts the model's MACs",
                field="engine.deepspeed",
            )
        if isinstance(value, dict):
            before = base.get(key)
            value = {name: inner for name, inner in value.items() if inner != "auto"}
            value = before | value if isinstance(before, dict) else value
        base[key] = value
    return base
