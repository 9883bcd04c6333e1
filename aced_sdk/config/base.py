# SPDX-License-Identifier: Apache-2.0
"""The base of every config: frozen, checked, readable from YAML, its mistakes told in words."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from aced_sdk.errors import ConfigError
from aced_sdk.files import whole_file


class Config(BaseModel):
    """Base of every config: frozen, unknown fields refused, mistakes told as `ConfigError`."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _readable(error, type(self)) from None

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, checked like a new one.

        Raises:
            ConfigError: if the result is not a valid config.
        """
        values = {name: getattr(self, name) for name in type(self).model_fields if name in self.model_fields_set}
        return type(self)(**(values | changes))

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """Read a config from YAML.

        Raises:
            ConfigError: if the file is missing, is not YAML, or holds a mistake (the field is named).
        """
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}", remedy="check the path") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not YAML: {error}", remedy="correct the file") from None
        if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
            raise ConfigError(f"{path} does not hold a mapping of fields", remedy="write `field: value` lines")
        return cls(**values)

    def to_yaml(self, path: str | Path) -> None:
        """Write every value, defaults too, so that the file still means the same under later defaults."""
        with whole_file(Path(path)) as temporary:
            temporary.write_text(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False), encoding="utf-8")

    def hash(self) -> str:
        """Twelve hex digits that change when any value changes."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


# Pydantic names the tags and members of unions as places.
_NO_PLACES = re.compile(r"iid|static|independent|joint|Frozen|Stored|tuple\[.*|dict\[.*|str")


def _readable(error: ValidationError, kind: type[BaseModel]) -> ConfigError:
    """The first mistake that pydantic found, as cause, remedy and dotted field."""
    first = error.errors(include_url=False)[0]
    place = [str(part) for part in first["loc"] if not _NO_PLACES.fullmatch(str(part))]
    inner = first.get("ctx", {}).get("error")
    if isinstance(inner, ConfigError):
        field = ".".join(place + ([inner.field] if inner.field else []))
        return ConfigError(inner.cause, remedy=inner.remedy, field=field or None)
    field = ".".join(place)
    more = f" ({error.error_count() - 1} more mistakes follow)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        known = sorted(kind.model_fields)
        near = difflib.get_close_matches(place[-1], known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"known fields here: {', '.join(known)}"
        return ConfigError(f"unknown field '{place[-1]}'{more}", remedy=hint, field=field)
    if first["type"] == "missing":
        return ConfigError(f"'{field}' is missing{more}", remedy="give it a value", field=field)
    return ConfigError(
        f"{first['msg']} (got {first.get('input')!r}){more}",
        remedy=f"correct '{field}' in {kind.__name__}",
        field=field,
    )
