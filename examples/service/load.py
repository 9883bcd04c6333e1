# SPDX-License-Identifier: Apache-2.0
"""Concurrent requests to the running service; prints one JSON object.

Usage: python -m examples.service.load PICTURE [--port 8000] [--clients 8] [--requests 1000]
"""

from __future__ import annotations

import argparse
import http.client
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np


def load(
    host: str, port: int, picture: bytes, clients: int, requests: int | None = None, seconds: float | None = None
) -> dict[str, Any]:
    """Figures of POSTs to /image by `clients` that each keep one connection and ask again when they are answered.

    Args:
        host: of the service.
        port: of the service.
        picture: the body of every request.
        clients: how many ask at once.
        requests: how many in all, shared among the clients.
        seconds: how long to go on instead.

    Raises:
        ValueError: if neither or both of `requests` and `seconds` are given.
    """
    if (requests is None) == (seconds is None):
        raise ValueError("give either requests or seconds")
    start = time.perf_counter()
    end = float("inf") if seconds is None else start + seconds
    counts: list[float] = [float("inf")] * clients
    if requests is not None:
        counts = [requests // clients + (n < requests % clients) for n in range(clients)]
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(lambda count: _client(host, port, picture, count, end), counts))
    wall = time.perf_counter() - start
    latencies = np.array([second for _, own in answers for second in own])
    return {
        "clients": clients,
        "requests": len(latencies),
        "errors": sum(errors for errors, _ in answers),
        "requests_per_second": round(len(latencies) / wall, 1),
        "p50_ms": round(1000 * float(np.percentile(latencies, 50)), 1),
        "p99_ms": round(1000 * float(np.percentile(latencies, 99)), 1),
    }


def _client(host: str, port: int, picture: bytes, count: float, end: float) -> tuple[int, list[float]]:
    """Errors and seconds of one client's requests; an answer other than 200 and a lost connection are errors."""
    connection = http.client.HTTPConnection(host, port, timeout=60)
    errors = 0
    seconds: list[float] = []
    while len(seconds) < count and (not seconds or time.perf_counter() < end):
        start = time.perf_counter()
        try:
            connection.request("POST", "/image", picture)
            response = connection.getresponse()
            response.read()
            errors += response.status != 200
        except (OSError, http.client.HTTPException):
            errors += 1
            connection.close()  # the next request connects anew
        seconds.append(time.perf_counter() - start)
    connection.close()
    return errors, seconds


def main() -> None:
    """Read the arguments, print the figures."""
    parser = argparse.ArgumentParser(prog="python -m examples.service.load")
    parser.add_argument("picture", type=Path)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, default=1000)
    args = parser.parse_args()
    print(json.dumps(load(args.host, args.port, args.picture.read_bytes(), args.clients, args.requests)))


if __name__ == "__main__":
    main()
