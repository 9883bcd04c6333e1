# SPDX-License-Identifier: Apache-2.0
"""The service: encoded pictures and UTF-8 texts come in as request bodies, embeddings and class names go out as JSON.

GET /health, POST /image, POST /text, and POST /classify where classes were named. A bad request is answered with 4xx,
one too many with 503, each with the cause and the remedy. `examples.service.server` bounds connections.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from export import Batcher, ClosedError, EncoderError, FolderError, InputError, OnnxEncoder, QueueFullError, ZeroShot


class _TooLong(InputError):
    """A body of too many bytes."""


class _TooSlow(InputError):
    """A body that did not come, or not whole."""


_STATUS: dict[type[EncoderError], int] = {
    InputError: 422, QueueFullError: 503, ClosedError: 503, FolderError: 404, _TooLong: 413, _TooSlow: 408,
}  # fmt: skip


def create_app(
    encoder: OnnxEncoder,
    *,
    classes: Sequence[str] = (),
    max_batch: int = 32,
    max_wait_ms: float = 5.0,
    queue: int = 256,
    max_bytes: int = 20 * 2**20,
    max_seconds: float = 30.0,
    max_bodies: int = 256 * 2**20,
    max_decoded: int = 2**30,
) -> FastAPI:
    """The application around an encoder.

    Args:
        encoder: what embeds.
        classes: names that /classify chooses from; without them it is not there.
        max_batch: as for `export.Batcher`.
        max_wait_ms: as for `export.Batcher`.
        queue: as for `export.Batcher`.
        max_bytes: longer request bodies are refused with 413.
        max_seconds: bodies that take longer to come are given up with 408, for they hold a connection.
        max_bodies: bytes of all bodies in memory; a request that would exceed them is refused with 503.
        max_decoded: as for `export.Batcher`.

    Raises:
        EncoderError: if an option cannot be used.
    """
    batcher = Batcher(encoder, max_batch, max_wait_ms, queue, max_decoded=max_decoded)
    bodies = _Bodies(max_bytes, max_seconds, max_bodies)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        try:
            await run_in_threadpool(encoder.warm_up, (1, max_batch))
            yield
        finally:
            await run_in_threadpool(batcher.close)

    app = FastAPI(title="Embeddings", lifespan=lifespan)

    @app.exception_handler(EncoderError)
    async def refused(_: Request, error: EncoderError) -> JSONResponse:
        status = _STATUS.get(type(error), 500)
        headers = {"Retry-After": "1"} if status == 503 else None
        return JSONResponse({"error": error.cause, "remedy": error.remedy}, status, headers)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"parts": encoder.parts, "precision": encoder.precision, "embedding_dim": encoder.embedding_dim}

    @app.post("/image")
    async def image(request: Request) -> JSONResponse:
        async with bodies.of(request) as body:
            embedding = await _embedded(batcher.submit_image, body)
        return JSONResponse({"embedding": embedding.tolist()})

    @app.post("/text")
    async def text(request: Request) -> JSONResponse:
        async with bodies.of(request) as body:
            try:
                words = body.decode()
            except UnicodeDecodeError as error:
                raise InputError(f"the text is not UTF-8: {error.reason}", remedy="send UTF-8", field="text") from None
            embedding = await _embedded(batcher.submit_text, words)
        return JSONResponse({"embedding": embedding.tolist()})

    if classes:
        zero_shot = ZeroShot(encoder, classes)

        @app.post("/classify")
        async def classify(request: Request, top: int = 1) -> JSONResponse:
            async with bodies.of(request) as body:
                embedding = await _embedded(batcher.submit_image, body)
            (guesses,) = zero_shot.guesses(embedding[None], top)
            return JSONResponse({"classes": [guess._asdict() for guess in guesses]})

    return app


class _Bodies:
    """Reads request bodies, each and all together of bounded size."""

    def __init__(self, max_bytes: int, max_seconds: float, max_total: int) -> None:
        self._max_bytes, self._max_seconds, self._max_total = max_bytes, max_seconds, max_total
        self._total = 0  # bytes of the requests in flight

    @asynccontextmanager
    async def of(self, request: Request) -> AsyncIterator[bytes]:
        """The body of a request, which counts as in memory until the block ends."""
        received = bytearray()
        size = 0
        try:
            try:
                async with asyncio.timeout(self._max_seconds):
                    async for chunk in request.stream():
                        received += chunk
                        size += len(chunk)
                        self._total += len(chunk)
                        self._check(size)
            except (TimeoutError, ClientDisconnect) as error:
                raise _TooSlow(
                    f"the body did not come whole within {self._max_seconds} s", remedy="send it again", field="body"
                ) from error
            body = bytes(received)
            received.clear()
            yield body
        finally:
            self._total -= size

    def _check(self, size: int) -> None:
        if size > self._max_bytes:
            raise _TooLong(
                f"the body is longer than {self._max_bytes} bytes", remedy="send a smaller one", field="body"
            )
        if self._total > self._max_total:
            raise QueueFullError(
                f"the bodies of the requests in flight have {self._max_total} bytes already",
                remedy="try again later",
                field="body",
            )


async def _embedded(submit: Callable[[Any], Future[Any]], item: bytes | str) -> Any:
    # decoding takes a thread, waiting for the batch takes none
    embedding = await asyncio.wrap_future(await run_in_threadpool(submit, item))
    if not np.isfinite(embedding).all():
        raise EncoderError("the graph gives values that are not finite", remedy="take another precision, or fp32")
    return embedding
