# SPDX-License-Identifier: Apache-2.0
"""Candidates: every drawing of a picture set with its true caption, before anything is chosen or rendered."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .emoji import Catalogue, Meaning, code_of, learn_names, words
from .fetch import read_tar
from .sources import Kind, PictureSet, Role

_FLAG_STYLES = {"flag", "circle-flags"}


@dataclass(frozen=True)
class Candidate:
    """One drawing. `data` is SVG, WebP or PNG; `meaning` is None for icons, logos and clip-art."""

    key: str
    source: str
    style: str
    role: Role
    kind: Kind
    licence: str
    caption: str
    meaning: Meaning | None
    data: bytes

    @property
    def concept(self) -> str:
        """What is drawn, as an id: the emoji concept, else the plain words of the caption."""
        return self.meaning.concept if self.meaning else words(self.caption)


def read_sets(
    archives: Mapping[PictureSet, Path], catalogue: Catalogue, size: int, counts: dict[str, Counter[str]]
) -> list[Candidate]:
    """All candidates of the fetched sets, sorted by key, SVG at `size` pixels.

    Drawings that find no caption, such as emoji that CLDR does not know, are counted by source under "unjoined".
    """
    loaded = {part: read_tar(path, _is_wanted) for part, path in archives.items()}
    # First every name that any set gives to a code point: sets without such a table are joined through the others'.
    for part, files in loaded.items():
        if part.kind == "emoji" and "icons.json" in files:
            icons = json.loads(files["icons.json"])
            plain = [(name, alias["parent"]) for name, alias in icons.get("aliases", {}).items() if len(alias) == 1]
            learn_names(catalogue, json.loads(files.get("chars.json", b"{}")), plain)
    candidates: list[Candidate] = []
    for part, files in loaded.items():
        found = _iconify(part, files, catalogue, size) if "icons.json" in files else _by_code(part, files, catalogue)
        counts["unjoined"][part.name] += sum(candidate is None for candidate in found)
        candidates += _one_per_emoji([candidate for candidate in found if candidate is not None])
    return sorted(candidates, key=lambda candidate: candidate.key)


def make_key(source: str, name: str) -> str:
    """A key that is a plain file name: a dot would end it in a WebDataset."""
    return f"{source}_{re.sub(r'[^a-z0-9-]+', '-', name.lower())}"


def _is_wanted(name: str) -> bool:
    return name in ("icons.json", "chars.json") or name.endswith(".webp")


def _one_per_emoji(candidates: list[Candidate]) -> list[Candidate]:
    """One drawing per emoji and set: alternates ("girl-2", "girl-3") are mostly other skin tones."""
    kept: dict[str, Candidate] = {}
    for candidate in sorted(candidates, key=lambda candidate: candidate.key):
        kept.setdefault(candidate.meaning.code if candidate.meaning else candidate.key, candidate)
    return list(kept.values())


def _candidate(part: PictureSet, name: str, data: bytes, meaning: Meaning | None, caption: str) -> Candidate:
    return Candidate(
        key=make_key(part.name, name),
        source=part.name,
        style=part.style,
        role=part.role,
        kind=part.kind,
        licence=part.package.licence,
        caption=caption,
        meaning=meaning,
        data=data,
    )


def _by_code(part: PictureSet, files: Mapping[str, bytes], catalogue: Catalogue) -> list[Candidate | None]:
    """Pictures whose file names are code points."""
    found: list[Candidate | None] = []
    for path, data in files.items():
        meaning = catalogue.by_code.get(code_of(Path(path).stem))
        found.append(_candidate(part, Path(path).stem, data, meaning, meaning.label) if meaning else None)
    return found


def _iconify(part: PictureSet, files: Mapping[str, bytes], catalogue: Catalogue, size: int) -> list[Candidate | None]:
    icons = json.loads(files["icons.json"])
    own: dict[str, str] = {}
    for code, name in json.loads(files.get("chars.json", b"{}")).items():
        own.setdefault(name, code_of(code))
    # Aliases that turn or mirror are drawings of their own; the others are only names.
    names = [*icons["icons"], *(name for name, alias in icons.get("aliases", {}).items() if len(alias) > 1)]
    found: list[Candidate | None] = []
    for name in names:
        if part.kind == "emoji":
            meaning = catalogue.by_code.get(own.get(name, "")) or catalogue.meaning(name)
            caption = meaning.label if meaning else None
        elif part.style in _FLAG_STYLES:
            if name.endswith("-4x3"):
                continue
            meaning = catalogue.country(name.removesuffix("-1x1"))
            caption = meaning.label if meaning else None
        else:
            meaning, caption = None, _caption_of(name)
        found.append(_candidate(part, name, svg_of(icons, name, size).encode(), meaning, caption) if caption else None)
    return found


def _caption_of(name: str) -> str | None:
    """The name with dashes turned to spaces; drawings of folders around a logo are left out."""
    if name.startswith(("folder-", "default-")):
        return None
    return name.removeprefix("file-type-").removesuffix("-fill").replace("-", " ")


def svg_of(icons: Mapping[str, Any], name: str, size: int) -> str:
    """One drawing of an Iconify set as a square SVG of `size` pixels, through its aliases' flips and quarter turns."""
    flips: list[Mapping[str, Any]] = []
    while name not in icons["icons"]:
        flips.append(icons["aliases"][name])
        name = flips[-1]["parent"]
    icon = icons["icons"][name]
    box = {side: icon.get(side, icons.get(side, 16 if side in ("width", "height") else 0)) for side in _SIDES}
    left, top, width, height = (box[side] for side in _SIDES)
    body = icon["body"]
    middle_x, middle_y = left + width / 2, top + height / 2
    for flip in reversed(flips):
        if flip.get("rotate"):
            body = f'<g transform="rotate({90 * flip["rotate"]} {middle_x} {middle_y})">{body}</g>'
        scale_x, scale_y = (-1 if flip.get(side) else 1 for side in ("hFlip", "vFlip"))
        if scale_x < 0 or scale_y < 0:
            move = f"translate({middle_x - scale_x * middle_x} {middle_y - scale_y * middle_y})"
            body = f'<g transform="{move} scale({scale_x} {scale_y})">{body}</g>'
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{size}" height="{size}" viewBox="{left} {top} {width} {height}">{body}</svg>'
    )


_SIDES = ("left", "top", "width", "height")
