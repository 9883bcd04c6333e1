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


def load(host: str, port: int, picture: bytes, clients: int, requests: int) -> dict[str, Any]:
    """Figures of `requests` POSTs to /image, shared among `clients` that each keep one connection."""
    counts = [requests // clients + (n < requests % clients) for n in range(clients)]
    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(lambda count: _client(host, port, picture, count), counts))
    wall = time.perf_counter() - start
    seconds = np.array([second for _, own in answers for second in own])
    return {
        "clients": clients,
        "requests": requests,
        "errors": sum(errors for errors, _ in answers),
        "requests_per_second": round(requests / wall, 1),
        "p50_ms": round(1000 * float(np.percentile(seconds, 50)), 1),
        "p99_ms": round(1000 * float(np.percentile(seconds, 99)), 1),
    }


def _client(host: str, port: int, picture: bytes, count: int) -> tuple[int, list[float]]:
    connection = http.client.HTTPConnection(host, port, timeout=60)
    errors, seconds = 0, []
    for _ in range(count):
        start = time.perf_counter()
        connection.request("POST", "/image", picture)
        response = connection.getresponse()
        response.read()
        seconds.append(time.perf_counter() - start)
        errors += response.status != 200
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
