# SPDX-License-Identifier: Apache-2.0
"""The process that renders: one drawing a line in (base64), one JSON object a line out.

libvips renders SVG under one lock, so a second core needs a second process; a plain one, because `multiprocessing`
would import the caller's script again or fork its threads.
"""

from __future__ import annotations

import base64
import json
import sys

from aced_sdk.errors import DataError

from .render import render


def main() -> None:
    """Serve until the input ends: {"png", "colour"} of a drawing, or {"failed": "blank" or "unreadable"}."""
    size = int(sys.argv[1])
    for line in sys.stdin.buffer:
        try:
            picture = render(base64.b64decode(line), size)
        except DataError:
            answer: dict[str, str | None] = {"failed": "unreadable"}
        else:
            answer = {"failed": "blank"}
            if picture:
                answer = {"png": base64.b64encode(picture.png).decode(), "colour": picture.colour}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
