# SPDX-License-Identifier: Apache-2.0
"""The sandbox reports each way in which a call can end."""

from __future__ import annotations

import os
import time

import pytest

from aced_sdk.errors import DataError
from tests.security.sandbox import run


def _named() -> None:
    raise DataError("the cause", remedy="the remedy")


def _hang() -> None:
    time.sleep(60)


def _die() -> None:
    os.abort()


def _fill() -> int:
    return len(bytearray(2**31))


@pytest.mark.parametrize(
    ("function", "kind"),
    [(os.getpid, "returned"), (_named, "named"), (_die, "died"), (_hang, "hung"), (_fill, "raw")],
)
def test_each_way_to_end_is_seen(function: object, kind: str) -> None:
    outcome = run(function, seconds=20 if kind != "hung" else 2)  # type: ignore[arg-type]
    assert outcome.kind == kind, outcome
