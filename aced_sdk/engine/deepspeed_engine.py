# SPDX-License-Identifier: Apache-2.0
"""The DeepSpeed engine, on GPUs and, for tests and small runs, on a CPU."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aced_sdk.config import Engine as EngineConfig
from aced_sdk.config import Optimizer as OptimizerConfig
from aced_sdk.engine.base import adamw, pick_device, precision, set_learning_rate
from aced_sdk.engine.launch import Launch
from aced_sdk.engine.state import load_weights, save_weights
from aced_sdk.errors import ConfigError, EngineError, MissingPackageError


class DeepSpeed:
    """See `aced_sdk.engine.base.Engine`. Checkpoints of stage 0 are safetensors, of higher stages DeepSpeed's own."""

    def __init__(
        self,
        module: nn.Module,
        config: EngineConfig,
        optimizer: OptimizerConfig,
        launch: Launch,
        factors: dict[str, float] | None = None,
    ) -> None:
        self.rank, self.world_size = launch.rank, launch.world_size
        self.config = config
        self.clip_norm = optimizer.clip_norm
        self.device = pick_device(config, launch.local_rank)
        deepspeed = _import(self.device)
        _join(launch, self.device)
        self.module = module.to(self.device)
        self.optimizer = adamw(self.module, optimizer, factors)
        with _scalars_broadcast(self.module):
            self._engine, *_ = deepspeed.initialize(
                model=self.module,
                optimizer=self.optimizer,
                config=deepspeed_json(config, optimizer),
                dist_init_required=False,
            )

    def forward(self, *inputs: Any) -> Any:
        # DeepSpeed's own forward switches autocast off around the module; stage 3's gathering hooks are on the module.
        with precision(self.config, self.device):
            return self.module(*inputs)

    def backward(self, loss: Tensor, last: bool = True) -> None:
        self._engine.set_gradient_accumulation_boundary(is_boundary=last)
        self._engine.backward(loss)

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

    def save(self, folder: Path) -> None:
        if self.config.zero_stage == 0:
            save_weights(folder, self.module, self.optimizer)
        else:
            self._engine.save_checkpoint(str(folder), tag="deepspeed", save_latest=False)

    def load(self, folder: Path) -> None:
        if self.config.zero_stage == 0:
            load_weights(folder, self.module, self.optimizer)
            return
        path, _ = self._engine.load_checkpoint(str(folder), tag="deepspeed")
        if path is None:
            raise EngineError(
                f"DeepSpeed cannot load {folder}", remedy="resume at the ZeRO stage and world size that saved it"
            )


def _import(device: torch.device) -> Any:
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed reads it once, when it is first imported
    try:
        import deepspeed
    except ImportError as error:
        raise MissingPackageError(
            f"deepspeed cannot be imported: {error}",
            remedy="pip install deepspeed, or set engine.kind to 'single'",
            field="engine.kind",
        ) from error
    deepspeed.utils.logger.setLevel(logging.WARNING)
    return deepspeed


def _join(launch: Launch, device: torch.device) -> None:
    """Join the process group; one process alone needs no address and opens no port."""
    import deepspeed

    if not torch.distributed.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        if launch.world_size == 1:
            store = torch.distributed.HashStore()  # type: ignore[attr-defined]
            torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
        elif "MASTER_ADDR" not in os.environ:
            raise EngineError(
                f"{launch.world_size} processes, and no MASTER_ADDR",
                remedy="launch with deepspeed or torchrun, or export MASTER_ADDR",
            )
        else:
            torch.distributed.init_process_group(backend, rank=launch.rank, world_size=launch.world_size)
    if launch.world_size == 1:
        # It serves ranks that share a machine, and would be compiled for one that is alone.
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


def deepspeed_json(config: EngineConfig, optimizer: OptimizerConfig) -> dict[str, Any]:
    """The DeepSpeed JSON of a run: what the typed fields say, with the user's own JSON laid over it.

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
    given = config.deepspeed
    if isinstance(given, Path):
        try:
            given = json.loads(given.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise ConfigError(
                f"cannot read {config.deepspeed}: {error}", remedy="name a JSON file", field="engine.deepspeed"
            ) from None
    for key, value in (given or {}).items():
        if value == "auto":
            continue
        if key in ("optimizer", "scheduler", "fp16", "bf16", "gradient_accumulation_steps", "gradient_clipping"):
            raise ConfigError(
                f"the DeepSpeed JSON sets '{key}', which the config decides",
                remedy='remove it or write "auto"; use optimizer, schedule and engine.precision',
                field="engine.deepspeed",
            )
        base[key] = base[key] | value if isinstance(base.get(key), dict) and isinstance(value, dict) else value
    return base
