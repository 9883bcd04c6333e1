# SPDX-License-Identifier: Apache-2.0
"""Conversations about pictures: LLaVA's JSON, and rows of messages as trl and datasets hold them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aced_sdk import files
from aced_sdk.errors import DataError, UnsupportedError
from aced_sdk.files import ReadError, inside, printable
from vlm.chat import IMAGE
from vlm.pictures import Picture, open_picture

_MAX_JSON = 4 * 2**30  # LLaVA's JSON of pre-training has several hundred MB
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


@dataclass(frozen=True)
class Sample:
    """One conversation.

    Attributes:
        key: its name in messages to the user.
        turns: questions with their answers; the pictures stand before the first question.
        images: paths or PIL pictures; none is a conversation without pictures.
        kind: what scores are grouped by.
        answers: all right answers to the last question, one for each annotator where there were several; empty: its
            turn's answer alone. A turn's answer that is not among them counts too.
    """

    key: str
    turns: tuple[tuple[str, str], ...]
    images: tuple[Picture, ...] = ()
    kind: str = ""
    answers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what is easily written wrong by hand.

        Raises:
            DataError: if the fields are not in this form.
        """
        given: Any = self  # by people, whatever the types say
        wrong = [
            name
            for name, kind, values in (
                ("turns", list | tuple, given.turns),
                ("images", Picture, given.images),
                ("answers", str, given.answers),
            )
            if not isinstance(values, list | tuple) or not all(isinstance(value, kind) for value in values)
        ]
        if not wrong and not all(len(turn) == 2 and all(isinstance(x, str) for x in turn) for turn in given.turns):
            wrong = ["turns"]
        if wrong:
            raise DataError(
                f"the {wrong[0]} of conversation '{self.key}' are {getattr(self, wrong[0])!r:.100}",
                remedy="write turns=((question, answer),), images=(path or PIL picture,), answers=(text,)",
                field=wrong[0],
            )


def check_samples(data: Iterable[Any]) -> None:
    """Refuse data in another form before work is done on it.

    Raises:
        DataError: if something in it is not a `Sample`; it is named by its number.
    """
    for number, one in enumerate(data):
        if not isinstance(one, Sample):
            raise DataError(
                f"the data's number {number} is a {type(one).__name__}, no vlm.Sample: {one!r:.100}",
                remedy="read it with vlm.load_llava, vlm.load_messages or another vlm.load_..., or make vlm.Sample",
                field="data",
            )


@dataclass(frozen=True)
class Samples(Sequence[Sample]):
    """Conversations, and what was left out.

    Attributes:
        samples: what can be used.
        skipped: one message for each conversation whose picture could not be read.
    """

    samples: tuple[Sample, ...]
    skipped: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples)

    def __getitem__(self, index: Any) -> Any:
        return self.samples[index]


def load_llava(json_path: str | Path, image_root: str | Path, max_bad_fraction: float = 0.02) -> Samples:
    """Read LLaVA's JSON: `[{"id", "image", "conversations": [{"from": "human" | "gpt", "value"}]}]`.

    `image` may be a list; `kind` and `answers` (a list of right answers) are read where they stand beside it. A picture
    outside of `image_root`, through a link too, counts as unreadable.

    Args:
        json_path: a file of at most 4 GiB.
        image_root: folder that `image` is relative to.
        max_bad_fraction: share of conversations with an unreadable picture above which nothing is returned.

    Raises:
        DataError: for a malformed conversation (it is named), or too many unreadable pictures.
    """
    entries = read_json(json_path, "json_path")
    if not isinstance(entries, list):
        raise DataError(f"{json_path} holds no list of conversations", remedy="write LLaVA's JSON", field="json_path")
    root = Path(image_root)
    samples = [from_llava(entry, index, root) for index, entry in enumerate(entries)]
    return readable(samples, max_bad_fraction, root)


def load_messages(rows: Iterable[Mapping[str, Any]], max_bad_fraction: float = 0.02) -> Samples:
    """Rows `{"messages": [{"role", "content"}], "images": [...]}` with content a text or a list of
    `{"type": "image"}` and `{"type": "text", "text"}`.

    Args:
        rows: what trl's trainers take; `kind`, `answers` and `id` are read where they stand beside it.
        max_bad_fraction: as in `load_llava`.

    Raises:
        DataError: for a malformed row (it is named), or too many unreadable pictures.
    """
    return readable([from_messages(row, index) for index, row in enumerate(rows)], max_bad_fraction)


def from_messages(row: Mapping[str, Any], index: int | str) -> Sample:
    """One row of `load_messages`; `index` names it where it has no `id`."""
    key = _key(row, index)
    try:
        messages = [(str(message["role"]), _text_of(message["content"])) for message in row["messages"]]
        shown = row.get("images", row.get("image"))
        images = (shown,) if isinstance(shown, Picture) else tuple(shown or ())
        return _sample(key, messages, images, row)
    except (AttributeError, KeyError, TypeError) as error:
        raise DataError(
            f"conversation '{key}' is not in the form of messages ({type(error).__name__}: {error})",
            remedy='write {"messages": [{"role", "content"}], "images": [...]}',
        ) from error


def from_llava(entry: Any, index: int | str, root: Path) -> Sample:
    """One entry of `load_llava`; `index` names it where it has no `id`."""
    key = _key(entry, index)
    try:
        named = entry.get("image") or []
        messages = [(str(turn["from"]), words(turn["value"])) for turn in entry["conversations"]]
        images = tuple(root / name for name in ([named] if isinstance(named, str) else named))
        return _sample(key, messages, images, entry)
    except (AttributeError, KeyError, TypeError) as error:
        raise DataError(
            f"conversation '{key}' is not in LLaVA's form ({type(error).__name__}: {error})",
            remedy='write {"id", "image", "conversations": [{"from", "value"}]}',
        ) from error


def _key(entry: Any, index: int | str) -> str:
    found = entry.get("id") if isinstance(entry, Mapping) else None
    return printable(index if found is None else found)


def words(value: Any) -> str:
    """A text, or a number as one; anything else would become words that nobody wrote."""
    if not isinstance(value, str | int | float):
        raise TypeError(f"{value!r:.60} is no text")
    return str(value)


def _text_of(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "".join(IMAGE if part["type"] == "image" else words(part["text"]) for part in content)


def _sample(key: str, messages: list[tuple[str, str]], images: tuple[Picture, ...], extra: Mapping[str, Any]) -> Sample:
    roles = [_ROLES.get(role, role) for role, _ in messages]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise DataError(
            f"conversation '{key}' has the turns {roles}", remedy="let a question and its answer take turns"
        )
    texts = [text for _, text in messages]
    markers = [text.count(IMAGE) for text in texts]
    if sum(markers) != len(images):
        raise DataError(
            f"conversation '{key}' has {sum(markers)} {IMAGE} markers and {len(images)} pictures",
            remedy="write one marker for each picture",
        )
    if sum(markers) != markers[0]:
        raise UnsupportedError(
            f"conversation '{key}' has a picture after its first question", remedy="put all pictures first"
        )
    if sum(bool(part.strip()) for part in texts[0].split(IMAGE)) > 1:
        raise UnsupportedError(
            f"conversation '{key}' has a picture amid its words, and pictures stand before them here",
            remedy=f"put all {IMAGE} markers first, and name the pictures by their order",
        )
    texts = [text.replace(IMAGE, "").strip() for text in texts]
    for text, role in zip(texts, roles, strict=True):
        if not text:
            what = "answer" if role == "assistant" else "question"
            raise DataError(f"conversation '{key}' has an empty {what}", remedy="fill it in or remove the conversation")
    turns = tuple(zip(texts[::2], texts[1::2], strict=True))
    answers = extra.get("answers") or ()
    if isinstance(answers, str):
        raise TypeError("answers is one text, not a list")
    return Sample(key, turns, images, str(extra.get("kind") or ""), tuple(map(words, answers)))


def read_json(path: str | Path, field: str) -> Any:
    """What a JSON file holds.

    Raises:
        DataError: if it cannot be read; `field` is the argument that named it.
    """
    try:
        return files.read_json(path, _MAX_JSON)
    except ReadError as error:
        raise DataError(f"{path} cannot be read: {error.cause}", remedy="name a JSON file", field=field) from error


def readable(samples: Sequence[Sample], max_bad_fraction: float, root: Path | None = None) -> Samples:
    """The samples whose pictures can be read; the others are counted.

    Args:
        samples: conversations.
        max_bad_fraction: share of them above which nothing is returned.
        root: pictures that are files must be in this folder; None: anywhere.

    Raises:
        DataError: if more than `max_bad_fraction` of them cannot be read, or nothing is left.
    """
    verdicts: dict[str, str] = {}
    kept, skipped = [], []
    for sample in samples:
        paths = [image for image in sample.images if isinstance(image, str | Path)]
        for path in paths:
            if str(path) not in verdicts:
                verdicts[str(path)] = _complaint(path, root)
        complaints = [verdicts[str(path)] for path in paths if verdicts[str(path)]]
        if complaints:
            skipped.append(f"conversation '{sample.key}': {complaints[0]}")
        else:
            kept.append(sample)
    if not kept or len(skipped) > max_bad_fraction * len(samples):
        first = f"; the first: {skipped[0]}" if skipped else ""
        raise DataError(
            f"{len(skipped)} of {len(samples)} conversations cannot be used{first}",
            remedy="check image_root and the files, or raise max_bad_fraction",
            field="max_bad_fraction",
        )
    return Samples(tuple(kept), tuple(skipped))


def _complaint(path: str | Path, root: Path | None) -> str:
    try:
        if root is not None:
            inside(root, Path(path).relative_to(root) if Path(path).is_relative_to(root) else path)
        open_picture(path)
    except (DataError, ReadError) as error:
        return error.cause
    return ""
