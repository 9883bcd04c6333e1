# SPDX-License-Identifier: Apache-2.0
"""Conversations about pictures: LLaVA's JSON, and rows of messages as trl and datasets hold them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aced_sdk import files
from aced_sdk.errors import DataError
from aced_sdk.files import ReadError, inside, parse_json, printable
from vlm.data.chat import IMAGE
from vlm.data.conversation import check_letters, check_words
from vlm.data.pictures import Picture, open_picture
from vlm.data.skips import Skips, Unusable

_MAX_JSON = 4 * 2**30  # LLaVA's JSON of pre-training has several hundred MB
_MAX_PICTURES = 1000  # of a conversation
_ROLES = {"human": "user", "gpt": "assistant", "developer": "system"}


@dataclass(frozen=True)
class Sample:
    """One conversation.

    Attributes:
        key: its name in messages to the user.
        turns: questions with their answers. `<image>` in a question marks the place of a picture, one for each of
            `images` in their order. Without any, all pictures are before the first question.
        images: paths or PIL pictures; none is a conversation without pictures.
        kind: what scores are grouped by.
        answers: all right answers to the last question, one for each annotator where there were several; empty: its
            turn's answer alone. A turn's answer that is not among them counts too.
        system: system prompt, before the first question; empty: none.
    """

    key: str
    turns: tuple[tuple[str, str], ...]
    images: tuple[Picture, ...] = ()
    kind: str = ""
    answers: tuple[str, ...] = ()
    system: str = ""

    def __post_init__(self) -> None:
        """Refuse fields that are not in this form, and right answers that cannot be scored.

        Raises:
            Unusable: naming the field or the conversation.
        """
        given: Any = self  # by people, whatever the types say
        wrong = [
            name
            for name, kind, values in (
                ("turns", list | tuple, given.turns),
                ("images", Picture, given.images),
                ("answers", str, given.answers),
                ("kind", str, [given.kind]),
                ("system", str, [given.system]),
            )
            if not isinstance(values, list | tuple) or not all(isinstance(value, kind) for value in values)
        ]
        if not wrong and not all(len(turn) == 2 and all(isinstance(x, str) for x in turn) for turn in given.turns):
            wrong = ["turns"]
        if wrong:
            raise Unusable(
                f"the {wrong[0]} of conversation '{self.key}' are {getattr(self, wrong[0])!r:.100}",
                remedy="write turns=((question, answer),), images=(path or PIL picture,), answers=(text,)",
                field=wrong[0],
                reason="not in the form of a conversation",
            )
        check_letters(f"conversation '{self.key}'", [*self.answers, self.kind])


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
        skipped: one message for each conversation that was left out.
        reasons: how many were left out for each reason.
    """

    samples: tuple[Sample, ...]
    skipped: tuple[str, ...] = ()
    reasons: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples)

    def __getitem__(self, index: Any) -> Any:
        return self.samples[index]


def load_llava(json_path: str | Path, image_root: str | Path, max_unusable_fraction: float = 0.02) -> Samples:
    """Read LLaVA's JSON: `[{"id", "image", "conversations": [{"from": "human" | "gpt" | "system", "value"}]}]`.

    JSON Lines, one conversation per line, are read too. `image` may be a list or missing; `kind` and `answers` (a list
    of right answers) are optional. A picture outside of `image_root`, through a link too, counts as unreadable.

    Args:
        json_path: a UTF-8 file of at most 4 GiB.
        image_root: folder that `image` is relative to.
        max_unusable_fraction: largest fraction of conversations that may be left out because they are malformed or a
            picture is unreadable; `Samples.skipped` and `Samples.reasons` list them.

    Raises:
        DataError: if the file cannot be read, or too many conversations are bad; the first is named.
    """
    entries, root, skips, samples = _read_entries(json_path), Path(image_root), Skips(), []
    for index, entry in enumerate(entries):
        with skips.counting():
            samples.append(from_llava(entry, index, root))
    return readable(samples, skips, len(entries), max_unusable_fraction, root)


def load_messages(rows: Iterable[Mapping[str, Any]], max_unusable_fraction: float = 0.02) -> Samples:
    """Rows `{"messages": [{"role", "content"}], "images": [...]}` with content a text or a list of
    `{"type": "image"}` and `{"type": "text", "text"}`.

    Args:
        rows: what trl's trainers take; `kind`, `answers` and `id` are optional.
        max_unusable_fraction: as in `load_llava`.

    Raises:
        DataError: if the rows are no list of rows, or too many are bad; the first is named.
    """
    if isinstance(rows, str | Path | Mapping) or not isinstance(rows, Iterable):
        raise DataError(
            f"the rows are a {type(rows).__name__}: {rows!r:.100}",
            remedy="give a list of rows or a dataset; read files with vlm.load_llava or json.load",
            field="rows",
        )
    skips, samples, count = Skips(), [], 0
    for index, row in enumerate(rows):
        count += 1
        with skips.counting():
            samples.append(from_messages(row, index))
    return readable(samples, skips, count, max_unusable_fraction)


def from_messages(row: Mapping[str, Any], index: int | str) -> Sample:
    """One row of `load_messages`; `index` names it where it has no `id`.

    Raises:
        Unusable: if it is malformed.
    """
    key = _key(row, index)
    try:
        messages = [(str(message["role"]), _text_of(message["content"])) for message in row["messages"]]
        shown = row.get("images", row.get("image"))
        images = (shown,) if isinstance(shown, Picture) else tuple(shown or ())
        return _sample(key, messages, images, row)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise Unusable(
            f"conversation '{key}' is not in the form of messages ({type(error).__name__}: {error})",
            remedy='write {"messages": [{"role", "content"}], "images": [...]}',
            reason="not in the form of messages",
        ) from error


def from_llava(entry: Any, index: int | str, root: Path) -> Sample:
    """One entry of `load_llava`; `index` names it where it has no `id`.

    Raises:
        Unusable: if it is malformed.
    """
    key = _key(entry, index)
    if isinstance(entry, ReadError):
        raise Unusable(
            f"conversation '{key}' cannot be read: {entry.cause}", remedy="correct the line", reason="line is not JSON"
        )
    try:
        named = entry.get("image") or []
        messages = [(str(turn["from"]), words(turn["value"])) for turn in entry["conversations"]]
        images = tuple(root / name for name in ([named] if isinstance(named, str) else named))
        return _sample(key, messages, images, entry)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise Unusable(
            f"conversation '{key}' is not in LLaVA's form ({type(error).__name__}: {error})",
            remedy='write {"id", "image", "conversations": [{"from", "value"}]}',
            reason="not in LLaVA's form",
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
    texts = [text.strip() for _, text in messages]
    first = next((number for number, role in enumerate(roles) if role != "system"), len(roles))
    if first == len(roles) or roles[first:] != ["user", "assistant"] * ((len(roles) - first) // 2):
        raise Unusable(
            f"conversation '{key}' has the turns {roles}",
            remedy="let questions and answers take turns, with system prompts before them",
            reason="turns do not alternate",
        )
    questions, answers = texts[first::2], texts[first + 1 :: 2]
    if (markers := "".join(texts).count(IMAGE)) != len(images):
        raise Unusable(
            f"conversation '{key}' has {markers} {IMAGE} markers and {len(images)} pictures",
            remedy="write one marker for each picture",
            reason="markers and pictures differ in number",
        )
    if len(images) > _MAX_PICTURES:
        raise Unusable(
            f"conversation '{key}' has {len(images):,} pictures",
            remedy=f"show at most {_MAX_PICTURES:,}",
            reason="too many pictures",
        )
    questions = [_pictures_first(question) for question in questions]
    if not all(questions) or not all(answers):
        what = "question" if not all(questions) else "answer"
        raise Unusable(
            f"conversation '{key}' has an empty {what}",
            remedy="fill it in or remove the conversation",
            reason=f"empty {what}",
        )
    if (start := questions[0].removeprefix(IMAGE * markers)) != questions[0] and IMAGE not in start:
        questions[0] = start  # all pictures are before the first question: no markers are needed
    turns, system = tuple(zip(questions, answers, strict=True)), "\n".join(texts[:first])
    check_words(f"conversation '{key}'", turns, len(images), system)
    right = extra.get("answers") or ()
    if isinstance(right, str):
        raise TypeError("answers is one text, not a list")
    return Sample(key, turns, images, str(extra.get("kind") or ""), tuple(map(words, right)), system)


def _pictures_first(question: str) -> str:
    """A question whose markers are all around its words gets them in front; a marker inside of them stays there.

    Empty if there are no words.
    """
    parts = question.split(IMAGE)
    filled = [place for place, part in enumerate(parts) if part.strip()]
    inner = IMAGE.join(parts[filled[0] : filled[-1] + 1]).strip() if filled else ""
    if not inner or IMAGE in inner:
        return inner and question
    return IMAGE * question.count(IMAGE) + inner


def _read_entries(path: str | Path) -> list[Any]:
    """The conversations of a JSON file; of JSON Lines, an error in the place of each line that is not JSON."""
    text = _read_text(path, "json_path")
    try:
        content = parse_json(text, str(path))
    except ReadError as error:
        lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
        if len(lines) < 2 or not lines[0][1].lstrip().startswith("{"):
            raise _not_json(path, error, "json_path") from error
        return [_line(line, f"line {number}") for number, line in lines]
    content = [content] if isinstance(content, dict) and "conversations" in content else content
    if not isinstance(content, list):
        raise DataError(f"{path} holds no list of conversations", remedy="write LLaVA's JSON", field="json_path")
    return content


def _line(line: str, name: str) -> Any:
    try:
        return parse_json(line, name)
    except ReadError as error:
        cause, remedy = error.cause, error.remedy
    return ReadError(cause, remedy=remedy)  # a new one, which keeps no traceback: there may be a million of them


def read_json(path: str | Path, field: str) -> Any:
    """What a JSON file holds.

    Raises:
        DataError: if it cannot be read; `field` is the argument that named it.
    """
    try:
        return parse_json(_read_text(path, field), str(path))
    except ReadError as error:
        raise _not_json(path, error, field) from error


def _read_text(path: str | Path, field: str) -> str:
    try:
        return files.read_text(path, _MAX_JSON)
    except ReadError as error:
        raise _not_json(path, error, field) from error


def _not_json(path: str | Path, error: ReadError, field: str) -> DataError:
    return DataError(f"{path} cannot be read: {error.cause}", remedy="name a JSON file", field=field)


def readable(
    samples: Sequence[Sample], skips: Skips, total: int, max_unusable_fraction: float, root: Path | None = None
) -> Samples:
    """The samples whose pictures can be read; the others are left out and counted.

    Args:
        samples: conversations.
        skips: what was left out before.
        total: conversations, with those left out.
        max_unusable_fraction: as in `load_llava`.
        root: pictures that are files must be in this folder; None: anywhere.

    Raises:
        DataError: if more than `max_unusable_fraction` of all are left out, or nothing is left.
    """
    verdicts: dict[str, Unusable | None] = {}
    kept = []
    for sample in samples:
        paths = [str(image) for image in sample.images if isinstance(image, str | Path)]
        for path in paths:
            if path not in verdicts:
                verdicts[path] = _complaint(path, root)
        with skips.counting():
            for complaint in filter(None, map(verdicts.get, paths)):
                raise Unusable(
                    f"conversation '{sample.key}': {complaint.cause}",
                    remedy="check image_root and the files",
                    reason=complaint.reason,
                )
            kept.append(sample)
    skips.check(total, max_unusable_fraction)
    if not kept:
        raise DataError("there are no conversations", remedy="check the data", field="data")
    return Samples(tuple(kept), tuple(skips.messages), dict(skips.reasons))


def _complaint(path: str, root: Path | None) -> Unusable | None:
    """What is wrong with a picture."""
    try:
        if root is not None:
            inside(root, Path(path).relative_to(root) if Path(path).is_relative_to(root) else path)
        open_picture(path)
    except ReadError as error:
        return Unusable(error.cause, remedy=error.remedy, reason="picture outside of its folder")
    except Unusable as error:
        return error
    return None
