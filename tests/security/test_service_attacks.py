# SPDX-License-Identifier: Apache-2.0
"""The example service under attack, on the loopback interface: hostile pictures, held bodies, slow clients."""

from __future__ import annotations

import http.client
import io
import json
import socket
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import export
from tests.security.exports import pristine_export
from tests.security.sandbox import run

pytest.importorskip("fastapi", reason="needs aced-sdk[service]")
pytest.importorskip("uvicorn", reason="needs aced-sdk[service]")

MIB = 2**20
HALF_HEAD = b"POST /image HTTP/1.1\r\nHost: a\r\nX-Slow: "
HALF_BODY = b"POST /image HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\nhalf"


@contextmanager
def serving(encoder: export.OnnxEncoder, server: dict[str, Any] | None = None, **options: Any) -> Iterator[int]:
    """The port of a service that runs in a thread of this process."""
    from examples.service.app import create_app
    from examples.service.server import create_server

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        made = create_server(create_app(encoder, **options), log_level="critical", **(server or {}))
        thread = threading.Thread(target=made.run, kwargs={"sockets": [taken]})
        thread.start()
        while not made.started:
            assert thread.is_alive()
            time.sleep(0.01)
        try:
            yield taken.getsockname()[1]
        finally:
            made.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pristine_export(tmp_path_factory)


@pytest.fixture(scope="module")
def encoder(folder: Path) -> export.OnnxEncoder:
    return export.OnnxEncoder(folder, threads=1)


def ask(port: int, path: str, body: bytes | None = None) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET" if body is None else "POST", path, body)
        response = connection.getresponse()
        return response.status, json.loads(response.read() or b"null")
    finally:
        connection.close()


def hold(stack: ExitStack, port: int, content: bytes) -> socket.socket:
    """A connection that sends this and then nothing."""
    connection = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=30))
    connection.sendall(content)
    return connection


def picture(kind: str = "PNG", size: tuple[int, int] = (20, 18), **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, "red").save(stream, kind, **options)
    return stream.getvalue()


# -- slow clients ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "half", [HALF_HEAD, HALF_BODY, b"", b"\x16\x03\x01"], ids=["heads", "bodies", "nothing", "TLS"]
)
def test_healthy_clients_are_served_while_520_slow_ones_are_held(encoder: export.OnnxEncoder, half: bytes) -> None:
    with serving(encoder) as port, ExitStack() as stack:
        for number in range(520):
            hold(stack, port, half)
            if number % 130 == 0:
                assert ask(port, "/health")[0] == 200
        with ThreadPoolExecutor(8) as pool:
            assert {status for status, _ in pool.map(lambda _: ask(port, "/image", picture()), range(16))} == {200}


def test_healthy_clients_do_not_push_one_another_out(encoder: export.OnnxEncoder) -> None:
    """Old connections go first, also where they have sent more of a request than the new ones."""
    with serving(encoder, {"max_connections": 16}) as port, ExitStack() as stack:
        for _ in range(16):
            hold(stack, port, HALF_BODY)
        time.sleep(0.3)  # all are read
        healthy = [hold(stack, port, b"GET /health HTTP/1.1\r\n") for _ in range(8)]
        time.sleep(0.3)
        for connection in healthy:
            connection.sendall(b"Host: a\r\nConnection: close\r\n\r\n")
            assert b"200 OK" in connection.recv(65536)


def closed_within(connection: socket.socket, seconds: float) -> float:
    """Seconds until the other side closes."""
    begin = time.monotonic()
    connection.settimeout(seconds)
    try:
        while connection.recv(65536):
            pass
    except ConnectionResetError:
        pass
    return time.monotonic() - begin


def test_slow_heads_are_closed_also_those_of_a_second_request(encoder: export.OnnxEncoder) -> None:
    with serving(encoder, {"max_seconds": 0.5}) as port, ExitStack() as stack:
        first = hold(stack, port, HALF_HEAD)
        second = hold(stack, port, b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
        assert b"200 OK" in second.recv(65536)
        second.sendall(HALF_HEAD)
        assert closed_within(first, 5) < 3
        assert closed_within(second, 5) < 3
        dripping = hold(stack, port, HALF_HEAD)
        with pytest.raises(OSError):  # noqa: PT012  a byte every tenth of a second keeps nothing open
            for _ in range(50):
                dripping.sendall(b"a")
                time.sleep(0.1)


def test_slow_bodies_are_given_up(encoder: export.OnnxEncoder) -> None:
    with serving(encoder, {"max_seconds": 0.5}, max_seconds=0.5) as port, ExitStack() as stack:
        whole, chunked = (
            hold(stack, port, HALF_BODY),
            hold(stack, port, b"POST /text HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello"),
        )
        for connection in (whole, chunked):
            assert b"408" in connection.recv(65536)
        unread = hold(stack, port, b"POST /health HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\nhalf")
        assert b"405" in unread.recv(65536)
        unread.sendall(b"a")
        assert closed_within(unread, 10) < 8


def test_clients_that_do_not_read_their_answers_are_closed(encoder: export.OnnxEncoder) -> None:
    request = b"GET /openapi.json HTTP/1.1\r\nHost: a\r\n\r\n"
    with serving(encoder, {"max_seconds": 0.5}) as port, ExitStack() as stack:
        deaf = stack.enter_context(socket.socket())
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.settimeout(20)
        deaf.connect(("127.0.0.1", port))
        with pytest.raises(OSError):  # noqa: PT012  it is closed while it still asks
            for _ in range(150):
                deaf.sendall(request * 200)
                time.sleep(0.1)
        assert ask(port, "/health")[0] == 200


def test_new_connections_are_refused_where_all_are_being_answered(
    encoder: export.OnnxEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, free = threading.Event(), threading.Event()
    embed = encoder.embed

    def slow(part: str, inputs: Any) -> Any:
        running.set()
        assert free.wait(30)
        return embed(part, inputs)

    with serving(encoder, {"max_connections": 2}) as port, ThreadPoolExecutor(2) as pool:
        monkeypatch.setattr(encoder, "embed", slow)
        answers = [pool.submit(ask, port, "/image", picture()) for _ in range(2)]
        assert running.wait(30)
        time.sleep(0.5)  # both are read
        assert ask(port, "/health")[0] == 503
        free.set()
        assert [answer.result(30)[0] for answer in answers] == [200, 200]


# -- bodies ---------------------------------------------------------------------------------------------------------


def _held_bodies(folder: str) -> list[int]:
    """40 clients that send 20 MB but for a byte, and one that is well behaved afterwards."""
    content = bytes(20 * MIB - 1)
    head = f"POST /image HTTP/1.1\r\nHost: a\r\nContent-Length: {20 * MIB}\r\n\r\n".encode()
    statuses = []
    encoder = export.OnnxEncoder(folder, threads=1)
    with serving(encoder, max_bodies=64 * MIB) as port:
        with ExitStack() as stack:
            for _ in range(40):
                connection = hold(stack, port, head)
                with suppress(OSError):  # it may be refused before it has sent all
                    connection.sendall(content)
                connection.settimeout(0.2)
                try:
                    statuses.append(int(connection.recv(65536).split()[1]))
                except OSError:
                    statuses.append(0)  # no answer yet, or it is closed
        time.sleep(0.5)
        statuses.append(ask(port, "/image", picture())[0])
    return statuses


def test_held_bodies_take_bounded_memory(folder: Path) -> None:
    outcome = run(_held_bodies, str(folder), seconds=60, mib=4000)
    *held, healthy = outcome.returned()
    assert healthy == 200
    assert held.count(0) <= 40
    assert 503 in held
    assert outcome.mib < 350


def test_bodies_are_counted_until_their_request_ends(encoder: export.OnnxEncoder) -> None:
    with serving(encoder, max_bodies=100_000, max_bytes=80_000, max_seconds=1.0) as port, ExitStack() as stack:
        for path, body, status in (
            ("/image", bytes(80_001), 413),
            ("/image", b"broken" * 10_000, 422),
            ("/text", b"\xff" * 70_000, 422),
            ("/text", b"a" * 70_000, 422),
        ):
            for _ in range(3):  # nothing of an earlier request is left
                assert ask(port, path, body)[0] == status
        hold(stack, port, b"POST /image HTTP/1.1\r\nHost: a\r\nContent-Length: 80000\r\n\r\n" + bytes(70_000))
        time.sleep(0.3)
        status, content = ask(port, "/image", bytes(60_000))
        assert (status, content["remedy"]) == (503, "try again later")
        assert ask(port, "/image", picture())[0] == 200
        time.sleep(1.2)  # the held one was given up
        assert ask(port, "/image", bytes(60_000))[0] == 422


# -- pictures -------------------------------------------------------------------------------------------------------


def icon(size: int) -> bytes:
    """An ICO with a large PNG, which Pillow decodes when it opens the file."""
    inner = picture(size=(size, size))
    return struct.pack("<3H", 0, 1, 1) + struct.pack("<4B2H2I", 0, 0, 0, 0, 1, 32, len(inner), 22) + inner


def apple_icon(size: int) -> bytes:
    """An ICNS with a large PNG."""
    inner = picture(size=(size, size))
    return b"icns" + struct.pack(">I", 16 + len(inner)) + b"ic10" + struct.pack(">I", 8 + len(inner)) + inner


def postscript(program: bytes) -> bytes:
    return b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n" + program + b"\n%%EOF\n"


def hostile_pictures() -> dict[str, bytes]:
    gif = bytearray(picture("GIF"))
    gif[6:10] = struct.pack("<2H", 60_000, 60_000)
    png = bytearray(picture())
    png[16:24] = struct.pack(">2I", 2**31 - 1, 2**31 - 1)
    bmp = bytearray(picture("BMP"))
    bmp[18:26] = struct.pack("<2i", 2**31 - 1, -(2**31))
    return {
        "ico": icon(5200),
        "icns": apple_icon(5200),
        "eps": postscript(b"(/tmp/owned) (w) file closefile showpage"),
        "a real bomb": picture(size=(5200, 5200)),
        "gif": bytes(gif),
        "png": bytes(png),
        "bmp": bytes(bmp),
        "strip": picture(size=(30_000, 1)),
        "tga": bytes([0, 0, 2, *[0] * 9, 0xFF, 0xFF, 0xFF, 0xFF, 24, 0]),
        "dds": b"DDS " + struct.pack("<I", 124) + b"\xff" * 120,
        "psd": b"8BPS" + struct.pack(">H6xH2IHH", 1, 3, 50_000, 50_000, 8, 3),
        "ppm": b"P6 50000 50000 255\n",
        "xbm": b"#define im_width 50000\n#define im_height 50000\nstatic char im_bits[] = {\n",
        "webp": b"RIFF"
        + struct.pack("<I", 30)
        + b"WEBPVP8X"
        + struct.pack("<I", 10)
        + b"\2\0\0\0"
        + b"\xff" * 6
        + bytes(8),
        "nothing": b"",
    }


def _pictures_at_once(folder: str, pictures: dict[str, bytes]) -> dict[str, int]:
    """Each hostile picture from eight clients at once."""
    statuses: dict[str, int] = {}
    encoder = export.OnnxEncoder(folder, threads=1, max_pixels=25_000_000)
    with serving(encoder) as port, ThreadPoolExecutor(8) as pool:
        for name, content in pictures.items():
            found = {status for status, _ in pool.map(lambda body: ask(port, "/image", body), [content] * 8)}
            (statuses[name],) = found
        statuses["healthy"] = ask(port, "/image", picture())[0]
    return statuses


def test_hostile_pictures(folder: Path) -> None:
    outcome = run(_pictures_at_once, str(folder), hostile_pictures(), seconds=120, mib=8000)
    statuses = outcome.returned()
    assert statuses.pop("healthy") == 200
    assert set(statuses.values()) == {422}, statuses
    assert outcome.mib < 300


def test_no_other_program_is_started_for_a_picture(
    encoder: export.OnnxEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import subprocess

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("a program was started")

    monkeypatch.setattr(subprocess, "Popen", forbidden)
    (tmp_path / "a.png").write_bytes(postscript(b"showpage"))
    for source in (tmp_path / "a.png", postscript(b"showpage"), Image.open(tmp_path / "a.png")):
        with pytest.raises(export.InputError, match="cannot be decoded"):
            encoder.encode_image([source])


def test_pictures_at_paths_that_are_pipes_and_devices(folder: Path, tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", Path("/dev/zero"), tmp_path):
        assert run(_encode, str(folder), str(path), seconds=10).refused("InputError", "cannot be decoded")


def _encode(folder: str, path: str) -> None:
    export.OnnxEncoder(folder, threads=1, parts=("vision",)).encode_image([path])


def test_few_large_pictures_are_decoded_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = export.OnnxEncoder(folder, threads=1)
    lock, sizes, peak = threading.Lock(), [], []
    preprocess = encoder.preprocess

    def watched(images: Any, first: int = 0) -> Any:
        with lock:
            sizes.append(images[0].width)
            peak.append(len(sizes))
        time.sleep(0.05)
        with lock:
            sizes.remove(images[0].width)
        return preprocess(images, first)

    monkeypatch.setattr(encoder, "preprocess", watched)
    large, small = picture(size=(100, 100)), picture(size=(10, 10))
    with export.Batcher(encoder, decoding=8, max_decoded=16 * 100 * 100 * 2) as batcher, ThreadPoolExecutor(8) as pool:
        assert len(list(pool.map(batcher.encode_image, [large] * 8))) == 8
        assert max(peak) == 2
        peak.clear()
        assert len(list(pool.map(batcher.encode_image, [small] * 16))) == 16
        assert max(peak) > 2
        assert batcher.encode_image(picture(size=(400, 400))).shape == (8,)  # larger than all of it: alone


# -- other requests -------------------------------------------------------------------------------------------------


def test_requests_that_make_no_sense(encoder: export.OnnxEncoder) -> None:
    with serving(encoder, classes=["cat", "dog"]) as port, ExitStack() as stack:
        for content, status in (
            (b"\r\n\r\n" * 1000, b"400"),
            (b"GET / HTTP/9.9\r\n\r\n", b""),
            (b"GET /health HTTP/1.1\r\nHost: a\r\n" + b"X: " + b"a" * 2_000_000 + b"\r\n\r\n", b"400"),
            (b"POST /image HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n", b"400"),
            (b"POST /image HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\nTransfer-Encoding: chunked\r\n\r\n", b""),
            (b"POST /image HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\nContent-Length: 5\r\n\r\nabcd", b"400"),
            (b"POST /image HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999999999999\r\n\r\n" + bytes(10), b""),
        ):
            connection = hold(stack, port, content)
            connection.settimeout(1)
            try:
                answer = connection.recv(65536)
            except OSError:
                answer = b""
            assert status in answer[:20], (content[:60], answer[:200])
        for path, status in (
            ("/classify?top=0", 422),
            ("/classify?top=1e9", 422),
            (f"/classify?top={'9' * 5000}", 422),
        ):
            assert ask(port, path, picture())[0] == status
        assert ask(port, "/classify?top=999999999999", picture())[0] == 200
        assert ask(port, "/text", ("&" + "amp;" * 2400).encode())[0] == 200
        assert ask(port, "/text", b"a" * 10_001)[0] == 422
        assert ask(port, "/health")[0] == 200


def test_values_that_are_not_finite_are_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = export.OnnxEncoder(folder, threads=1)
    with serving(encoder) as port:
        monkeypatch.setattr(encoder, "embed", lambda *_: np.full((1, 8), np.nan, np.float32))
        status, content = ask(port, "/image", picture())
    assert status == 500
    assert "not finite" in content["error"]
