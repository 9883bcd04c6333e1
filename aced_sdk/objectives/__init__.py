# SPDX-License-Identifier: Apache-2.0
"""Contrastive and distillation losses over embeddings."""

from aced_sdk.objectives.build import LossTerms, WeightedLosses, build_objective
from aced_sdk.objectives.contrastive import sigmoid_loss, softmax_loss
from aced_sdk.objectives.distillation import feature_matching, interactive, relational, sigmoid_kd, softmax_kd

__all__ = [
    "LossTerms",
    "WeightedLosses",
    "build_objective",
    "feature_matching",
    "interactive",
    "relational",
    "sigmoid_kd",
    "sigmoid_loss",
    "softmax_kd",
    "softmax_loss",
]
