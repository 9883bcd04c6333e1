# SPDX-License-Identifier: Apache-2.0
"""A bound on HTML entities inside of entities, in front of open_clip's text cleaning.

ftfy, which open_clip cleans with, unescapes again and again until nothing changes. `&amp;amp;amp;...` loses one level
each time, so that a caption of 4 kB takes 0.2 s.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

_SHORT = 512  # characters of texts that take little time, however deep their entities are
_MAX_LEVELS = 8
_HUGE_NUMBER = re.compile(r"&#[0-9]{4001,};?")  # which Python does not read, and which is no character


def bound_entities(tokenizer: Any) -> None:
    """Let an open_clip tokenizer drop the ampersands of texts whose entities are nested more than 8 deep."""
    tokenizer.clean_fn = partial(_clean, tokenizer.clean_fn)


def _clean(clean: Callable[[str], str], text: str) -> str:
    return clean(text if len(text) <= _SHORT else _flat(_HUGE_NUMBER.sub("\ufffd", text)))


def _flat(text: str) -> str:
    """`text` where a few rounds of unescaping suffice; else what they leave, without ampersands."""
    from ftfy import fix_text
    from ftfy.fixes import unescape_html

    # ftfy takes everything from the first line with a `<` on as HTML, and unescapes nothing there.
    end = text.rfind("\n", 0, text.index("<")) + 1 if "<" in text else len(text)
    if end <= _SHORT or (text.isascii() and text.count(";", 0, end) <= _MAX_LEVELS):
        return text
    found = text[:end]
    for _ in range(_MAX_LEVELS):
        before, found = found, fix_text(unescape_html(found), unescape_html=False)
        if found == before:
            return text
    return found.replace("&", "") + text[end:]
