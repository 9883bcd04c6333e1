# SPDX-License-Identifier: Apache-2.0
"""peft: adapters apart from their base model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from peft import AutoPeftModel, PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

from tools.clients.inside import Check
from tools.clients.scripts.answers import answer_checks


def checks(folder: Path) -> Iterator[Check]:
    """Both ways to open what `vlm.save(..., merge=False)` wrote."""
    for name in ("llava-apart", "right-apart"):
        for kind, load in (("PeftModel", with_base), ("AutoPeftModel", by_itself)):
            yield from answer_checks(folder, f"vlm/{name}", kind, partial(load, folder / "vlm" / name))


def with_base(folder: Path) -> tuple[Any, Any]:
    """As on the card."""
    model = AutoModelForImageTextToText.from_pretrained(folder / "base")
    return PeftModel.from_pretrained(model, str(folder / "adapter")).eval(), AutoProcessor.from_pretrained(
        folder / "base"
    )


def by_itself(folder: Path) -> tuple[Any, Any]:
    """From inside the folder, so that the adapter may name its base by a relative path."""
    with contextlib.chdir(folder):
        return AutoPeftModel.from_pretrained("adapter").eval(), AutoProcessor.from_pretrained("base")
