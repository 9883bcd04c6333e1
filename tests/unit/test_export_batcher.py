# SPDX-License-Identifier: Apache-2.0
"""The batcher: what is batched, what is refused, who gets which answer, and how it ends."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny import exported

import export


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.mktemp("batcher"))


class Gate(export.OnnxEncoder):
    """An encoder whose graphs run only while the gate is open, and that keeps the sizes of its batches."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, threads=1)
        self.open = threading.Event()
        self.entered = threading.Event()
        self.sizes: list[int] = []
        self.failure: Exception | None = None

    def run(self, part: str, inputs: Any) -> Any:
        self.entered.set()
        assert self.open.wait(30)
        self.sizes.append(len(inputs))
        if self.failure:
            raise self.failure
        return super().run(part, inputs)


@pytest.fixture
def gate(folder: Path) -> Iterator[Gate]:
    encoder = Gate(folder)
    yield encoder
    encoder.open.set()


def noise(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8))


def test_each_thread_gets_its_own_answer(folder: Path) -> None:
    encoder = export.OnnxEncoder(folder, threads=1)
    images, texts = [noise(n) for n in range(60)], [f"text {n}" for n in range(60)]
    want_images, want_texts = encoder.encode_image(images), encoder.encode_text(texts)
    assert np.abs(want_images[1:] - want_images[:1]).max(axis=1).min() > 1e-3  # a mix-up would be seen
    with export.Batcher(encoder, max_batch=7, max_wait_ms=2) as batcher, ThreadPoolExecutor(12) as pool:
        got_texts = pool.map(batcher.encode_text, texts)
        got_images = list(pool.map(batcher.encode_image, images))
        np.testing.assert_allclose(got_images, want_images, atol=1e-6)
        np.testing.assert_allclose(list(got_texts), want_texts, atol=1e-6)


def test_what_waits_is_run_together(gate: Gate) -> None:
    with export.Batcher(gate, max_batch=4, max_wait_ms=0) as batcher:
        futures = [batcher.submit_image(noise(0))]
        assert gate.entered.wait(30)
        futures += [batcher.submit_image(noise(n)) for n in range(1, 10)]
        gate.open.set()
        embeddings = [future.result(30) for future in futures]
    assert gate.sizes == [1, 4, 4, 1]
    np.testing.assert_allclose(embeddings[9], gate.encode_image([noise(9)])[0], atol=1e-6)


def test_the_first_waits_for_company_but_not_for_ever(gate: Gate) -> None:
    gate.open.set()
    with export.Batcher(gate, max_batch=3, max_wait_ms=60_000) as batcher:
        futures = [batcher.submit_text(str(n)) for n in range(3)]
        assert all(future.result(30).shape == (8,) for future in futures)  # full: nobody waits for the minute
    with export.Batcher(gate, max_batch=3, max_wait_ms=20) as batcher:
        assert batcher.submit_text("alone").result(30).shape == (8,)
    assert gate.sizes == [3, 1]


def test_a_full_queue_refuses_and_recovers(gate: Gate) -> None:
    with export.Batcher(gate, max_batch=2, max_wait_ms=0, queue=3) as batcher:
        running = batcher.submit_image(noise(0))
        assert gate.entered.wait(30)
        waiting = [batcher.submit_image(noise(n)) for n in range(3)]
        with pytest.raises(export.QueueFullError, match=r"3 vision requests wait already.*field: queue"):
            batcher.submit_image(noise(4))
        text = batcher.submit_text("the other tower has its own queue")
        gate.open.set()
        assert all(future.result(30).shape == (8,) for future in (running, *waiting, text))
        assert batcher.encode_image(noise(4)).shape == (8,)


def test_a_broken_request_fails_alone_and_takes_no_place(gate: Gate) -> None:
    with export.Batcher(gate, max_batch=8, max_wait_ms=0, queue=2) as batcher:
        running = batcher.submit_image(noise(0))
        assert gate.entered.wait(30)
        for _ in range(5):
            with pytest.raises(export.InputError, match="cannot be decoded"):
                batcher.submit_image(b"no picture")
        waiting = [batcher.submit_image(noise(n)) for n in (1, 2)]
        gate.open.set()
        assert all(np.isfinite(future.result(30)).all() for future in (running, *waiting))


def test_a_failing_graph_is_told_and_the_thread_lives(gate: Gate) -> None:
    gate.open.set()
    with export.Batcher(gate, max_wait_ms=0) as batcher:
        gate.failure = RuntimeError("out of luck")
        with pytest.raises(RuntimeError, match="out of luck"):
            batcher.encode_text("a")
        gate.failure = None
        assert batcher.encode_text("a").shape == (8,)


def test_a_cancelled_request_is_left_out(gate: Gate) -> None:
    with export.Batcher(gate, max_wait_ms=0) as batcher:
        running = batcher.submit_text("a")
        assert gate.entered.wait(30)
        gone, kept = batcher.submit_text("b"), batcher.submit_text("c")
        assert gone.cancel()
        assert not running.cancel()
        gate.open.set()
        np.testing.assert_allclose(kept.result(30), gate.encode_text(["c"])[0], atol=1e-6)
        with pytest.raises(CancelledError):
            gone.result()
    assert gate.sizes[:2] == [1, 1]


def test_closing_finishes_what_waits(gate: Gate) -> None:
    before = threading.active_count()
    batcher = export.Batcher(gate, max_wait_ms=0)
    futures = [batcher.submit_text(str(n)) for n in range(5)]
    closing = threading.Thread(target=batcher.close)
    closing.start()
    gate.open.set()
    closing.join(30)
    assert all(future.done() and future.exception() is None for future in futures)
    with pytest.raises(export.ClosedError, match="closed"):
        batcher.submit_text("late")
    batcher.close()
    assert threading.active_count() == before


def test_close_while_many_submit(folder: Path) -> None:
    """No request is left without an answer: each is embedded, or refused."""
    encoder = export.OnnxEncoder(folder, threads=1)
    batcher = export.Batcher(encoder, max_batch=4, max_wait_ms=1)

    def ask(n: int) -> bool:
        try:
            return batcher.submit_text(str(n)).result(30).shape == (8,)
        except export.ClosedError:
            return False

    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(ask, n) for n in range(400)]
        assert answers[20].result(30)
        batcher.close()
        done = [answer.result(30) for answer in answers]
    assert done[0]
    assert not done[-1]


def test_few_pictures_are_decoded_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = export.OnnxEncoder(folder, parts=("vision",), threads=1)
    preprocess, running, most = encoder.preprocess, [], []

    def slow(images: Any) -> Any:
        running.append(1)
        most.append(len(running))
        time.sleep(0.005)
        running.pop()
        return preprocess(images)

    monkeypatch.setattr(encoder, "preprocess", slow)
    with export.Batcher(encoder, decoding=2) as batcher, ThreadPoolExecutor(12) as pool:
        assert len(list(pool.map(batcher.encode_image, [noise(n) for n in range(24)]))) == 24
    assert max(most) == 2


def test_bad_options(folder: Path) -> None:
    encoder = export.OnnxEncoder(folder, parts=("text",), max_batch=16)
    for options, message in (
        ({"max_batch": 0}, "max_batch is 0"),
        ({"max_batch": 17}, "the encoder's is 16"),
        ({"queue": 0}, "queue is 0"),
        ({"decoding": 0}, "decoding is 0"),
        ({"max_wait_ms": -1}, "max_wait_ms is -1"),
        ({"max_wait_ms": 1e300}, r"max_wait_ms is 1e\+300"),  # no thread can wait for so long
        ({"max_wait_ms": float("nan")}, "max_wait_ms is nan"),
    ):
        with pytest.raises(export.InputError, match=message):
            export.Batcher(encoder, **{"max_batch": 16} | options)  # type: ignore[arg-type]
    with export.Batcher(encoder, max_batch=16) as batcher, pytest.raises(export.FolderError, match="no vision graph"):
        batcher.submit_image(noise(0))


def test_no_torch_in_a_fresh_process(folder: Path) -> None:
    code = (
        "import sys, export\n"
        "encoder = export.OnnxEncoder(sys.argv[1])\n"
        "export.verify_folder(sys.argv[1])\n"
        "export.ZeroShot(encoder, ['a']), export.Search(encoder)\n"
        "with export.Batcher(encoder) as batcher: batcher.encode_text('a')\n"
        "print(sorted({'torch', 'transformers', 'open_clip', 'onnx', 'pydantic'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr
