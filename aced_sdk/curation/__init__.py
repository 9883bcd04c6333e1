# SPDX-License-Identifier: Apache-2.0
"""Selection of the examples to train on: scores, the joint sampler, baselines and statistics."""

from aced_sdk.curation.checks import check_picked
from aced_sdk.curation.joint import gumbel_noise, select_independent, select_joint
from aced_sdk.curation.selectors import Selector, pair_scores, select_random, static_filter
from aced_sdk.curation.statistics import (
    COLLAPSE_REMEDY,
    DrawStatistics,
    DrawSummary,
    even_pool_size,
)
from aced_sdk.towers.embeddings import Embeddings

__all__ = [
    "COLLAPSE_REMEDY",
    "DrawStatistics",
    "DrawSummary",
    "Embeddings",
    "Selector",
    "check_picked",
    "even_pool_size",
    "gumbel_noise",
    "pair_scores",
    "select_independent",
    "select_joint",
    "select_random",
    "static_filter",
]
