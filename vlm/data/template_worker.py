# SPDX-License-Identifier: Apache-2.0
"""The process in which `vlm.data.templates` renders foreign chat templates; it imports neither torch nor vlm."""

from __future__ import annotations

import json
import resource
import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path

from transformers.utils.chat_template_utils import render_jinja_template

_MEMORY = 256 * 2**20  # bytes beyond what Python, jinja2 and transformers take


def main(pipe: Connection, seconds: float) -> None:
    """Answer requests until the other end is closed.

    Args:
        pipe: to the process that asks.
        seconds: of processor time for one conversation; then the kernel ends this process.
    """
    if (pages := Path("/proc/self/statm")).is_file():
        most = int(pages.read_text().split()[0]) * resource.getpagesize() + _MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while True:
        try:
            request = json.loads(pipe.recv_bytes())
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            texts, spans = render_jinja_template(**request)
            answer = {"text": texts[0], "learned": spans[0] if spans else []}
        except Exception as error:  # noqa: BLE001  a template can raise anything; the caller names it
            answer = {"error": str(error)[:1000] or type(error).__name__}
        pipe.send_bytes(json.dumps(answer).encode())
        signal.setitimer(signal.ITIMER_PROF, 0)


if __name__ == "__main__":
    main(Connection(int(sys.argv[1])), float(sys.argv[2]))
