# SPDX-License-Identifier: Apache-2.0
"""What all tests share: no network by accident, one compute thread, long files first."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Tests run beside one another; set before torch is imported anywhere, and inherited by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """End-to-end files first: with two test processes the longest work should not be left for the end."""
    order = {"e2e": 0, "fault": 1, "security": 1, "invariant": 2, "contract": 3, "golden": 4, "unit": 5}
    items.sort(key=lambda item: order.get(item.path.relative_to(ROOT / "tests").parts[0], 6))
