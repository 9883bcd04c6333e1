# SPDX-License-Identifier: Apache-2.0
"""The distillation loop."""

from aced_sdk.training.loop import train
from aced_sdk.training.parts import Parts
from aced_sdk.training.run import Run, start

__all__ = ["Parts", "Run", "start", "train"]
