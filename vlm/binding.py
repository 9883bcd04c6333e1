# SPDX-License-Identifier: Apache-2.0
"""Bind the folder of a tuning run to its config, data and vision tower."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from aced_sdk.errors import ConfigError
from aced_sdk.files import printable, read_json, tensor_digest, write_json
from vlm.config import TuneConfig
from vlm.data.rows import Row, fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def binding(config: TuneConfig, rows: Sequence[Row], base: PreTrainedModel) -> dict[str, object]:
    """The values that a resumed run must share: config, data and vision tower."""
    return {
        "format": 1,
        "stages": [stage.model_dump(mode="json") for stage in config.stages],
        "seed": config.seed,
        "conversations_per_row": config.conversations_per_row,
        "data": fingerprint(rows),
        "tower": tensor_digest(base.model.vision_tower.state_dict()),
    }


def claim(folder: Path, mine: dict[str, object]) -> None:
    """Write the binding to `tune.json`, or compare it with the one that is there.

    Raises:
        ConfigError: if the folder belongs to another run, or `tune.json` cannot be read.
    """
    target = folder / "tune.json"
    if not target.is_file():
        write_json(target, mine)
        return
    try:
        other = dict(read_json(target))
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"{target} cannot be read: {printable(error)}",
            remedy="restore it, or name another directory",
            field="directory",
        ) from None
    if different := [key for key in mine if other.get(key) != mine[key]]:
        raise ConfigError(
            f"{folder} holds a tuning run with other {', '.join(different)}",
            remedy="name another directory, or remove it",
            field="directory",
        )
