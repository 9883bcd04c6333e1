# SPDX-License-Identifier: Apache-2.0
"""Single requests from many threads, run together: one bounded queue and one thread per tower."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from queue import Empty, SimpleQueue
from threading import Lock, Semaphore, Thread
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from aced_sdk.processing.plain.inputs import Picture, at_least_one, read_input_header
from aced_sdk.processing.plain.room import Room
from export.runtime.encoder import Floats, OnnxEncoder
from export.runtime.errors import ClosedError, FolderError, InputError, QueueFullError

_LONGEST_WAIT_MS = 60_000
_BYTES_PER_PIXEL = 16  # of a picture while it is decoded and laid on white


class Batcher:
    """One picture or text at a time in, from any number of threads; batches through the encoder.

    A request is decoded or tokenised in the thread that makes it, so a broken one fails alone and before it is queued;
    what waits are arrays of one size. A waiting picture takes 12 * H * W bytes at the tower's H x W; one that is being
    decoded takes up to 16 bytes for each of its own pixels, of which the encoder allows `max_pixels`.

    Use it as a context manager, or call `close`.

    Args:
        encoder: what embeds.
        max_batch: a batch is run as soon as it has so many requests.
        max_wait_ms: or as soon as its first request has waited so many milliseconds. 0 runs what is there at once:
            batches then form only while the one before them runs.
        queue: at most so many requests of each tower wait or are being decoded; more are refused.
        decoding: at most so many pictures are being decoded, whoever sends them; None is the number of processors.
        max_decoded: bytes of the pictures that are being decoded; more wait, and a larger one is decoded alone.

    Raises:
        InputError: if an option cannot be used.
    """

    def __init__(
        self,
        encoder: OnnxEncoder,
        max_batch: int = 32,
        max_wait_ms: float = 5.0,
        queue: int = 256,
        decoding: int | None = None,
        max_decoded: int = 2**30,
    ) -> None:
        decoding = (os.cpu_count() or 1) if decoding is None else decoding
        at_least_one(max_batch=max_batch, queue=queue, decoding=decoding, max_decoded=max_decoded)
        if not 0 <= max_wait_ms <= _LONGEST_WAIT_MS:
            raise InputError(
                f"max_wait_ms is {max_wait_ms}", remedy=f"give 0 to {_LONGEST_WAIT_MS}", field="max_wait_ms"
            )
        if max_batch > encoder.max_batch:
            raise InputError(
                f"max_batch is {max_batch}, the encoder's is {encoder.max_batch}",
                remedy="give OnnxEncoder a larger max_batch",
                field="max_batch",
            )
        self.encoder = encoder
        # Threads of its own rather than a semaphore: malloc keeps what each thread that ever decoded has freed.
        self._decoders = ThreadPoolExecutor(decoding, "batcher-decoder")

        room = Room(max_decoded)

        def decode(picture: Picture) -> NDArray[Any]:
            header = read_input_header(picture, "images[0]", encoder.max_pixels)
            with room.of(_BYTES_PER_PIXEL * header.width * header.height):
                return encoder.preprocess([header])

        def decoded(picture: Picture) -> NDArray[Any]:
            try:
                work = self._decoders.submit(decode, picture)
            except RuntimeError as error:  # they were shut down
                raise _closed() from error
            return work.result()

        prepare: dict[str, Callable[[Any], NDArray[Any]]] = {
            "vision": decoded,
            "text": lambda text: encoder.tokenize([text]),
        }
        self._lanes = {
            part: _Lane(part, prepare[part], encoder, max_batch, max_wait_ms / 1000, queue) for part in encoder.parts
        }

    def submit_image(self, image: Picture) -> Future[Floats]:
        """A future of the picture's embedding, L2-normalised float32 [D]. It may be cancelled while it waits.

        Raises:
            InputError: if the picture cannot be used.
            QueueFullError: if too many requests wait.
            ClosedError: after `close`.
            FolderError: if no vision graph is loaded.
        """
        return self._lane("vision").submit(image)

    def submit_text(self, text: str) -> Future[Floats]:
        """As `submit_image`, of a text."""
        return self._lane("text").submit(text)

    def encode_image(self, image: Picture) -> Floats:
        """The picture's embedding, L2-normalised float32 [D]; waits for it and raises as `submit_image`."""
        return self.submit_image(image).result()

    def encode_text(self, text: str) -> Floats:
        """As `encode_image`, of a text."""
        return self.submit_text(text).result()

    def close(self) -> None:
        """Take no more requests, finish those that wait, and end the threads. May be called again."""
        for lane in self._lanes.values():
            lane.close()
        self._decoders.shutdown()

    def __enter__(self) -> Batcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _lane(self, part: str) -> _Lane:
        if part not in self._lanes:
            raise FolderError(f"the encoder has no {part} graph", remedy=f"export or load '{part}' too", field="parts")
        return self._lanes[part]


def _closed() -> ClosedError:
    return ClosedError("the batcher is closed", remedy="make a new one")


class _Request(NamedTuple):
    inputs: NDArray[Any]  # [1, ...]
    since: float  # time.monotonic() seconds
    future: Future[Floats]


class _Lane:
    """The queue of one tower and the thread that empties it."""

    def __init__(
        self,
        part: str,
        prepare: Callable[[Any], NDArray[Any]],
        encoder: OnnxEncoder,
        max_batch: int,
        max_wait: float,
        queue: int,
    ) -> None:
        self._part, self._prepare, self._encoder = part, prepare, encoder
        self._max_batch, self._max_wait, self._queue = max_batch, max_wait, queue
        self._places = Semaphore(queue)
        self._requests: SimpleQueue[_Request | None] = SimpleQueue()  # None ends the thread
        self._lock = Lock()
        self._closed = False
        self._thread = Thread(target=self._work, name=f"batcher-{part}", daemon=True)
        self._thread.start()

    def submit(self, item: Any) -> Future[Floats]:
        if not self._places.acquire(blocking=False):
            raise QueueFullError(
                f"{self._queue} {self._part} requests wait already",
                remedy="try again later, or give Batcher a longer queue",
                field="queue",
            )
        try:
            inputs = self._prepare(item)
            with self._lock:  # nothing may come after the None
                if self._closed:
                    raise _closed()
                request = _Request(inputs, time.monotonic(), Future())
                self._requests.put(request)
        except BaseException:
            self._places.release()
            raise
        return request.future

    def close(self) -> None:
        with self._lock:
            if not self._closed:
                self._closed = True
                self._requests.put(None)
        self._thread.join()

    def _work(self) -> None:
        last = False
        while not last:
            batch, last = self._gather()
            self._run([request for request in batch if request.future.set_running_or_notify_cancel()])

    def _gather(self) -> tuple[list[_Request], bool]:
        """The next batch, and whether it is the last."""
        batch: list[_Request] = []
        while len(batch) < self._max_batch:
            left = max(0.0, batch[0].since + self._max_wait - time.monotonic()) if batch else None
            try:
                request = self._requests.get(timeout=left)
            except Empty:
                break
            if request is None:
                return batch, True
            self._places.release()
            batch.append(request)
        return batch, False

    def _run(self, batch: list[_Request]) -> None:
        if not batch:
            return
        try:
            embeddings = self._encoder.embed(self._part, np.concatenate([request.inputs for request in batch]))
        except Exception as error:  # noqa: BLE001 - whatever it is, those who wait must hear of it
            for request in batch:
                request.future.set_exception(error)
            return
        for request, embedding in zip(batch, embeddings, strict=True):
            request.future.set_result(embedding)
