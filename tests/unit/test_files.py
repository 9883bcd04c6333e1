# SPDX-License-Identifier: Apache-2.0
"""Files and folders that appear whole or not at all, and folders held by one process."""

from __future__ import annotations

import errno
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from aced_sdk.errors import ConfigError
from aced_sdk.files import alone, home, memory_limit, whole_file, whole_folder
from aced_sdk.files.writing import _processes


def test_a_folder_takes_the_place_of_an_older_one_whole(tmp_path: Path) -> None:
    target = tmp_path / "made"
    for text in ("one", "two"):
        with whole_folder(target) as temporary:
            (temporary / "file").write_text(text)
            assert not target.exists() or (target / "file").read_text() == "one"
        assert (target / "file").read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_a_broken_write_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "made"
    target.write_text("old")

    def broken_off() -> None:
        with whole_file(target) as temporary:
            temporary.write_text("half")
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        broken_off()
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_what_a_killed_writer_left_is_swept_and_a_living_one_is_spared(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = f"{platform.node()}-{_processes()}"
    left = tmp_path / f".made.{host}{dead.pid}.abc.tmp"
    living = tmp_path / f".made.{host}{os.getpid()}.abc.tmp"
    elsewhere = tmp_path / f".made.another-{dead.pid}.abc.tmp"
    for folder in (left, living, elsewhere):
        folder.mkdir()
    with whole_folder(tmp_path / "made"):
        pass
    assert not left.exists()
    assert living.exists()
    assert elsewhere.exists()


def test_a_folder_is_held_by_one_process_at_a_time(tmp_path: Path) -> None:
    lines = ("import sys", "from pathlib import Path", "from aced_sdk.files import alone")
    code = "\n".join((*lines, "with alone(Path(sys.argv[1]), 'it'): pass"))
    other = [sys.executable, "-c", code, str(tmp_path)]
    with alone(tmp_path, "it"):
        refused = subprocess.run(other, capture_output=True, text=True, check=False)
        with pytest.raises(ConfigError, match="another process works on it"), alone(tmp_path, "it"):
            pass
    assert "another process works on it" in refused.stderr
    assert subprocess.run(other, check=False).returncode == 0


def test_home_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("ACED_HOME", raising=False)
    assert home() == tmp_path / "aced-sdk"
    monkeypatch.setenv("ACED_HOME", str(tmp_path / "own"))
    assert home() == tmp_path / "own"


@pytest.mark.parametrize(("number", "warns"), [(errno.ENOLCK, True), (errno.EOPNOTSUPP, True), (errno.EIO, False)])
def test_a_file_system_without_locks_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, warns: bool
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    if warns:
        with pytest.warns(UserWarning, match="has no locks"), alone(tmp_path, "it"):
            pass
    else:
        with pytest.raises(OSError, match=os.strerror(number)), alone(tmp_path, "it"):
            pass


def test_memory_is_what_a_container_may_take(tmp_path: Path) -> None:
    limit, unlimited, missing = tmp_path / "limit", tmp_path / "unlimited", tmp_path / "missing"
    limit.write_text("1048576\n")
    unlimited.write_text("max\n")
    assert memory_limit([missing, unlimited, limit]) == 2**20
    assert memory_limit([missing, unlimited]) == memory_limit([]) > 2**20
