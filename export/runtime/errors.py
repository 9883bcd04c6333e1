# SPDX-License-Identifier: Apache-2.0
"""Errors of the ONNX runtime. Like all of aced_sdk's they have a cause, a remedy and a field."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from aced_sdk.errors import EncoderError, InputError
from aced_sdk.files import ReadError

__all__ = ["ClosedError", "EncoderError", "FolderError", "InputError", "QueueFullError", "folder_errors"]


class FolderError(EncoderError):
    """An exported folder that is missing, altered, not safe to load, or lacks what was asked for."""


class QueueFullError(EncoderError):
    """A batcher that has as many requests waiting as it may: the caller should come back later."""


class ClosedError(EncoderError):
    """A request to a batcher that was closed."""


@contextmanager
def folder_errors(field: str | None = None) -> Iterator[None]:
    """Turn a `ReadError` of the block into a `FolderError`."""
    try:
        yield
    except ReadError as error:
        raise FolderError(error.cause, remedy=error.remedy, field=field) from None
