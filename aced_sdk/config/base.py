# SPDX-License-Identifier: Apache-2.0
"""The base class of all configs: frozen, validated, readable from YAML, with readable errors."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from inspect import signature
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, ClassVar, Self, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, field_validator, model_validator

from aced_sdk.errors import ConfigError
from aced_sdk.files import ReadError, expand, one_line, parse_yaml, printable, read_yaml, whole_file
from aced_sdk.files.reading import MAX_DEPTH, MIB

_MAX_YAML = 4 * MIB  # enough for a config that lists many shards
_MAX_INT = 2**63 - 1
_MAX_NODES = 500_000  # of a mapping
_NESTS = (dict, list, tuple)
_MISTAKES, _MOST = 20, 1000  # mistakes listed in an error; above the second number they are only counted


def _named(value: Any) -> Any:
    """Refuse what JSON and YAML cannot hold: keys that are not strings, very large integers, a mapping in itself."""
    level, count = [value], 0
    for _ in range(MAX_DEPTH + 1):
        if any(isinstance(node, dict) and not all(isinstance(key, str) for key in node) for node in level):
            raise ConfigError("a key of the mapping is not a text", remedy="put the key in quotes")
        if any(isinstance(node, int) and abs(node) > _MAX_INT for node in level):
            raise ConfigError("a number of the mapping is too large", remedy="use one of at most 64 bits")
        nodes = [node.values() if isinstance(node, dict) else node for node in level if isinstance(node, _NESTS)]
        count += sum(map(len, nodes))
        if not nodes or count > _MAX_NODES:
            break
        level = [inner for node in nodes for inner in node]
    if nodes:
        cause = f"the mapping is nested more than {MAX_DEPTH} levels deep, or has more than {_MAX_NODES:,} values"
        raise ConfigError(cause, remedy="write a smaller one")
    return value


_C = TypeVar("_C", bound="Config")
JsonObject = Annotated[dict[str, Any], BeforeValidator(_named)]


class Config(BaseModel):
    """Base class of all configs: frozen; unknown fields are refused; mistakes raise `ConfigError`."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _readable(error, type(self)) from None

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, values: Any) -> Any:
        """Refuse booleans for numbers (`yes` would be 1) and empty paths (they would be the working folder)."""
        if isinstance(values, dict) and len(values) > _MOST:
            raise ConfigError(f"{len(values):,} fields", remedy="correct the file")
        for name, value in values.items() if isinstance(values, dict) else ():
            if not (isinstance(value, bool) or value == "") or name not in cls.model_fields:
                continue
            kinds = list(_kinds(cls.model_fields[name].annotation))
            if value == "" and Path in kinds and str not in kinds:
                raise ConfigError("the path is empty", remedy="name a path; `.` is the working folder", field=name)
            if value != "" and (int in kinds or float in kinds) and bool not in kinds:
                remedy = "write a number: YAML reads yes and on as true, no and off as false"
                raise ConfigError(f"{value} is not a number", remedy=remedy, field=name)
        return values

    @field_validator("*")
    @classmethod
    def _bounded(cls, value: Any) -> Any:
        """Refuse integers of more than 64 bits and invalid paths; expand `~` in paths."""
        if isinstance(value, int) and not -_MAX_INT <= value <= _MAX_INT:
            raise ConfigError("the number is too large", remedy="use one of at most 64 bits")
        if isinstance(value, Path):
            try:
                return expand(value)
            except ReadError as error:
                raise ConfigError(error.cause, remedy=error.remedy) from None
        return value

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some fields changed; it is validated again.

        Raises:
            ConfigError: if the result is not a valid config.
        """
        values = {name: getattr(self, name) for name in type(self).model_fields if name in self.model_fields_set}
        return type(self)(**(values | changes))

    def flat(self) -> dict[str, str]:
        """Every value as JSON text, by dotted name of its field."""

        def flatten(name: str, value: Any) -> Iterator[tuple[str, str]]:
            if isinstance(value, dict | list) and value:
                for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
                    yield from flatten(f"{name}.{key}" if name else str(key), inner)
            else:
                yield name, json.dumps(value, sort_keys=True)

        return dict(flatten("", self.model_dump(mode="json")))

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """Read a config from YAML.

        Raises:
            ConfigError: if the file is missing, is not YAML, or has an invalid field (the error names it).
        """
        try:
            values = read_yaml(path, _MAX_YAML)
        except ReadError as error:
            raise ConfigError(error.cause, remedy=error.remedy) from None
        if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
            raise ConfigError(
                f"{printable(path)} does not hold a mapping of fields", remedy="write `field: value` lines"
            )
        return cls(**values)

    def to_yaml(self, path: str | Path) -> None:
        """Write all values, including defaults, so that the file does not depend on the defaults of a version.

        Raises:
            ConfigError: if the file cannot be written, or a name is not UTF-8 and could not be read again.
        """
        text = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
        try:
            parse_yaml(text, "the config")
            with whole_file(expand(path)) as temporary:
                temporary.write_text(text, encoding="utf-8")
        except ReadError as error:
            raise ConfigError(f"the config cannot be written: {error.cause}", remedy="use names in UTF-8") from None
        except OSError as error:
            cause = f"cannot write {printable(path)}: {error.strerror}"
            raise ConfigError(cause, remedy="check permissions and space") from error

    def hash(self) -> str:
        """Twelve hex digits of the sha256 of all values."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


class Component(Config):
    """A config that builds its component.

    `target` names the class as `module:name`. The module is imported in `build`, so reading a config does not import
    torch. A new component needs only a config with a target.
    """

    target: ClassVar[str]

    def build(self) -> Any:
        """Return an instance of the class `target`, built from this config.

        Raises:
            ConfigError: if there is no such class.
        """
        kind, target = type(self).__name__, getattr(self, "target", None)
        if target is None:
            remedy = 'add `target: ClassVar[str] = "module:Class"`'
            raise ConfigError(f"the config {kind} has no target to build", remedy=remedy)
        found = named(target)
        if not isinstance(found, type):
            cause = f"the target '{one_line(target, 200)}' of {kind} is not a class"
            raise ConfigError(cause, remedy="name the class that is built from the config")
        try:
            signature(found).bind(self)
        except TypeError as error:
            cause = f"the target '{one_line(target, 200)}' cannot be built from {kind} alone: {error}"
            raise ConfigError(cause, remedy="give it one argument, the config") from None
        return found(self)


def named(target: str) -> Any:
    """Import and return the object named `module:name`.

    Raises:
        ConfigError: if the target has another form, or the module or the name is missing.
    """
    module, colon, name = target.partition(":") if isinstance(target, str) else ("", "", "")
    if not (module and colon and name):
        raise ConfigError(f"the target {shown(target)} is not 'module:name'", remedy="write 'module:name'")
    found = import_named(module, f"correct the target '{one_line(target, 200)}'")
    if not hasattr(found, name):
        cause = f"the module '{one_line(module, 200)}' has no '{one_line(name, 200)}'"
        raise ConfigError(cause, remedy=f"correct the target '{one_line(target, 200)}'")
    return getattr(found, name)


def import_named(module: str, remedy: str) -> Any:
    """Import a module. Errors of its own code are raised unchanged.

    Raises:
        ConfigError: if there is no such module.
    """
    try:
        return import_module(module)
    except (ModuleNotFoundError, TypeError, ValueError) as error:  # the last two: of names such as `.a` and ``
        missing = getattr(error, "name", None) or module
        if module != missing and not module.startswith(f"{missing}."):
            raise
        raise ConfigError(f"there is no module '{one_line(missing, 200)}'", remedy=remedy) from None


IMPORT_HINT = "if it is your own, import its module first (`aced --import MODULE`)"


def register(kind: type[Config], field: str, known: dict[str, Any]) -> None:
    """Register a config class by its own value of `field`, the name that YAML uses.

    A class without a value of its own is not registered. Defining the same class again replaces it.

    Raises:
        ConfigError: if another class has that name.
    """
    name = kind.model_fields[field].default
    inherited = {base.model_fields[field].default for base in kind.__bases__ if hasattr(base, "model_fields")}
    if not name or name in inherited:
        return
    other = known.get(name)
    if other is not None and _path(other) != _path(kind):
        cause = f"{kind.__name__} has the {field} '{name}' of {other.__module__}.{other.__qualname__}"
        raise ConfigError(cause, remedy=f"give {kind.__name__} another {field}", field=field)
    known[name] = kind


def check_registered(value: Config, field: str, known: Mapping[str, Any]) -> None:
    """Refuse a config that YAML would read back as another class.

    Raises:
        ConfigError: if its class is not registered under its name.
    """
    kind, name = type(value), getattr(value, field)
    if name in known and _path(known[name]) == _path(kind):
        return
    text = kind.__name__.lower()
    raise ConfigError(
        f"{kind.__name__} has no {field} of its own, so that YAML cannot name it",
        remedy=f'add `{field}: Literal["{text}"] = "{text}"` to the class',
        field=field,
    )


def built(kind: type[_C], values: Mapping[Any, Any]) -> _C:
    """Build a config from a mapping of fields.

    Raises:
        ConfigError: if a key is not a text, or as `kind`.
    """
    return kind(**_named(dict(values)))


def _path(kind: type[Any]) -> tuple[str, str]:
    return kind.__module__, kind.__qualname__


def unknown(what: str, value: object, known: Iterable[str], field: str, more: str = "") -> ConfigError:
    """Return the error for an unknown name. It suggests a similar name, or lists the known ones; `more` is added."""
    names = list(known)
    near = difflib.get_close_matches(str(value), names, n=1, cutoff=0.6)
    hint = f"did you mean '{near[0]}'?" if near else f"use one of {', '.join(names)}"
    if more:
        hint += f" {more[0].upper()}{more[1:]}" if near else f"; {more}"
    return ConfigError(f"unknown {what} '{one_line(value, 80)}'", remedy=hint, field=field)


# Pydantic adds the members of unions to the path of a field.
_NO_PLACES = re.compile(r"tuple\[.*|dict\[.*|str")


def _readable(error: ValidationError, kind: type[BaseModel]) -> ConfigError:
    """Convert pydantic's errors to one ConfigError; its field is that of the first mistake."""
    count = error.error_count()
    if count > _MOST:  # pydantic takes long to list so many
        return ConfigError(f"{count:,} mistakes in {kind.__name__}", remedy="correct the file")
    found = list[ConfigError]()
    for raw in error.errors(include_url=False)[:_MISTAKES]:
        found += [one for one in _mistakes(dict(raw), kind) if not _alternative(one, found)]
    more = count - _MISTAKES
    if len(found) == 1 and more <= 0:
        return found[0]
    listed = "; ".join(f"{one.field or kind.__name__}: {one.cause} ({one.remedy})" for one in found[:_MISTAKES])
    listed += f"; and {more:,} more" if more > 0 else ""
    cause = f"{len(found) + max(more, 0):,} mistakes: {listed}"
    whole = ConfigError(cause, remedy="correct these fields", field=found[0].field)
    whole.mistakes = tuple(found)
    return whole


def _alternative(mistake: ConfigError, found: list[ConfigError]) -> bool:
    """Whether the wrong type of this field is already reported: pydantic reports each member of a union."""
    return any(one.field == mistake.field and "takes a mapping" in one.cause for one in found)


def _mistakes(found: dict[str, Any], kind: type[BaseModel]) -> list[ConfigError]:
    """Convert one pydantic error to cause, remedy and dotted field; an error of a nested config may have several."""
    place = [str(part) for part in found["loc"] if not _NO_PLACES.fullmatch(str(part))]
    inner = found.get("ctx", {}).get("error")
    if isinstance(inner, ConfigError):
        return [one.under(*place) for one in (inner.mistakes or (inner,))]
    return [_mistake(found, place, kind)]


def _mistake(found: dict[str, Any], place: list[str], kind: type[BaseModel]) -> ConfigError:
    place = [one_line(part) for part in place]
    field = ".".join(place)
    if found["type"] == "extra_forbidden":
        known = sorted(_fields(kind, place[:-1]))
        near = difflib.get_close_matches(place[-1], known, n=1, cutoff=0.72)
        hint = f"did you mean '{near[0]}'?" if near else f"known fields here: {', '.join(known)}"
        return ConfigError(f"unknown field '{place[-1]}'", remedy=hint, field=field)
    if found["type"] == "missing":
        return ConfigError(f"'{field}' is missing", remedy="give it a value", field=field)
    if found["type"] in ("union_tag_invalid", "union_tag_not_found"):  # such as a stage of tuning
        name = found["ctx"]["discriminator"].strip("'")
        if found["type"] == "union_tag_not_found":
            return ConfigError(f"'{name}' is missing", remedy="give it a value", field=f"{field}.{name}")
        known = re.findall(r"'([^']*)'", found["ctx"]["expected_tags"])
        return unknown(name, found["ctx"]["tag"], known, f"{field}.{name}")
    if found["type"] in ("model_type", "model_attributes_type"):
        cause = f"'{field}' takes a mapping of fields (got {shown(found.get('input'))})"
        names = sorted(_fields(kind, place))
        return ConfigError(cause, remedy=f"its fields are {', '.join(names)}", field=field)
    cause = f"{printable(found['msg'])} (got {shown(found.get('input'))})"
    return ConfigError(cause, remedy=f"correct '{field}' in {kind.__name__}", field=field)


def shown(value: Any) -> str:
    try:
        return f"{value:.6g}" if isinstance(value, float) else printable(repr(value), 80)
    except ValueError:  # Python refuses to format integers of thousands of digits
        return "a very large number"


def _fields(kind: type[BaseModel], path: list[str]) -> set[str]:
    """Names of the fields at a path in a config; for a union, those of all its configs."""
    kinds = {kind}
    for part in path:
        annotations = [k.model_fields[part].annotation for k in kinds if part in k.model_fields]
        kinds = {found for annotation in annotations for found in _configs(annotation)} or kinds
    return {name for k in kinds for name in k.model_fields}


def _kinds(annotation: Any) -> Iterator[Any]:
    """The types of a single value in an annotation such as `Annotated[int, ...] | None`."""
    if get_origin(annotation) in (Union, UnionType):
        for part in get_args(annotation):
            yield from _kinds(part)
    elif get_origin(annotation) is Annotated:
        yield from _kinds(get_args(annotation)[0])
    else:
        yield annotation


def _configs(annotation: Any) -> Iterator[type[BaseModel]]:
    """The configs in an annotation such as `tuple[A | B, ...] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _configs(part)
