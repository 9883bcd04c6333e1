# SPDX-License-Identifier: Apache-2.0
"""The distillation loop."""

from aced_sdk.training.loop import train
from aced_sdk.training.parts import Parts
from aced_sdk.training.run import Run, assemble, open_inputs, train_and_save

__all__ = ["Parts", "Run", "assemble", "open_inputs", "train", "train_and_save"]
