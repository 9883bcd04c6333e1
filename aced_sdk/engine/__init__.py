# SPDX-License-Identifier: Apache-2.0
"""Engines, checkpoints and the training loop shared by distillation and vlm tuning."""

from __future__ import annotations

from torch import nn

from aced_sdk.config import Engine as EngineConfig
from aced_sdk.config import Optimizer as OptimizerConfig
from aced_sdk.engine.base import TrainingEngine, pick_device, thread_limit
from aced_sdk.engine.checkpoint import (
    checkpoints,
    load_checkpoint,
    newest_intact,
    read_checkpoint_state,
    save_checkpoint,
    step_of,
)
from aced_sdk.engine.events import Callback, Event
from aced_sdk.engine.launch import Launch, read_launch
from aced_sdk.engine.ranks import Ranks
from aced_sdk.engine.schedule import factor
from aced_sdk.engine.signals import StopSignal, stop_signals
from aced_sdk.engine.stepping import Learned, Step, take_steps
from aced_sdk.engine.writer import Snapshot
from aced_sdk.errors import UnsupportedError


def build_engine(
    module: nn.Module, config: EngineConfig, optimizer: OptimizerConfig, factors: dict[str, float] | None = None
) -> TrainingEngine:
    """Build the engine of a config, with `module` and AdamW over its trainable parameters.

    Args:
        module: the module to train.
        config: kind, precision, ZeRO stage and device.
        optimizer: settings of AdamW.
        factors: prefix of parameter names to factor on the learning rate.

    Raises:
        EngineError: if the launch environment is inconsistent.
        UnsupportedError: for the plain engine with several processes.
    """
    launch = read_launch()
    if config.kind == "deepspeed":
        from aced_sdk.engine.deepspeed_engine import DeepSpeed

        return DeepSpeed(module, config, optimizer, launch, factors)
    if launch.world_size > 1:
        raise UnsupportedError(
            f"the plain engine is for one process, and {launch.world_size} were launched",
            remedy="set engine.kind to 'deepspeed'",
            field="engine.kind",
        )
    from aced_sdk.engine.single import SingleProcess

    return SingleProcess(module, config, optimizer, factors)


__all__ = [
    "Callback",
    "Event",
    "Launch",
    "Learned",
    "Ranks",
    "Snapshot",
    "Step",
    "StopSignal",
    "TrainingEngine",
    "build_engine",
    "checkpoints",
    "factor",
    "load_checkpoint",
    "newest_intact",
    "pick_device",
    "read_checkpoint_state",
    "read_launch",
    "save_checkpoint",
    "step_of",
    "stop_signals",
    "take_steps",
    "thread_limit",
]
