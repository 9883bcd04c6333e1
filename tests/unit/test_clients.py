# SPDX-License-Identifier: Apache-2.0
"""The table of `make clients`, from a client made here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tools.clients.__main__ import CLIENTS, call, table
from tools.clients.environments import Client
from tools.clients.expected import Expectations, difference

SCRIPT = """
import os
import numpy as np
from tools.clients.inside import Check

def ours():
    import aced_sdk

def checks(folder):
    print("a client's own words")
    yield Check("a", "embeddings", "array", lambda: np.array([[1.0, 2.0], [3.0, 4.0]], np.float32))
    yield Check("a", "answers", "list", lambda: ["red", "blue"])
    yield Check("a", "shape", "list", lambda: [1.0])
    yield Check("a", "score", "nan", lambda: float("nan"))
    yield Check("a", "score", "path", lambda: open(folder / "none"))
    yield Check("a", "score", "this project", ours)
    raise ValueError("see https://example.org/x")
"""


def expectations() -> Expectations:
    expected = Expectations()
    expected.add("a", "embeddings", [[1.0, 2.0], [3.0, 4.0 + 1e-7]])
    expected.add("a", "answers", ["red", "green"], 0)
    expected.add("a", "shape", [1.0, 2.0])
    expected.add("a", "score", 0.5)
    return expected


def client(folder: Path, *requirements: str, text: str = SCRIPT) -> Client:
    script = folder / "fake.py"
    script.write_text(text, encoding="utf-8")
    return Client("fake", requirements, ("numpy",), script)


@pytest.fixture(autouse=True)
def _no_registry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    (tmp_path / "artefacts").mkdir()


def run(one: Client, folder: Path) -> list[dict[str, Any]]:
    return call(one, folder / "environments", folder / "artefacts", expectations())


def test_each_check_is_a_row(tmp_path: Path) -> None:
    rows = run(client(tmp_path, "numpy"), tmp_path)
    assert {(row["client"], row["version"]) for row in rows} == {("fake", f"numpy {np.__version__}")}
    assert [(row["compared"], row["how"], row["status"], row["largest_difference"]) for row in rows] == [
        ("embeddings", "array", "ok", 1e-7),
        ("answers", "list", "failed", 1.0),
        ("shape", "list", "failed", None),
        ("score", "nan", "failed", None),
        ("score", "path", "failed", None),
        ("score", "this project", "failed", None),
        ("", "", "failed", None),
    ]
    reasons = [row.get("reason", "") for row in rows]
    assert reasons[4] == "FileNotFoundError: [Errno 2] No such file or directory: 'ARTEFACTS/none'"
    assert "aced_sdk" in reasons[5]
    assert reasons[6] == "ValueError: see ADDRESS"
    assert json.loads(table({"benchmark": "clients"}, rows)) == {"benchmark": "clients", "rows": rows}

    # the environment is made once, and again for other requirements
    made = (tmp_path / "environments/fake/.ready").stat().st_mtime_ns
    (row,) = run(client(tmp_path, "numpy", text="import sys; sys.exit('no licence')"), tmp_path)
    assert (row["status"], row["reason"]) == ("failed", "no result: no licence")
    assert (tmp_path / "environments/fake/.ready").stat().st_mtime_ns == made
    (row,) = run(client(tmp_path, "no-such-client"), tmp_path)
    assert (row["status"], row["version"]) == ("not installable", None)
    assert row["reason"] == "ERROR: No matching distribution found for no-such-client"
    assert not (tmp_path / "environments/fake/.ready").exists()


def test_difference() -> None:
    assert difference([[1, 2.5]], [[1.0, 2.0]]) == 0.5
    assert difference(["a", "b", "c"], ["a", "x", "y"]) == 2
    assert difference(0.25, 0.5) == 0.25
    assert difference("a", "a") == 0
    assert difference([], []) == 0
    for found, expected in (([1.0], [1.0, 2.0]), (1.0, [1.0]), ([1.0], 1.0), (float("nan"), 1.0), ([[1.0]], [1.0])):
        assert difference(found, expected) == float("inf")


def test_every_client_has_its_script() -> None:
    assert len({one.name for one in CLIENTS}) == len(CLIENTS)
    assert all(one.script.is_file() for one in CLIENTS)
