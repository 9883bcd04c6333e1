# SPDX-License-Identifier: Apache-2.0
"""The shared readers and writers of files: pipes, devices, links, bombs, and names that somebody planted."""

from __future__ import annotations

import io
import os
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from aced_sdk.errors import ConfigError
from aced_sdk.files import (
    ReadError,
    alone,
    check_digests,
    check_links,
    expand,
    file_digests,
    inside,
    parse_json,
    parse_yaml,
    printable,
    read_bytes,
    read_json,
    read_lines,
    read_text,
    read_yaml,
    sha256,
    whole_file,
    whole_folder,
)
from aced_sdk.files.writing import _processes
from aced_sdk.processing.plain import PictureError, open_picture
from tests.security.sandbox import run

READERS: tuple[Callable[[Path], object], ...] = (
    read_json,
    read_yaml,
    read_text,
    sha256,
    lambda path: list(read_lines(path)),
    lambda path: read_bytes(path, 100),
)


@pytest.mark.parametrize("number", range(len(READERS)))
@pytest.mark.parametrize("kind", ["fifo", "folder", "missing", "null", "zero", "socket"])
def test_only_regular_files_are_read(tmp_path: Path, number: int, kind: str) -> None:
    path = tmp_path / "file"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        import socket

        socket.socket(socket.AF_UNIX).bind(str(path))
    elif kind != "missing":
        path = Path(f"/dev/{kind}")
    assert run(_read, number, path, seconds=10, mib=256).refused("cannot read")


def _read(number: int, path: Path) -> None:
    READERS[number](path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[" * 100_000 + "]" * 100_000, "nested"),
        ("[" * 65 + "]" * 65, "64 levels"),
        ('{"a":' * 3_000 + "1" + "}" * 3_000, "nested"),
        ("1" * 5_000, "not JSON"),
        ("{", "not JSON"),
        ("", "not JSON"),
        ('{"\x1b[2J": ', "not JSON"),
    ],
)
def test_json_is_bounded(content: str, words: str) -> None:
    with pytest.raises(ReadError, match=words):
        parse_json(content, "file")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a: &a [x]\nb: &b [*a, *a]\nc: [*b, *b]", "anchors"),
        ("a: !!python/object/apply:os.system ['true']", "tags"),
        ("a: !!binary aGk=", "tags"),
        ("[" * 5_000, "levels"),
        ("? " * 20_000, "levels"),
        ("a: " + "9" * 5_000, "digits"),
        ("a: " + ":".join(["1"] * 100_000), "digits"),
        ("[a]: 1\n{b: 1}: 2", "not YAML"),
        ("a: 'x", "not YAML"),
        ("a: \x00", "not YAML"),
    ],
)
def test_yaml_is_plain(content: str, words: str) -> None:
    outcome = run(parse_yaml, content, "file", seconds=10, mib=256)
    assert outcome.refused(words)


def test_yaml_keeps_dates_as_text_and_numbers_as_numbers() -> None:
    assert parse_yaml("a: 2020-01-01\nb: [1, 2.5, 0x10, true, ~]", "file") == {
        "a": "2020-01-01",
        "b": [1, 2.5, 16, True, None],
    }


def test_sizes_are_bounded_before_anything_is_parsed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("wb") as stream:
        stream.truncate(2**40)  # sparse
    for reader in (read_json, read_yaml, read_text):
        assert run(reader, path, seconds=20, mib=512).refused("more than")
    assert run(_lines, path, seconds=20, mib=512).refused("line 1")


def _lines(path: Path) -> int:
    return len(list(read_lines(path)))


def test_text_is_utf8_without_a_mark(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"\xef\xbb\xbfone")
    assert read_text(path) == "one"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ReadError, match="UTF-8"):
        read_text(path)


@pytest.mark.parametrize(
    "name", ["../out", "/etc/passwd", "a/../../out", "link", "folder-link/out", "loop", "", "a\0b"]
)
def test_names_stay_inside_their_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "out").write_text("secret")
    (folder / "link").symlink_to(tmp_path / "out")
    (folder / "folder-link").symlink_to(tmp_path)
    (folder / "loop").symlink_to("loop")
    with pytest.raises(ReadError):
        inside(folder, name)


def test_links_inside_and_into_the_hubs_blobs_are_followed(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs = tmp_path / "models--a--b" / "blobs"
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    (blobs / "f00").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/f00")
    (snapshot / "same.json").symlink_to("config.json")
    assert read_json(inside(snapshot, "config.json")) == {}
    assert inside(snapshot, "same.json") == (blobs / "f00").resolve()
    check_links(snapshot)
    (tmp_path / "models--a--b" / "refs").write_text("x")
    (snapshot / "other").symlink_to("../../refs")
    with pytest.raises(ReadError, match="leads out"):
        check_links(snapshot)


def test_a_folder_with_a_pipe_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    os.mkfifo(tmp_path / "a" / "pipe")
    with pytest.raises(ReadError, match="not a regular file"):
        check_links(tmp_path)


def test_digests_find_what_was_altered_removed_or_added(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("config.json", "sub/tokenizer.json", "README.md", "aced.json"):
        (tmp_path / name).write_text(name)
    digests = file_digests(tmp_path, ["aced.json"])
    assert set(digests) == {"config.json", "sub/tokenizer.json"}
    check_digests(tmp_path, digests, ["aced.json"])
    (tmp_path / "chat_template.jinja").write_text("x")
    with pytest.raises(ReadError, match="was added"):
        check_digests(tmp_path, digests, ["aced.json"])
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "config.json").write_text("other")
    with pytest.raises(ReadError, match="not the file that was saved"):
        check_digests(tmp_path, digests, ["aced.json"])
    (tmp_path / "config.json").unlink()
    with pytest.raises(ReadError, match="cannot read"):
        check_digests(tmp_path, digests, ["aced.json"])
    with pytest.raises(ReadError, match="outside"):
        check_digests(tmp_path, {"../x": "0"})


def test_unknown_users_and_nul_bytes_in_paths_are_named() -> None:
    for path in ("~nosuchuser/x", "a\0b"):
        with pytest.raises(ReadError):
            expand(path)


def test_control_characters_are_escaped() -> None:
    assert printable("a\x1b[2J\rb\u202ec") == "a\\x1b[2J\\rb\\u202ec"
    assert len(printable("x" * 10_000)) == 500


def test_a_planted_temporary_is_not_followed(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("kept")
    (tmp_path / f".made.{os.getpid()}.tmp").symlink_to(secret)
    with whole_file(tmp_path / "made") as temporary:
        assert not temporary.is_symlink()
        temporary.write_text("new")
    assert secret.read_text() == "kept"


def test_links_in_place_of_targets_are_replaced_not_followed(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "file").write_text("kept")
    (tmp_path / "folder").symlink_to(secret)
    (tmp_path / "file").symlink_to(secret / "file")
    with whole_folder(tmp_path / "folder") as temporary:
        (temporary / "file").write_text("new")
    with whole_file(tmp_path / "file") as temporary:
        temporary.write_text("new")
    assert (secret / "file").read_text() == "kept"
    assert not (tmp_path / "folder").is_symlink()
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "file").read_text() == "new"


def test_odd_numbers_in_the_names_of_temporaries_break_nothing(tmp_path: Path) -> None:
    import platform

    for number in ("9" * 30, "²", "-1", "0x1", ""):
        (tmp_path / f".made.{platform.node()}-{_processes()}{number}.abc.tmp").mkdir()
    with whole_folder(tmp_path / "made") as temporary:
        (temporary / "file").write_text("x")
    assert (tmp_path / "made" / "file").is_file()


def test_an_older_folder_that_was_moved_away_by_a_killed_writer_comes_back(tmp_path: Path) -> None:
    import platform
    import subprocess

    dead = subprocess.Popen(["true"])
    dead.wait()
    old = tmp_path / f".made.{platform.node()}-{_processes()}{dead.pid}.abc.old" / "folder"
    old.mkdir(parents=True)
    (old / "file").write_text("old")

    def fail() -> None:
        with whole_folder(tmp_path / "made"):
            raise RuntimeError("no disk")

    with pytest.raises(RuntimeError, match="no disk"):
        fail()
    assert (tmp_path / "made" / "file").read_text() == "old"


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o007])
def test_files_and_folders_follow_the_umask(tmp_path: Path, mask: int) -> None:
    assert run(_modes, tmp_path, mask).returned() == {0o777 & ~mask, 0o666 & ~mask}


def _modes(folder: Path, mask: int) -> set[int]:
    import torch

    from aced_sdk.files import save_tensors, write_json

    os.umask(mask)
    with whole_folder(folder / "made") as temporary:
        save_tensors(temporary / "weights.safetensors", {"a": torch.zeros(2)})
        (temporary / "sub").mkdir()
        os.close(os.open(temporary / "sub" / "file", os.O_CREAT | os.O_WRONLY, 0o600))
    with whole_file(folder / "single") as single:
        save_tensors(single, {"a": torch.zeros(2)})
    write_json(folder / "file.json", {})
    paths = [folder / "made", *(folder / "made").rglob("*"), folder / "single", folder / "file.json"]
    return {path.stat().st_mode & 0o777 for path in paths}


def test_threads_do_not_share_temporaries(tmp_path: Path) -> None:
    failed: list[BaseException] = []

    def write(number: int) -> None:
        try:
            for _ in range(20):
                with whole_file(tmp_path / "made") as temporary:
                    temporary.write_text(str(number))
                with whole_folder(tmp_path / f"folder-{number % 4}") as folder:
                    (folder / "file").write_text(str(number))
        except BaseException as error:  # noqa: BLE001  the main thread looks at them
            failed.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("kind", ["link", "folder", "fifo"])
def test_a_lock_that_is_no_file_is_refused_and_not_touched(tmp_path: Path, kind: str) -> None:
    secret = tmp_path / "secret"
    secret.write_text("kept")
    lock = tmp_path / "run" / ".lock"
    lock.parent.mkdir()
    if kind == "link":
        lock.symlink_to(secret)
    elif kind == "folder":
        lock.mkdir()
    else:
        os.mkfifo(lock)
    with pytest.raises(ConfigError, match="not a regular file"), alone(lock.parent, "it"):
        pass
    assert secret.read_text() == "kept"


def encoded(kind: str, size: tuple[int, int] = (8, 8)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, (9, 99, 199)).save(stream, kind)
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["EPS", "ICO", "ICNS", "DDS", "AVIF", "PPM", "PCX", "TGA", "JPEG2000", "PDF"])
def test_formats_that_are_not_allowed_are_never_opened(kind: str) -> None:
    with pytest.raises(PictureError, match="unreadable"):
        open_picture(encoded(kind, (64, 64)))


def test_a_pil_picture_of_another_format_is_not_decoded() -> None:
    with pytest.raises(PictureError, match="not allowed"):
        open_picture(Image.open(io.BytesIO(encoded("EPS"))))
    decoded = Image.open(io.BytesIO(encoded("PPM")))
    decoded.load()
    assert open_picture(decoded).size == (8, 8)


def png_bomb(width: int, height: int) -> bytes:
    """A PNG whose header claims this size."""
    import zlib

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(1000), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def webp_bomb() -> bytes:
    """A WebP whose canvas claims 16,384 x 16,384 pixels."""
    frame = encoded("WEBP")[12:]
    extended = b"VP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + b"\xff\x3f\x00" * 2
    body = b"WEBP" + extended + frame
    return b"RIFF" + struct.pack("<I", len(body)) + body


BOMBS = {
    "png": png_bomb(2**31 - 1, 2**31 - 1),
    "png of a billion pixels": png_bomb(31_623, 31_623),
    "png without pixels": png_bomb(0, 5),
    "long png": png_bomb(60_000, 1),
    "webp": webp_bomb(),
    "gif": b"GIF89a\xff\xff\xff\xff\x80\0\0\0\0\0\xff\xff\xff,\0\0\0\0\xff\xff\xff\xff\0\x02\x02D\x01\0;",
    "bmp": b"BM" + struct.pack("<IIIIiiHHIIiiII", 60, 0, 54, 40, 30_000, 30_000, 1, 24, 0, 0, 0, 0, 0, 0) + bytes(9),
    "empty": b"",
    "half a png": encoded("PNG", (64, 64))[:60],
    "half a jpeg": encoded("JPEG", (64, 64))[:400],
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_before_they_are_decoded(name: str) -> None:
    outcome = run(_open, BOMBS[name], seconds=10, mib=512)
    assert outcome.returned() == "refused"
    assert outcome.mib < 64


def _open(content: bytes) -> str:
    try:
        open_picture(content)
    except PictureError:
        return "refused"
    return "opened"


def test_mutated_pictures_are_opened_or_refused() -> None:
    outcome = run(_mutate, seconds=60, mib=1024)
    assert outcome.returned() > 100


def _mutate() -> int:
    import random

    numbers = random.Random(0)
    refused = 0
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"):
        whole = encoded(kind, (24, 17))
        for _ in range(100):
            broken = bytearray(whole)
            for _ in range(numbers.randint(1, 8)):
                broken[numbers.randrange(len(broken))] = numbers.randrange(256)
            try:
                open_picture(bytes(broken[: numbers.randint(1, len(broken))]))
            except PictureError:
                refused += 1
    return refused
