# SPDX-License-Identifier: Apache-2.0
"""Bounds on a `tokenizer.json`: the tokenizers library ends the process when it runs out of memory.

Each step of a tokenizer may lengthen a text. What a file adds up to is computed here, before the library reads it.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aced_sdk.files.reading import ReadError, printable, read_json

MAX_GROWTH = 768  # times the bytes of a text; ALBERT's steps may reach 726
_MAX_WORK = 2**14  # growth times the longest word or token that is looked up at each place: ten seconds for a long text
_MAX_STEPS = 64
_MAX_METASPACES = 2  # each can put a mark before every single character
_MAX_ADDED = 100_000  # added tokens
_MAX_ADDED_CHARACTERS = 1_000_000
MAX_TOKEN = 1024  # characters
_MAX_AFFIX = 64  # characters, or tokens, that a step puts before or behind a text or a word
_MAX_WORD = 200  # characters of a word that WordPiece takes to pieces; its time grows with the square
# Bytes that a byte can become. U+FDFA has 3 bytes, and 33 when it is decomposed.
_GROWTH = {"NFD": 3, "NFC": 3, "NFKD": 11, "NFKC": 11, "Lowercase": 2, "ByteLevel": 4, "BertNormalizer": 4}


def read_tokenizer(path: str | Path, length: int | None = None) -> str:
    """The text of a `tokenizer.json`, for `tokenizers.Tokenizer.from_str`.

    Args:
        path: the file.
        length: what it must pad and truncate texts to; None for a file that does neither, or less than 65,536.

    Raises:
        ReadError: if it cannot be read, or could make a short text very long.
    """
    values = read_json(path)
    try:
        _check(values, length)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ReadError(
            f"{printable(path)} is no tokenizer that can be used: {printable(error)}",
            remedy="take the tokenizer of the model's first publisher",
        ) from None
    return json.dumps(values)  # not the file's text: another parser could read that differently


def _check(values: dict[str, Any], length: int | None) -> None:
    padding, truncation = values.get("padding"), values.get("truncation")
    if length is not None:
        ends = padding and padding["strategy"], truncation and truncation["max_length"]
        _require(ends == ({"Fixed": length}, length), f"padding or truncation: the text tower reads {length} tokens")
    if padding is not None:
        fixed = padding["strategy"]["Fixed"] if isinstance(padding["strategy"], dict) else 0
        _require(0 <= fixed < 2**16 and (padding.get("pad_to_multiple_of") or 0) < 2**16, "padding")
    if truncation is not None:
        stride, most = truncation.get("stride", 0), truncation["max_length"]
        # a text becomes a piece for each (most - stride) tokens, each as long as the context
        _require(0 <= stride <= (0 if length is not None else most // 2), "truncation: stride")
    added = values.get("added_tokens") or []
    _require(len(added) <= _MAX_ADDED, "added tokens")
    lengths = [len(token["content"]) for token in added]
    _require(sum(lengths) <= _MAX_ADDED_CHARACTERS and max(lengths, default=0) <= MAX_TOKEN, "added tokens")
    longest = _check_model(values["model"])
    for names in (("normalizer", "pre_tokenizer", "post_processor"), ("decoder",)):
        steps = [step for name in names for step in _steps(values.get(name))]
        growth = 1
        for step in steps:
            growth *= _growth(step)
            _require(growth <= MAX_GROWTH, f"growth in {step['type']}")
        _require(len(steps) <= _MAX_STEPS, "number of steps")
        _require(sum(step["type"] == "Metaspace" for step in steps) <= _MAX_METASPACES, "number of Metaspace steps")
        _require("decoder" in names or growth * longest <= _MAX_WORK, "growth for words or tokens of this length")


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(f"unexpected {what}")


def _steps(value: Any) -> Iterator[dict[str, Any]]:
    """A step, or those of a sequence."""
    if value is None:
        return
    if value["type"] != "Sequence":
        yield value
        return
    for key in ("normalizers", "pretokenizers", "processors", "decoders"):
        for inner in value.get(key, ()):
            yield from _steps(inner)


def _growth(step: dict[str, Any]) -> int:
    """By how much a step can multiply the bytes of a text, but for what it adds once."""
    kind = step["type"]
    if kind == "Replace":
        pattern = step["pattern"]
        length = len(step["content"].encode())
        if "Regex" in pattern:  # may match between any two characters
            return 1 + length
        _require(len(pattern["String"]) > 0, "empty pattern")
        return max(1, length)
    if kind == "Precompiled":
        blob = base64.b64decode(step["precompiled_charsmap"])
        end = 4 + int.from_bytes(blob[:4], "little")
        _require(4 < end <= len(blob), "character map")
        return max(map(len, blob[end:].split(b"\0")))
    if kind == "Prepend":
        _require(len(step["prepend"]) <= _MAX_AFFIX, "prefix")
    if kind == "TemplateProcessing":
        special = {name: len(token["ids"]) for name, token in step["special_tokens"].items()}
        pieces = [next(iter(piece.items())) for piece in step["single"]]
        own = [special[piece["id"]] for name, piece in pieces if name == "SpecialToken"]
        _require(len(pieces) - len(own) == 1 and sum(own) + len(own) <= _MAX_AFFIX, "template")
    return _GROWTH.get(kind, 1)


def _check_model(model: dict[str, Any]) -> int:
    """The longest word or token that the model looks up letter by letter; 1 for models that do not."""
    vocabulary = model["vocab"]
    words = vocabulary if isinstance(vocabulary, dict) else [word for word, _ in vocabulary]
    longest = max(map(len, words), default=0)
    _require(longest <= MAX_TOKEN, "length of a token")
    for name in ("continuing_subword_prefix", "end_of_word_suffix", "unk_token"):
        _require(len(model.get(name) or "") <= _MAX_AFFIX, name)
    word = model.get("max_input_chars_per_word") or 1
    _require(word <= _MAX_WORD, "max_input_chars_per_word")
    _require(not model.get("dropout"), "dropout: the same text would become other tokens each time")
    return word if isinstance(vocabulary, dict) else longest
