# SPDX-License-Identifier: Apache-2.0
"""What emoji mean: CLDR names by code point (emojibase-data), and the names by which picture sets call them."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

_TONES = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}
# Man, woman -> person; boy, girl -> child; old man, old woman -> older person.
_NEUTRAL = {"1f468": "1f9d1", "1f469": "1f9d1", "1f466": "1f9d2", "1f467": "1f9d2", "1f474": "1f9d3", "1f475": "1f9d3"}
_GENDER_SIGNS = {"2640", "2642"}
_GENDERED = re.compile(
    r"\b(wo)?m[ae]n\b|\b(boy|girl|female|male|mother|father|mrs|mr|mx|santa|lady|prince|princess|bride|guy)s?\b"
    r"|\bmer(man|maid)\b|\bbreast|\bgeisha\b"
)

# CLDR subgroup -> the plain word that answers "What kind of thing is it?"; subgroups that fit no word are left out.
_WORD_OF_SUBGROUP = (
    (re.compile(r"face-(?!costume)"), "face"),
    (re.compile(r"hand"), "hand"),
    (re.compile(r"person|family"), "person"),
    (re.compile(r"animal-"), "animal"),
    (re.compile(r"plant-"), "plant"),
    (re.compile(r"food-|drink"), "food"),
    (re.compile(r"place-"), "place"),
    (re.compile(r"transport-(ground|water|air)"), "vehicle"),
    (re.compile(r"sky-weather"), "weather"),
    (re.compile(r"event|award-medal|sport|game|arts-crafts"), "activity"),
    (re.compile(r"clothing"), "clothing"),
)
_WORD_OF_GROUP = {"objects": "object", "symbols": "symbol", "flags": "flag"}


@dataclass(frozen=True)
class Meaning:
    """One emoji of CLDR.

    `code` is its code points without fe0f, `drawn` the same without skin tone, `concept` also without gender: all
    emoji of one concept are held out together.
    """

    code: str
    label: str
    drawn: str
    concept: str
    word: str | None
    country: str | None
    toned: bool
    gendered: bool


@dataclass
class Catalogue:
    """All emoji by code, and the names that lead to a code: exact ones and, as a last resort, ones without dashes."""

    by_code: dict[str, Meaning]
    names: dict[str, str] = field(default_factory=dict)
    glued: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))

    def add_name(self, name: str, code: str) -> None:
        """Let `name` lead to `code`; the first to claim a name keeps it."""
        if code in self.by_code:
            self.names.setdefault(name, code)
            self.glued[_glue(name)].add(code)

    def meaning(self, name: str) -> Meaning | None:
        """The emoji that a set calls `name`: "red-apple", "flag-for-france", "france", "girl-2" or "redapple"."""
        plain = re.sub(r"-\d$", "", name)
        for trial in (name, name.replace("flag-for-", "flag-"), plain, f"flag-{name}"):
            if trial in self.names:
                return self.by_code[self.names[trial]]
        codes = self.glued.get(_glue(name), set())
        return self.by_code[next(iter(codes))] if len(codes) == 1 else None

    def country(self, name: str) -> Meaning | None:
        """The flag of an ISO 3166 code such as "fr", or of a part such as "gb-eng"."""
        letters = name.replace("-", "")
        if len(letters) == 2 and letters.isascii() and letters.isalpha():
            return self.by_code.get("-".join(f"{0x1F1E6 + ord(letter) - ord('a'):x}" for letter in letters))
        tags = "-".join(f"{0xE0000 + ord(letter):x}" for letter in letters)
        return self.by_code.get(f"1f3f4-{tags}-e007f")


def code_of(hexcode: str) -> str:
    """Code points joined by dashes, lower case, without the variation selector fe0f."""
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")


def slug(label: str) -> str:
    """A CLDR label as a set would name it: "man's shoe" -> "mans-shoe"."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"['’]", "", label.lower()).replace("&", "and")).strip("-")


def words(text: str) -> str:
    """Lower-case letters and digits with single spaces: captions are compared so."""
    return " ".join(re.findall(r"[^\W_]+", text.lower()))


def read_catalogue(files: Mapping[str, bytes]) -> Catalogue:
    """The catalogue from emojibase-data's `en/data.json`, `en/messages.json` and `en/shortcodes/emojibase.json`."""
    entries = json.loads(files["en/data.json"])
    messages = json.loads(files["en/messages.json"])
    groups = {group["order"]: group["key"] for group in messages["groups"]}
    subgroups = {group["order"]: group["key"] for group in messages["subgroups"]}
    catalogue = Catalogue({})
    for entry in entries:
        if "group" not in entry or groups[entry["group"]] == "component":
            continue
        word = _word(groups[entry["group"]], subgroups[entry["subgroup"]])
        for drawing in (entry, *entry.get("skins", ())):
            meaning = _meaning(drawing, code_of(entry["hexcode"]), word, subgroups[entry["subgroup"]])
            catalogue.by_code[meaning.code] = meaning
    for code, meaning in catalogue.by_code.items():
        catalogue.add_name(slug(meaning.label), code)
    for hexcode, names in json.loads(files["en/shortcodes/emojibase.json"]).items():
        for name in [names] if isinstance(names, str) else names:
            if code_of(hexcode) in catalogue.by_code:
                catalogue.glued[_glue(name)].add(code_of(hexcode))
    return catalogue


def _meaning(drawing: Mapping[str, Any], drawn: str, word: str | None, subgroup: str) -> Meaning:
    label = str(drawing["label"])
    parts = [_NEUTRAL.get(part, part) for part in drawn.split("-") if part not in _TONES | _GENDER_SIGNS]
    concept = re.sub(r"(-200d)+$", "", "-".join(parts)) or drawn
    return Meaning(
        code=code_of(drawing["hexcode"]),
        label=label,
        drawn=drawn,
        concept=concept,
        word=word,
        country=label.removeprefix("flag: ") if subgroup in ("country-flag", "subdivision-flag") else None,
        toned="tone" in drawing,
        gendered=_GENDERED.search(label.lower()) is not None,
    )


def learn_names(catalogue: Catalogue, chars: Mapping[str, str], aliases: Iterable[tuple[str, str]]) -> None:
    """Take over the names that one set gives to code points, and its other names for the same pictures.

    Args:
        chars: code -> name, as in an Iconify `chars.json`.
        aliases: (other name, name) of pictures that are the very same.
    """
    own = {name: code_of(code) for code, name in chars.items()}
    for name, code in own.items():
        catalogue.add_name(name, code)
    for other, name in aliases:
        if name in own:
            catalogue.add_name(other, own[name])


def _word(group: str, subgroup: str) -> str | None:
    for pattern, word in _WORD_OF_SUBGROUP:
        if pattern.match(subgroup):
            return word
    return _WORD_OF_GROUP.get(group)


def _glue(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
