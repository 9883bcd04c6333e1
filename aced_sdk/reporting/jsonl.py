# SPDX-License-Identifier: Apache-2.0
"""The event log of a run: one JSON object a line, flushed as it happens, whole after a crash and after a resume."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from aced_sdk.errors import DataError
from aced_sdk.files import whole_file

if TYPE_CHECKING:
    from aced_sdk.engine.events import Event


_BLOCK = 1 << 16


class JsonlWriter:
    """A callback that appends each event to a file as one line. In a distributed run, only rank 0 should hold one.

    Opening an existing file goes on behind its last whole line; a line torn by a crash is cut off.

    Args:
        path: the file, by convention `events.jsonl` in the run's folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._open()

    def _open(self) -> None:
        self._stream = self.path.open("ab+")
        self._stream.truncate(_whole_length(self.path))

    def __call__(self, event: Event) -> None:
        """Append one event; it is handed to the operating system before this returns."""
        line = json.dumps(_finite(event.to_dict()), ensure_ascii=False, allow_nan=False)
        self._stream.write(line.encode() + b"\n")
        self._stream.flush()

    def truncate_after(self, step: int) -> None:
        """Drop events beyond `step`: a resumed run tells them again."""
        self._stream.close()
        with whole_file(self.path) as temporary, temporary.open("w", encoding="utf-8") as stream:
            for row in read_events(self.path):
                if row["step"] <= step:
                    stream.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._open()

    def close(self) -> None:
        """Close the file."""
        self._stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_events(path: str | Path) -> Iterator[dict[str, Any]]:
    """Every whole line of an event log, in order, read as they are asked for; a torn last line is left out.

    Raises:
        DataError: if the file is missing, or a whole line is no event.
    """
    path = Path(path)
    try:
        stream = path.open("rb")
    except OSError as error:
        cause = f"cannot read the event log {path}: {error.strerror}"
        raise DataError(cause, remedy="name the folder of a run") from None
    with stream:
        for number, line in enumerate(stream, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not (isinstance(row, dict) and isinstance(row.get("step"), int) and "event" in row):
                raise DataError(f"line {number} of {path} is no event", remedy="restore the file or remove the line")
            yield row


def _whole_length(path: Path) -> int:
    # Only the last line can be torn; a line is far shorter than the log, so look from the end.
    size = path.stat().st_size
    with path.open("rb") as stream:
        for start in range(max(0, size - _BLOCK), -_BLOCK, -_BLOCK):
            stream.seek(max(0, start))
            if (found := stream.read(_BLOCK).rfind(b"\n")) >= 0:
                return max(0, start) + found + 1
    return 0


def _finite(value: Any) -> Any:
    # JSON has no NaN; a non-finite loss is told as null rather than losing the line.
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value
