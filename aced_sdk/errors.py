# SPDX-License-Identifier: Apache-2.0
"""Errors that a user can act on. Each has a cause, a remedy and, if one is at fault, the config field."""

from __future__ import annotations

from pathlib import Path


class AcedError(Exception):
    """Base of all errors that a user can fix.

    Args:
        cause: what is wrong, one sentence without a final full stop.
        remedy: how to fix it.
        field: dotted name of the config field or argument at fault, if any.

    Attributes:
        reported_by: in a launch of several ranks, the other rank whose message reports this failure; None: this rank.
    """

    reported_by: int | None = None

    def __init__(self, cause: str, *, remedy: str, field: str | None = None) -> None:
        self.cause = cause
        self.remedy = remedy
        self.field = field
        super().__init__(cause, remedy, field)

    def __str__(self) -> str:
        where = f" [field: {self.field}]" if self.field else ""
        text = f"{self.cause}. Remedy: {self.remedy}{where}"
        # The text may contain names from files. Control characters would act on the terminal, and a line break could
        # fake a second message.
        return "".join(c if c.isprintable() or c == "\t" else c.encode("unicode_escape").decode() for c in text)

    def __reduce__(self) -> tuple[object, ...]:
        # Errors of worker processes are pickled, which does not support keyword-only arguments.
        return _rebuild, (type(self), self.cause, self.remedy, self.field), self.__dict__


def _rebuild(kind: type[AcedError], cause: str, remedy: str, field: str | None) -> AcedError:
    return kind(cause, remedy=remedy, field=field)


class ConfigError(AcedError, ValueError):
    """Invalid config value. Also a ValueError, so that pydantic collects it from nested models.

    Attributes:
        mistakes: one error per mistake, if the config has several.
    """

    mistakes: tuple[ConfigError, ...] = ()

    def under(self, *place: str) -> ConfigError:
        """Return this error of a nested config, with the field's name in the outer one."""
        field = ".".join([*place, self.field] if self.field else place) or None
        error = ConfigError(self.cause, remedy=self.remedy, field=field)
        error.mistakes = tuple(mistake.under(*place) for mistake in self.mistakes)
        return error


class DataError(AcedError):
    """Data is missing, has too many unusable pairs, or does not match the config."""


class ModelError(AcedError):
    """A model folder or architecture cannot be used as requested."""


class EncoderError(AcedError):
    """Base of the errors raised by calls of an encoder."""


class InputError(EncoderError, ValueError):
    """A picture, text or option cannot be used; `field` names it."""


class CacheError(AcedError):
    """An embedding cache does not match the model, the preprocessing or the data."""


class CurationError(AcedError):
    """A sub-batch cannot be selected from the given inputs."""


class CurationWarning(UserWarning):
    """The selection is close to random."""


class EngineError(AcedError):
    """Training cannot continue: wrong launch environment, non-finite losses or an unreadable checkpoint."""


class Interrupted(AcedError):
    """A signal ended a run after a step.

    Attributes:
        checkpoint: folder of the checkpoint that was written; None if the training writes none.
        exit_code: exit code of the `aced` command.
    """

    def __init__(
        self,
        cause: str,
        *,
        remedy: str,
        field: str | None = None,
        checkpoint: Path | None = None,
        exit_code: int = 143,
    ) -> None:
        super().__init__(cause, remedy=remedy, field=field)
        self.checkpoint = checkpoint
        self.exit_code = exit_code


class EvaluationError(AcedError):
    """An evaluation task is unknown, missing or broken."""


class UnsupportedError(AcedError):
    """The request is valid but not supported in this version."""


class MissingPackageError(AcedError):
    """An optional package is not installed."""
