# SPDX-License-Identifier: Apache-2.0
"""The example service on loopback: many clients at once, bad requests, a full queue, a clean end."""

from __future__ import annotations

import http.client
import io
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny import exported

import export

pytest.importorskip("fastapi", reason="needs aced-sdk[service]")
uvicorn = pytest.importorskip("uvicorn", reason="needs aced-sdk[service]")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.mktemp("service"))


@pytest.fixture(scope="module")
def encoder(folder: Path) -> export.OnnxEncoder:
    return export.OnnxEncoder(folder, threads=1)


@contextmanager
def serving(encoder: export.OnnxEncoder, **options: Any) -> Iterator[int]:
    """The port of a service that runs in a thread of this process."""
    from examples.service.app import create_app

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        app = create_app(encoder, **options)
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]})
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        try:
            yield taken.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


def ask(port: int, path: str, body: bytes | None = None) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET" if body is None else "POST", path, body)
    response = connection.getresponse()
    content = json.loads(response.read())
    connection.close()
    return response.status, content


def png(seed: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def test_many_clients_and_broken_ones_among_them(encoder: export.OnnxEncoder) -> None:
    from examples.service.load import load

    bodies = [b"broken" if n % 5 == 4 else png(n) for n in range(40)]
    with serving(encoder, classes=["cat", "dog"], max_batch=8) as port:
        assert ask(port, "/health") == (
            200,
            {"parts": ["vision", "text"], "precision": "fp32", "embedding_dim": 8},
        )
        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(lambda body: ask(port, "/image", body), bodies))
        for body, (status, content) in zip(bodies, answers, strict=True):
            if body == b"broken":
                assert status == 422
                assert "cannot be decoded" in content["error"]
                assert content["remedy"]
            else:
                assert status == 200
                np.testing.assert_allclose(content["embedding"], encoder.encode_image([body])[0], atol=1e-6)
        status, content = ask(port, "/text", "zwei Äpfel".encode())
        np.testing.assert_allclose(content["embedding"], encoder.encode_text(["zwei Äpfel"])[0], atol=1e-6)
        status, content = ask(port, "/classify?top=2", png(0))
        want = export.ZeroShot(encoder, ["cat", "dog"]).classify([png(0)], top=2)[0]
        assert [guess["name"] for guess in content["classes"]] == [guess.name for guess in want]
        figures = load("127.0.0.1", port, png(1), clients=4, requests=30)
        assert (figures["requests"], figures["errors"]) == (30, 0)
        assert 0 < figures["p50_ms"] <= figures["p99_ms"]
        figures = load("127.0.0.1", port, b"broken", clients=3, seconds=0.2)
        assert figures["requests"] == figures["errors"] >= 3
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batcher-")]


def test_bad_requests_get_an_answer(encoder: export.OnnxEncoder) -> None:
    with serving(encoder, max_bytes=5000, max_seconds=0.5) as port:
        for path, body, status, message in (
            ("/image", b"", 422, "cannot be decoded"),
            ("/image", png(0)[:200], 422, "cannot be decoded"),
            ("/image", bytes(5001), 413, "longer than 5000 bytes"),
            ("/text", b"\xff\xfe", 422, "not UTF-8"),
            ("/classify", png(0), 404, "Not Found"),
        ):
            answer = ask(port, path, body)
            assert answer[0] == status
            assert message in answer[1].get("error", answer[1].get("detail"))
            assert answer[1].get("remedy") or status == 404
        slow = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        slow.putrequest("POST", "/image")
        slow.putheader("Content-Length", "100")
        slow.endheaders(b"ten bytes.")
        gone = socket.create_connection(("127.0.0.1", port))
        gone.sendall(b"POST /image HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\nten bytes.")
        gone.close()
        response = slow.getresponse()
        assert response.status == 408
        assert "did not come whole" in json.loads(response.read())["error"]
        slow.close()
        assert ask(port, "/image", png(0))[0] == 200


def test_a_tower_that_is_not_there_is_404(folder: Path) -> None:
    with serving(export.OnnxEncoder(folder, parts=("text",), threads=1)) as port:
        status, content = ask(port, "/image", png(0))
        assert (status, content["error"]) == (404, "the encoder has no vision graph")


def test_a_full_queue_is_503_and_passes(encoder: export.OnnxEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(encoder, max_batch=1, queue=1) as port, ThreadPoolExecutor(8) as pool:
        running, free = threading.Event(), threading.Event()
        embed = encoder.embed

        def slow(part: str, inputs: Any) -> Any:
            running.set()
            assert free.wait(30)
            return embed(part, inputs)

        monkeypatch.setattr(encoder, "embed", slow)
        first = pool.submit(ask, port, "/image", png(0))
        assert running.wait(30)
        others = [pool.submit(ask, port, "/image", png(n)) for n in range(1, 6)]
        while sum(other.done() for other in others) < 4:  # one waits, four are refused
            time.sleep(0.01)
        free.set()
        answers = [future.result(30) for future in (first, *others)]
        assert sorted(status for status, _ in answers) == [200, 200, 503, 503, 503, 503]
        assert all("requests wait already" in content["error"] for status, content in answers if status == 503)
        assert ask(port, "/image", png(0))[0] == 200


def test_a_lost_service_is_counted_and_not_hidden() -> None:
    from examples.service.load import load

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]  # bound, and nobody listens
        assert load("127.0.0.1", port, png(0), clients=2, requests=5)["errors"] == 5
    with pytest.raises(ValueError, match="either requests or seconds"):
        load("127.0.0.1", port, png(0), clients=2)


def test_the_benchmark_of_the_service(folder: Path, root: Path, tmp_path: Path) -> None:
    options = ["--clients", "1", "3", "--seconds", "0.5", "--rounds", "1", "--soak", "25", "--picture", "64", "48"]
    command = [sys.executable, "-m", "benchmarks.service", str(folder), "--threads", "1", *options]
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "out.json")], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    assert json.loads(done.stdout[done.stdout.index("{") :]) == result
    assert [row["clients"] for row in result["load"]] == [1, 3]
    for row in result["load"]:
        for name in ("batched", "one_at_a_time"):
            assert row[name]["errors"] == 0
            assert row[name]["requests"] >= row["clients"]
            assert 0 < row[name]["p50_ms"] <= row[name]["p99_ms"]
    assert (result["soak"]["requests"], result["soak"]["errors"]) == (25, 0)
    assert len(result["soak"]["resident_mib"]) == 11
    assert min(result["soak"]["resident_mib"]) > 20
