# SPDX-License-Identifier: Apache-2.0
"""Pairs in, super-batches out, with an exact position to resume from."""

from aced_sdk.data.opening import open_indexes
from aced_sdk.data.order import FullOrder, Order, WindowOrder, build_order, own_lanes
from aced_sdk.data.pool import Pool, UnusablePair
from aced_sdk.data.rowset import RowSet
from aced_sdk.data.source import Decoding, Prepared, Source, SuperBatch, check_skipped, prepare
from aced_sdk.data.stream import SuperBatches

__all__ = [
    "Decoding",
    "FullOrder",
    "Order",
    "Pool",
    "Prepared",
    "RowSet",
    "Source",
    "SuperBatch",
    "SuperBatches",
    "UnusablePair",
    "WindowOrder",
    "build_order",
    "check_skipped",
    "open_indexes",
    "own_lanes",
    "prepare",
]
