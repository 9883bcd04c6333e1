# SPDX-License-Identifier: Apache-2.0
"""Captions and conversations in WebDataset tars."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from aced_sdk.data.pool import Pool, UnusablePair
from aced_sdk.data.samples import IMAGES
from aced_sdk.errors import DataError
from aced_sdk.files import parse_json, printable, whole_file
from vlm.data.chat import CAPTION_PROMPT
from vlm.data.conversation import check_words
from vlm.data.samples import Sample, Samples, from_llava, from_messages, readable
from vlm.data.skips import Skips, Unusable

_MAX_WORDS = 2**24  # bytes of a KEY.json or KEY.txt
_MAX_PICTURE = 2**28


def load_webdataset(
    shards: Sequence[str | Path],
    folder: str | Path,
    *,
    prompt: str = CAPTION_PROMPT,
    max_unusable_fraction: float = 0.02,
) -> Samples:
    """Read tars of KEY.png|jpg|webp|bmp with KEY.txt, a caption, or KEY.json, a conversation.

    KEY.json is a conversation if it has `conversations` (`load_llava`) or `messages` (`load_messages`), and then goes
    before the caption. A conversation has one picture, or none.

    Args:
        shards: tar files, folders of tars, or patterns with braces.
        folder: pictures are unpacked here under names made of their contents; those already there are kept.
        prompt: the question that captions answer.
        max_unusable_fraction: largest fraction of samples that may be left out because they are malformed, or have
            no words or no readable picture; `Samples.skipped` and `Samples.reasons` list them.

    Raises:
        DataError: for a missing or broken tar, too many bad samples (the first is named), or a folder that cannot be
            written.
    """
    pool = Pool(shards)
    samples, skips = [], Skips()
    for row in range(len(pool)):
        key = printable(pool.key(row))
        with skips.counting():
            try:
                samples.append(_sample(pool, row, Path(folder), prompt))
            except UnusablePair as reason:
                raise Unusable(
                    f"sample '{key}': {reason}",
                    remedy="give every KEY a picture and a KEY.txt or a conversation",
                    reason=str(reason),
                ) from reason
            except OSError as error:
                raise DataError(
                    f"the picture of sample '{key}' cannot be unpacked into {folder}: {error}",
                    remedy="free some space, or name a folder that can be written; what is there is kept",
                    field="folder",
                ) from error
    return readable(samples, skips, len(pool), max_unusable_fraction, Path(folder))


def _sample(pool: Pool, row: int, folder: Path, prompt: str) -> Sample:
    """One sample of the tars.

    Raises:
        UnusablePair: if it has no words, is a caption without a picture, or its KEY.json, which may have been a
            conversation, cannot be read, or if a member has too many bytes.
        Unusable: if its conversation is malformed.
    """
    key, members = printable(pool.key(row)), pool.members(row)
    for extension, member in members.items():
        if member.size > (_MAX_PICTURE if extension in IMAGES else _MAX_WORDS):
            raise UnusablePair(f"KEY.{printable(extension)} has too many bytes")
    try:
        metadata = parse_json(pool.read(row, "json") or b"{}", "KEY.json")
    except ValueError as error:
        raise UnusablePair("unreadable KEY.json") from error
    if not isinstance(metadata, dict):
        raise UnusablePair("KEY.json is no object")
    picture = _unpack(pool, row, folder)
    if "conversations" in metadata:
        return from_llava(metadata | {"image": [picture.name] if picture else []}, key, folder)
    if "messages" in metadata:
        return from_messages(metadata | {"images": [picture] if picture else []}, key)
    text = pool.text(row)
    if picture is None:
        raise UnusablePair("no picture")
    check_words(f"sample '{key}'", [("", text)], 1)
    return Sample(key, ((prompt, text),), (picture,), str(metadata.get("kind", "caption")))


def _unpack(pool: Pool, row: int, folder: Path) -> Path | None:
    """The sample's picture as a file; None if it has none. The tar's own names could lead anywhere."""
    extension = next((e for e in pool.members(row) if e in IMAGES), None)
    if extension is None:
        return None
    content = pool.read(row, extension) or b""
    target = folder / f"{hashlib.sha256(content).hexdigest()[:32]}.{extension}"
    if target.is_symlink() or not target.is_file():  # a link there may lead anywhere: it is replaced
        with whole_file(target) as temporary:
            temporary.write_bytes(content)
    return target
