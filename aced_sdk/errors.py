# SPDX-License-Identifier: Apache-2.0
"""Errors that a user can act on: each says the cause, the remedy and, where there is one, the config field."""

from __future__ import annotations


class AcedError(Exception):
    """Base of every error that this package raises for something that a user can fix.

    Args:
        cause: what is wrong, as one sentence without a full stop at its end.
        remedy: what the reader can do about it.
        field: the dotted config field or argument that is at fault, if one is.
    """

    def __init__(self, cause: str, *, remedy: str, field: str | None = None) -> None:
        self.cause = cause
        self.remedy = remedy
        self.field = field
        super().__init__(cause, remedy, field)

    def __str__(self) -> str:
        where = f" [field: {self.field}]" if self.field else ""
        text = f"{self.cause}. Remedy: {self.remedy}{where}"
        # Names and words from files are in it. A terminal obeys control characters, and after a line break they would
        # read like a message of their own.
        return "".join(c if c.isprintable() or c == "\t" else c.encode("unicode_escape").decode() for c in text)

    def __reduce__(self) -> tuple[object, ...]:
        # Worker processes pickle errors; keyword-only arguments need a hand.
        return _rebuild, (type(self), self.cause, self.remedy, self.field)


def _rebuild(kind: type[AcedError], cause: str, remedy: str, field: str | None) -> AcedError:
    return kind(cause, remedy=remedy, field=field)


class ConfigError(AcedError, ValueError):
    """A config value that cannot work. Also a ValueError, so that pydantic can gather it from nested models.

    Attributes:
        mistakes: one error for each mistake, if the config has several.
    """

    mistakes: tuple[ConfigError, ...] = ()


class DataError(AcedError):
    """Data that is missing, broken beyond the bound, or not what the config says."""


class ModelError(AcedError):
    """A model folder or architecture that cannot be used as asked."""


class EncoderError(AcedError):
    """Base of what calls of an encoder raise."""


class InputError(EncoderError, ValueError):
    """A picture, a text or an option that cannot be used; `field` names it."""


class CacheError(AcedError):
    """An embedding cache that does not fit the model, the preprocessing or the data."""


class CurationError(AcedError):
    """A selection that cannot be made from what was given."""


class CurationWarning(UserWarning):
    """A selection that is made, and is close to random."""


class EngineError(AcedError):
    """Training that cannot continue: wrong launch environment, non-finite losses, unreadable checkpoint."""


class EvaluationError(AcedError):
    """An evaluation task that is unknown, missing or broken."""


class UnsupportedError(AcedError):
    """A known limit of this version: what was asked is sensible and not there yet."""


class MissingPackageError(AcedError):
    """An optional package is not installed."""
