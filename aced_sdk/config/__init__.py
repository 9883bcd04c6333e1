# SPDX-License-Identifier: Apache-2.0
"""The configs: frozen, validated, and readable from YAML. They do not import torch.

Sizes are in examples, lengths in steps (one step trains one sub-batch).
"""

from aced_sdk.config.base import Config
from aced_sdk.config.curation import Curation, Iid, Independent, Joint, LossForm, Score, SelectionLoss, StaticFilter
from aced_sdk.config.engine import Engine, Optimizer, Schedule
from aced_sdk.config.models import Cached, CaptionLines, Data, Frozen, FrozenConfig, Stored, Student
from aced_sdk.config.objective import Contrastive, Distillation, Objective
from aced_sdk.config.run import DistillConfig, Evaluation

__all__ = [
    "Cached",
    "CaptionLines",
    "Config",
    "Contrastive",
    "Curation",
    "Data",
    "DistillConfig",
    "Distillation",
    "Engine",
    "Evaluation",
    "Frozen",
    "FrozenConfig",
    "Iid",
    "Independent",
    "Joint",
    "LossForm",
    "Objective",
    "Optimizer",
    "Schedule",
    "Score",
    "SelectionLoss",
    "StaticFilter",
    "Stored",
    "Student",
]
