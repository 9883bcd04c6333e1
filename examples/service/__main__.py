# SPDX-License-Identifier: Apache-2.0
"""Usage: python -m examples.service ONNX_FOLDER [--precision int8] [--port 8000] [--classes classnames.txt]."""

from __future__ import annotations

import argparse
from pathlib import Path

import uvicorn

from examples.service.app import create_app
from export import OnnxEncoder


def main() -> None:
    """Serve until interrupted; what was accepted is answered first."""
    parser = argparse.ArgumentParser(prog="python -m examples.service")
    parser.add_argument("folder", type=Path, help="a folder that export.to_onnx wrote")
    parser.add_argument("--precision", default="fp32", help="fp32, fp16 or int8, as exported")
    parser.add_argument("--threads", type=int, help="threads of one batch; onnxruntime's choice if left out")
    parser.add_argument("--max-batch", type=int, default=32)
    parser.add_argument("--max-wait-ms", type=float, default=5.0)
    parser.add_argument("--queue", type=int, default=256, help="requests that may wait; more are answered with 503")
    parser.add_argument("--max-pixels", type=int, default=25_000_000, help="pictures with more are refused")
    parser.add_argument("--classes", type=Path, help="a file with one class name a line, for /classify")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    app = create_app(
        OnnxEncoder(args.folder, args.precision, args.threads, max_pixels=args.max_pixels),
        classes=args.classes.read_text(encoding="utf-8").splitlines() if args.classes else (),
        max_batch=args.max_batch,
        max_wait_ms=args.max_wait_ms,
        queue=args.queue,
    )
    # Bodies are in memory before they are queued: the number of connections bounds them.
    uvicorn.run(app, host=args.host, port=args.port, limit_concurrency=2 * args.queue, access_log=False)


if __name__ == "__main__":
    main()
