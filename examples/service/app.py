# SPDX-License-Identifier: Apache-2.0
"""The service: encoded pictures and UTF-8 texts come in as request bodies, embeddings and class names go out as JSON.

GET /health, POST /image, POST /text, and POST /classify where classes were named. A bad request is answered with 4xx,
one too many with 503, each with the cause and the remedy. Slow headers are the business of a proxy in front.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import Any

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

    Raises:
        EncoderError: if an option cannot be used.
    """
    batcher = Batcher(encoder, max_batch, max_wait_ms, queue)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        try:
            await run_in_threadpool(encoder.warm_up, (1, max_batch))
            yield
        finally:
            await run_in_threadpool(batcher.close)

    app = FastAPI(title="Embeddings", lifespan=lifespan)

    async def body(request: Request) -> bytes:
        try:
            async with asyncio.timeout(max_seconds):
                return await _body(request, max_bytes)
        except (TimeoutError, ClientDisconnect) as error:
            raise _TooSlow(
                f"the body did not come whole within {max_seconds} s", remedy="send it again", field="body"
            ) from error

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
        embedding = await _embedded(batcher.submit_image, await body(request))
        return JSONResponse({"embedding": embedding.tolist()})

    @app.post("/text")
    async def text(request: Request) -> JSONResponse:
        try:
            words = (await body(request)).decode()
        except UnicodeDecodeError as error:
            raise InputError(f"the text is not UTF-8: {error}", remedy="send UTF-8", field="text") from None
        return JSONResponse({"embedding": (await _embedded(batcher.submit_text, words)).tolist()})

    if classes:
        zero_shot = ZeroShot(encoder, classes)

        @app.post("/classify")
        async def classify(request: Request, top: int = 1) -> JSONResponse:
            embedding = await _embedded(batcher.submit_image, await body(request))
            (guesses,) = zero_shot.guesses(embedding[None], top)
            return JSONResponse({"classes": [guess._asdict() for guess in guesses]})

    return app


async def _embedded(submit: Callable[[Any], Future[Any]], item: bytes | str) -> Any:
    # decoding takes a thread, waiting for the batch takes none
    return await asyncio.wrap_future(await run_in_threadpool(submit, item))


async def _body(request: Request, max_bytes: int) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise _TooLong(f"the body is longer than {max_bytes} bytes", remedy="send a smaller one", field="body")
    return bytes(body)
