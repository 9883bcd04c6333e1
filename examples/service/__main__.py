# SPDX-License-Identifier: Apache-2.0
"""Usage: python -m examples.service ONNX_FOLDER [--precision int8] [--port 8000] [--classes classnames.txt]."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from aced_sdk.errors import AcedError
from aced_sdk.files import read_text
from examples.service.app import create_app
from examples.service.server import create_server
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
    parser.add_argument("--max-bodies-mib", type=int, default=256, help="bodies in memory; more are answered with 503")
    parser.add_argument("--max-decoded-mib", type=int, default=1024, help="pictures being decoded; more wait")
    parser.add_argument("--max-connections", type=int, default=512, help="above, those that wait longest are closed")
    parser.add_argument("--classes", type=Path, help="a file with one class name a line, for /classify")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    try:
        app = create_app(
            OnnxEncoder(args.folder, args.precision, args.threads, max_pixels=args.max_pixels),
            classes=read_text(args.classes).splitlines() if args.classes else (),
            max_batch=args.max_batch,
            max_wait_ms=args.max_wait_ms,
            queue=args.queue,
            max_bodies=args.max_bodies_mib * 2**20,
            max_decoded=args.max_decoded_mib * 2**20,
        )
    except AcedError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    create_server(app, args.host, args.port, max_connections=args.max_connections).run()


if __name__ == "__main__":
    main()
