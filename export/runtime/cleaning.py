# SPDX-License-Identifier: Apache-2.0
"""The text cleaning in front of open_clip's tokenizers, with the standard library alone.

open_clip cleans with ftfy, unescapes HTML twice, and then lowers, canonicalises, or only joins white space. This is the
same, but for ftfy's repair of wrongly decoded text: such text ("cafÃ©") is taken as it stands.
"""

from __future__ import annotations

import html
import re
import string
import unicodedata
from functools import cache
from html.entities import html5

CLEANINGS = ("lower", "whitespace", "canonicalize")

# An ampersand that was escaped over and over; one round for each would take time that grows with the square.
_AMPERSAND = re.compile(r"&(?:(?:amp|AMP|#0{0,20}38|#[xX]0{0,20}26|#0{0,20}65286|#[xX]0{0,20}[fF]{2}06);)+")
_HUGE_NUMBER = re.compile(r"&#[0-9]{4001,};?")  # which Python does not read, and which is no character
_MAX_ROUNDS = 64  # of unescaping and replacing; texts need two or three, and nested escapes one for each level
_ENTITY = re.compile(r"&#?[0-9A-Za-z]{1,24};")
_TERMINAL_ESCAPE = re.compile("\033\\[((?:\\d|;)*)([a-zA-Z])")
_SURROGATE_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_LINE_BREAKS = re.compile("\r\n|[\r\u2028\u2029\x85]")
_LIGATURES = "ĲĳŉǱǲǳǄǅǆǇǈǉǊǋǌﬀﬁﬂﬃﬄﬅﬆ"
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def clean_text(text: str, cleaning: str) -> str:
    """`text` as open_clip's tokenizer sees it; `cleaning` is one of CLEANINGS."""
    text = _HUGE_NUMBER.sub("\ufffd", text)
    text = html.unescape(html.unescape(_fix(text))).strip()
    if cleaning == "canonicalize":
        text = text.replace("_", " ").translate(_PUNCTUATION).lower()
    text = " ".join(text.split())
    return text.lower() if cleaning == "lower" else text


def _fix(text: str) -> str:
    """ftfy.fix_text line by line; from the first line with a `<` on, entities stay (the text is HTML itself)."""
    unescape, fixed = True, []
    for line in re.findall(r"[^\n]*\n|[^\n]+", text):
        unescape = unescape and "<" not in line
        fixed.append(_fix_line(line, unescape))
    return "".join(fixed)


def _fix_line(line: str, unescape: bool) -> str:
    for _ in range(_MAX_ROUNDS):
        before = line
        if unescape:
            line = _ENTITY.sub(_character, _AMPERSAND.sub("&", line))
        line = line.translate(_characters())
        line = _LINE_BREAKS.sub("\n", line)
        line = _SURROGATE_PAIR.sub(_joined, line)
        line = _SURROGATE.sub("\ufffd", line)
        line = _TERMINAL_ESCAPE.sub("", line).translate(_controls())
        line = unicodedata.normalize("NFC", line)
        if line == before:
            break
    return line


def _joined(pair: re.Match[str]) -> str:
    return pair[0].encode("utf-16", "surrogatepass").decode("utf-16")


def _character(entity: re.Match[str]) -> str:
    """The character of an entity that ends in a semicolon; all-capital names count unless they mean another."""
    text = entity[0]
    if text.startswith("&#"):
        plain = html.unescape(text)
        return text if ";" in plain else plain
    if text[1:] in html5:
        return html5[text[1:]]
    small = text[1:].lower()
    if text[1:].isupper() and small in html5 and html.unescape(text) == text:
        return html5[small].upper()
    return text


@cache
def _characters() -> dict[int, str]:
    """C1 controls as Windows-1252, ligatures taken apart, full and half width forms, straight quotes, as one table.

    The four never feed each other but for the quote in the Afrikaans ligature, which the caller's loop picks up.
    """
    table = {code: bytes([code]).decode("cp1252", "ignore") or chr(code) for code in range(0x80, 0xA0)}
    table |= {ord(ligature): unicodedata.normalize("NFKC", ligature) for ligature in _LIGATURES}
    table[ord("ﬅ")] = "ſt"  # its compatibility form would also replace the long s
    table[0x3000] = " "
    for code in range(0xFF01, 0xFFF0):
        table[code] = unicodedata.normalize("NFKC", chr(code))
    table |= dict.fromkeys((0x2BC, *range(0x2018, 0x201C)), "'")
    table |= dict.fromkeys(range(0x201C, 0x2020), '"')
    return table


@cache
def _controls() -> dict[int, None]:
    codes = (*range(0x09), 0x0B, *range(0x0E, 0x20), 0x7F, *range(0x206A, 0x2070), 0xFEFF, *range(0xFFF9, 0xFFFD))
    return dict.fromkeys(codes)
