# SPDX-License-Identifier: Apache-2.0
"""Which examples of a super-batch are trained on: scores, the joint sampler, baselines, and what a selection tells."""

from aced_sdk.curation.joint import gumbel_noise, select_independent, select_joint
from aced_sdk.curation.selectors import pair_scores, select, select_random, static_filter
from aced_sdk.curation.statistics import DrawStatistics, DrawSummary
from aced_sdk.towers.embeddings import Embeddings

__all__ = [
    "DrawStatistics",
    "DrawSummary",
    "Embeddings",
    "gumbel_noise",
    "pair_scores",
    "select",
    "select_independent",
    "select_joint",
    "select_random",
    "static_filter",
]
