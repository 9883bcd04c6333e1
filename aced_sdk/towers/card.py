# SPDX-License-Identifier: Apache-2.0
"""The model card of a saved encoder; nothing in it can add front matter, rows or links."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from aced_sdk.files import printable
from aced_sdk.towers.profile import Profile


def card(profile: Profile, license: str, facts: Mapping[str, Any]) -> str:
    """README.md of a folder, for people and hubs.

    Args:
        profile: costs of the encoder.
        license: of the weights.
        facts: how it was made.
    """
    rows = {
        "MACs, one picture": f"{profile.image_macs:,}",
        "MACs, one text": f"{profile.text_macs:,}",
        "parameters": f"{profile.parameters:,}",
        "open_clip": version("open_clip_torch"),
    } | dict(facts)
    head = {"library_name": "open_clip", "license": license, "pipeline_tag": "zero-shot-image-classification"}
    return (
        f"---\n{front_matter(head)}---\n\n"
        "# A dual encoder distilled with aced-sdk\n\n"
        "```python\nimport open_clip\n"
        'model, _, preprocess = open_clip.create_model_and_transforms("local-dir:FOLDER")\n'
        'tokenizer = open_clip.get_tokenizer("local-dir:FOLDER")\n```\n\n'
        "| fact | value |\n|---|---|\n" + "".join(f"| {cell(name)} | {cell(value)} |\n" for name, value in rows.items())
    )


def front_matter(values: Mapping[str, str]) -> str:
    """YAML lines in the order of `values`."""
    import yaml

    return str(yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=2**20))


def cell(value: object) -> str:
    """A value in a Markdown table: one line, without markup, links or HTML."""
    text = " ".join(printable(value, 2_000).split())
    return re.sub(r"[\\`*\[\]|<>&]", lambda found: f"\\{found[0]}", text)
