# SPDX-License-Identifier: Apache-2.0
"""Pictures that take much time or memory before their pixels are decoded, and many large ones at a time."""

from __future__ import annotations

import io
import struct
import threading
import time
import zlib
from pathlib import Path

import pytest
from PIL import Image

from aced_sdk.config import Data
from aced_sdk.data import Decoding, Pool, source
from aced_sdk.processing.plain import open_picture
from aced_sdk.processing.plain.room import Room
from tests import tiny
from tests.security.sandbox import Outcome, run
from tests.security.test_third_round_data import tar


def png(side: int) -> bytes:
    """An RGBA picture of zeros."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    packer = zlib.compressobj(1)
    rows = b"".join(packer.compress(bytes(1 + 4 * side)) for _ in range(side)) + packer.flush()
    head = struct.pack(">IIBBBBB", side, side, 8, 6, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def tiff(count: int, kind: int = 4, *, big: bool = False) -> bytes:
    """A grey TIFF with so many strips, all at the same place."""
    tags = [(256, 4, 1, 16), (257, 4, 1, 16), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, kind, count, 400),
            (277, 3, 1, 1), (278, 4, 1, 1), (279, 4, 1, 16)]  # fmt: skip
    head = struct.pack("<2sHHHQQ", b"II", 43, 8, 0, 16, len(tags)) if big else struct.pack("<2sHIH", b"II", 42, 8, 9)
    entries = b"".join(struct.pack("<HHQQ" if big else "<HHII", *tag) for tag in tags)
    return (head + entries + bytes(8)).ljust(400, b"\0") + bytes(4 * count)


def gif(extensions: bytes) -> bytes:
    stream = io.BytesIO()
    Image.new("P", (8, 8)).save(stream, "GIF")
    content = stream.getvalue()
    start = content.index(b",\0\0\0\0")
    return content[:start] + extensions + content[start:]


ATTACKS = {
    "TIFF strips": lambda: tiff(3_000_000),
    "TIFF strips as bytes": lambda: tiff(3_000_000, 1),
    "BigTIFF strips": lambda: tiff(1_000_000, big=True),
    "GIF comment": lambda: gif(b"!\xfe" + b"\1a" * 10_000_000 + b"\0"),
    "GIF extensions": lambda: gif(b"!\xfe\0" * 6_000_000),
    "GIF skipped bytes": lambda: gif(b"x" * 20_000_000),
}


def _open(path: Path) -> tuple[int, int]:
    return open_picture(path).size


def opened(folder: Path, content: bytes) -> Outcome:
    (folder / "picture").write_bytes(content)
    return run(_open, folder / "picture", seconds=5, mib=150)


@pytest.mark.parametrize("attack", ATTACKS)
def test_headers_have_bounds(tmp_path: Path, attack: str) -> None:
    outcome = opened(tmp_path, ATTACKS[attack]())
    assert (outcome.kind, "PictureError" in outcome.value) == ("raw", True)
    assert outcome.seconds < 2


@pytest.mark.parametrize(
    "content", [tiff(16), tiff(16, big=True), gif(b"!\xfe" + b"\xffa" * 200 + bytes(256)), gif(b"")]
)
def test_usual_headers_are_read(tmp_path: Path, content: bytes) -> None:
    assert opened(tmp_path, content).returned() in ((16, 16), (8, 8))


def test_large_pictures_are_decoded_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, at_work, most = threading.Lock(), [0], [0]

    def decode(header: Image.Image, *, max_pixels: int) -> Image.Image:
        with lock:
            at_work[0] += 1
            most[0] = max(most[0], at_work[0])
        time.sleep(0.05)
        with lock:
            at_work[0] -= 1
        return Image.new("RGB", (8, 8))

    monkeypatch.setattr(source, "open_picture", decode)
    monkeypatch.setattr(source, "_IN_WORK", Room(2 * 9 * 10**6))
    stream = io.BytesIO()
    Image.new("L", (3000, 3000)).save(stream, "WEBP", quality=1, method=0)
    for name, picture in (("png", png(3000)), ("webp", stream.getvalue())):
        files = [file for k in range(6) for file in ((f"{k}.{name}", picture), (f"{k}.txt", b"a"))]
        (tmp_path / f"{name}.tar").write_bytes(tar(*files))
        decoding = Decoding(Pool([tmp_path / f"{name}.tar"]), tiny.encoder().processor, Data(shards=("x",), workers=8))
        assert None not in decoding.decode(range(6))
        assert most == [2]


def test_large_pictures_wait_for_their_turn() -> None:
    turns, first, second = Room(10**8), threading.Event(), threading.Event()

    def work() -> None:
        with turns.of(6 * 10**7):
            second.set()

    with turns.of(6 * 10**7):
        thread = threading.Thread(target=work)
        thread.start()
        with turns.of(10**6):  # small
            first.set()
        assert first.is_set()
        assert not second.wait(0.1)
    thread.join(5)
    assert second.is_set()
    with turns.of(10**9):  # alone
        pass
