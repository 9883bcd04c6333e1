# SPDX-License-Identifier: Apache-2.0
"""Pairs in, super-batches out, with an exact position to resume from."""

from aced_sdk.data.pool import Pool, UnusablePair
from aced_sdk.data.source import Decoding, Prepared, Source, SuperBatch, check_skipped, prepare
from aced_sdk.data.stream import Order, SuperBatches

__all__ = [
    "Decoding",
    "Order",
    "Pool",
    "Prepared",
    "Source",
    "SuperBatch",
    "SuperBatches",
    "UnusablePair",
    "check_skipped",
    "prepare",
]
