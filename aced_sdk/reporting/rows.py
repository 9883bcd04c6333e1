# SPDX-License-Identifier: Apache-2.0
"""What a row of an event log may hold, by kind of event. Logs are files that somebody else may have written."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from aced_sdk.files import printable

Count = Annotated[int, Field(ge=0, le=2**53)]
Number = Annotated[float, Field(ge=-1e39, le=1e39)] | None  # null: it was not finite; losses and norms are float32
Seconds = Annotated[float, Field(ge=0, le=1e12)]
Name = Annotated[str, Field(max_length=1000)]
Words = Annotated[str, Field(max_length=100_000)]


def _at_most(most: int) -> BeforeValidator:
    """A bound on a mapping, checked before its values: pydantic collects the mistakes of all of them."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > most:
            raise ValueError(f"more than {most} names")
        return value

    return BeforeValidator(check)


Numbers = Annotated[dict[Name, Number], _at_most(100)]
Rows = Annotated[list[Count], Field(fail_fast=True)]
_SHOWN = 2000  # letters of a warning
_KEYS = 8  # names of pairs of a skipped step
Quantiles = Annotated[list[Number], Field(min_length=5, max_length=5)]


class _Row(BaseModel):
    """Any event. Fields that are not named here may hold anything: they are not read."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="ignore")

    event: Name
    step: Count


class _Facts(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    pairs: Annotated[int, Field(gt=0, le=2**53)] | None = None


class _RunStarted(_Row):
    steps: Count
    facts: _Facts = _Facts()


class _StepDone(_Row):
    loss: Number
    parts: Numbers
    learning_rate: Number
    gradient_norm: Number
    trained: Count
    scored: Count = 0
    seconds: Seconds
    data_seconds: Seconds
    distilled: Count = 0


class _Scores(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    candidates: Quantiles
    picked: Quantiles


class _Selected(_Row):
    statistics: Numbers
    picked: Rows | None = None
    candidates: Annotated[Rows, Field(min_length=1)] | None = None
    scores: _Scores | Annotated[dict[Name, Any], _at_most(0)] = {}


class _Evaluated(_Row):
    metrics: Annotated[dict[Name, Numbers], _at_most(1000)]
    trained: Count
    scored: Count


class _StepSkipped(_Row):
    reason: Words
    keys: Annotated[list[Name], Field(max_length=100)] = []


class _Warned(_Row):
    cause: Words
    remedy: Words


_KINDS: dict[str, type[_Row]] = {
    "run_started": _RunStarted,
    "step_done": _StepDone,
    "selected": _Selected,
    "evaluated": _Evaluated,
    "step_skipped": _StepSkipped,
    "warned": _Warned,
}


def slim(row: dict[str, Any]) -> dict[str, Any]:
    """The fields of a right row that a report reads, without the rows of the pool; texts are cut."""
    kind = _KINDS.get(row["event"], _Row)
    kept = {name: row[name] for name in kind.model_fields if name in row and name not in ("picked", "candidates")}
    for name, inner in (("facts", _Facts), ("scores", _Scores)):
        if name in kept:
            kept[name] = {part: kept[name][part] for part in inner.model_fields if part in kept[name]}
    if "keys" in kept:
        kept["keys"] = kept["keys"][:_KEYS]
    return {name: value[:_SHOWN] if isinstance(value, str) else value for name, value in kept.items()}


def mistake(row: Any) -> str | None:
    """What is wrong with a row; None if it is as its kind of event must be."""
    event = row.get("event") if isinstance(row, dict) else None
    try:
        _KINDS.get(event if isinstance(event, str) else "", _Row).model_validate(row)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        return printable(f"{place}: {first['msg']}" if place else first["msg"], 200)
    return None
