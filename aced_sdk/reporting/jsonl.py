# SPDX-License-Identifier: Apache-2.0
"""The event log of a run: one JSON object per line, flushed after each event, valid after a crash or a resume."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Self

from aced_sdk.errors import ConfigError, DataError
from aced_sdk.files import ReadError, open_own, parse_json, printable, read_lines, whole_file
from aced_sdk.files.reading import MIB
from aced_sdk.reporting.rows import mistake

if TYPE_CHECKING:
    from aced_sdk.engine.events import Event


_BLOCK = 1 << 16
_LONGEST = 16 * MIB  # an event with 4096 candidates is about 50 kB


class JsonlWriter:
    """A callback that appends each event to a file as one line. In a distributed run, use it only on rank 0.

    An existing file is appended to; an incomplete last line is removed.

    Args:
        path: the file, by convention `events.jsonl` in the run's folder.

    Raises:
        ConfigError: if the file cannot be written, is a symbolic or hard link, or is not a regular file.
        DataError: if its last line is too long for an event.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._open()

    def _open(self) -> None:
        with self._writing():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._stream = os.fdopen(open_own(self.path, os.O_APPEND, only=True), "ab+")
            self._stream.truncate(_whole_length(self._stream))

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            cause = f"cannot write the event log {printable(self.path)}: {error.strerror}"
            raise ConfigError(cause, remedy="check permissions and space", field="directory") from error

    def __call__(self, event: Event) -> None:
        """Append and flush one event."""
        line = json.dumps(_finite(event.to_dict()), ensure_ascii=False, allow_nan=False)
        with self._writing():
            self._stream.write(line.encode(errors="replace") + b"\n")  # file names may not be UTF-8
            self._stream.flush()

    def truncate_after(self, step: int) -> None:
        """Remove events after `step`; a resumed run logs them again."""
        self._stream.close()
        with self._writing(), whole_file(self.path) as temporary, temporary.open("wb") as stream:
            for line, row in _rows(self.path):
                if row["step"] <= step:
                    stream.write(line + b"\n")
        self._open()

    def close(self) -> None:
        """Close the file."""
        with self._writing():
            self._stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_events(path: str | Path) -> Iterator[dict[str, Any]]:
    """Iterate over the events of a log in order; an incomplete last line is ignored.

    Raises:
        DataError: if the file cannot be read, or a complete line is not a valid event.
    """
    for _, row in _rows(Path(path)):
        yield row


def _rows(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield each line with its event."""
    try:
        for number, line in enumerate(read_lines(path, _LONGEST), start=1):
            row = parse_json(line, f"line {number} of {path}")
            if wrong := mistake(row):
                raise DataError(
                    f"line {number} of {printable(path)} is not an event: {wrong}",
                    remedy="restore the file or remove the line",
                )
            yield line, row
    except ReadError as error:
        raise DataError(f"cannot read the event log: {error.cause}", remedy=error.remedy) from None


def _whole_length(stream: BinaryIO) -> int:
    # Only the last line can be incomplete, so search for its start from the end.
    size = stream.seek(0, os.SEEK_END)
    for start in range(max(0, size - _BLOCK), max(-_BLOCK, size - _LONGEST - _BLOCK), -_BLOCK):
        stream.seek(max(0, start))
        if (found := stream.read(_BLOCK).rfind(b"\n")) >= 0:
            return max(0, start) + found + 1
    if size > _LONGEST:
        raise DataError("the last line of the event log is too long", remedy="restore the file or remove the line")
    return 0


def _finite(value: Any) -> Any:
    # JSON has no NaN: write non-finite values as null.
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value
