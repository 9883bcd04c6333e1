# SPDX-License-Identifier: Apache-2.0
"""Errors of the ONNX runtime, in the form of aced_sdk's own: it must run where aced_sdk is not installed."""

from __future__ import annotations


class EncoderError(Exception):
    """Base of what `OnnxEncoder` raises.

    Args:
        cause: what is wrong, as one sentence without a full stop at its end.
        remedy: what the reader can do about it.
        field: the argument or input that is at fault, if one is.
    """

    def __init__(self, cause: str, *, remedy: str, field: str | None = None) -> None:
        self.cause = cause
        self.remedy = remedy
        self.field = field
        super().__init__(cause, remedy, field)

    def __str__(self) -> str:
        where = f" [field: {self.field}]" if self.field else ""
        return f"{self.cause}. Remedy: {self.remedy}{where}"

    def __reduce__(self) -> tuple[object, ...]:
        # Worker processes pickle errors; keyword-only arguments need a hand.
        return _rebuild, (type(self), self.cause, self.remedy, self.field)


def _rebuild(kind: type[EncoderError], cause: str, remedy: str, field: str | None) -> EncoderError:
    return kind(cause, remedy=remedy, field=field)


class FolderError(EncoderError):
    """An exported folder that is missing, altered, or lacks what was asked for."""


class InputError(EncoderError, ValueError):
    """A picture, a text or an option that cannot be used; `field` names it."""


class QueueFullError(EncoderError):
    """A batcher that has as many requests waiting as it may: the caller should come back later."""


class ClosedError(EncoderError):
    """A request to a batcher that was closed."""
