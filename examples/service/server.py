# SPDX-License-Identifier: Apache-2.0
"""uvicorn with bounds on connections: slow ones are closed, and where there are too many, those that wait go first."""

from __future__ import annotations

from asyncio import TimerHandle, Transport
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

_FULL = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
_MAX_CHUNKS, _LEAST_CHUNK = 256, 64  # more chunks than that must have so many bytes on average


class _Connection(h11.Connection):
    """Refuses bodies of many tiny chunks: reading them takes the time of all other requests."""

    _chunks = _bytes = 0

    def next_event(self) -> Any:
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._chunks = self._bytes = 0
        elif isinstance(event, h11.Data):
            self._chunks += event.chunk_end
            self._bytes += len(event.data)
            if self._chunks > _MAX_CHUNKS and self._bytes < self._chunks * _LEAST_CHUNK:
                raise h11.RemoteProtocolError("the body comes in tiny chunks")
        return event


class _Protocol(H11Protocol):
    """One connection. uvicorn closes idle ones; this class also closes those that send or read too slowly."""

    max_connections: int
    max_seconds: float
    _limit: TimerHandle | None = None
    _since = 0.0

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.conn = _Connection(h11.SERVER, self.config.h11_max_incomplete_event_size or 2**14)

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state is h11.DONE:  # it was answered before its body came whole
            self.transport.abort()
        else:
            super().send_400_response(msg)

    @property
    def _waits_for_head(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    @property
    def _waits_for_client(self) -> bool:
        return self._waits_for_head or self.cycle.more_body or self.flow.write_paused

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._since = self.loop.time()
        self._start()
        if len(self.connections) > self.max_connections:
            self._make_room()

    def _make_room(self) -> None:
        """Close the oldest other connection that waits for its client; where all are being answered, this one."""
        others = [one for one in self.connections - {self} if isinstance(one, _Protocol) and one._waits_for_client]
        others = [one for one in others if not one.transport.is_closing()]
        if others:
            min(others, key=lambda one: one._since).transport.abort()
        else:
            self.transport.write(_FULL)
            self.transport.close()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self._waits_for_head:
            self._stop()
        elif self._limit is None:
            self._start()

    def on_response_complete(self) -> None:
        self._since = self.loop.time()
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._start()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def _start(self) -> None:
        self._stop()
        self._limit = self.loop.call_later(self.max_seconds, self.transport.abort)

    def _stop(self) -> None:
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None


def create_server(
    app: FastAPI,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    max_connections: int = 512,
    max_seconds: float = 10.0,
    **options: Any,
) -> uvicorn.Server:
    """A server for the application.

    Args:
        app: what `create_app` gives; it bounds the time of bodies.
        host: address to listen on.
        port: port to listen on.
        max_connections: above, a new connection closes the one that has waited longest for its client. Keep it below
            the limit on open files.
        max_seconds: a connection is closed if a request head, or the reading of an answer, takes longer.
        options: more options of `uvicorn.Config`.
    """
    protocol = type("Protocol", (_Protocol,), {"max_connections": max_connections, "max_seconds": max_seconds})
    return uvicorn.Server(
        uvicorn.Config(app, host=host, port=port, http=protocol, ws="none", access_log=False, **options)
    )
