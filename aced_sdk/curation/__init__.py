# SPDX-License-Identifier: Apache-2.0
"""Which examples of a super-batch are trained on: scores, the joint sampler, baselines, and what a selection tells."""

from aced_sdk.curation.joint import gumbel_noise, select_independent, select_joint
from aced_sdk.curation.selectors import pair_scores, select, select_random, static_filter
from aced_sdk.curation.statistics import (
    COLLAPSE_REMEDY,
    DrawStatistics,
    DrawSummary,
    doubts_of,
    even_pool_size,
    score_quantiles,
)
from aced_sdk.towers.embeddings import Embeddings

__all__ = [
    "COLLAPSE_REMEDY",
    "DrawStatistics",
    "DrawSummary",
    "Embeddings",
    "doubts_of",
    "even_pool_size",
    "gumbel_noise",
    "pair_scores",
    "score_quantiles",
    "select",
    "select_independent",
    "select_joint",
    "select_random",
    "static_filter",
]
