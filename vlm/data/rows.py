# SPDX-License-Identifier: Apache-2.0
"""Conversations as token rows. Conversations about the same pictures share one pass over them.

A row is one prefix (a system prompt and the pictures) and several continuations. Every continuation sees the prefix and
itself, at the positions it would have alone, so its loss is what it would be alone; only the cost differs. A
conversation with pictures after its first answer is a row of its own. Rows are packed into bins.

Shapes: R bins of a batch, L their length.
"""

from __future__ import annotations

import hashlib
import heapq
import random
from array import array
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import torch
from torch import Tensor

from aced_sdk.errors import DataError
from aced_sdk.towers.trust import library_errors
from vlm.data import conversation
from vlm.data.pictures import Picture, same_picture
from vlm.data.samples import Sample, check_samples
from vlm.data.skips import Skips, Unusable
from vlm.data.templates import encoded

if TYPE_CHECKING:
    from transformers import LlavaProcessor

IGNORED = -100
_TEMPLATE = (
    "put vlm.data.chat.chat_template(processor.tokenizer)[0] into processor.chat_template, or a template of your own "
    "that writes pictures and has {% generation %} marks around the assistant's words"
)
_Ids = tuple[list[int], list[int]]  # ids and targets of a conversation
_ATTENTION = 500  # tokens at which attention costs about as much as everything else


@dataclass(frozen=True)
class Row:
    """Lists as long as the row.

    Attributes:
        ids: what the model reads.
        targets: the token to predict at each place; -100 where nothing is learned.
        positions: place of each token in its own conversation.
        segments: 0 for the shared prefix, then 1, 2, ... for the continuations.
        pictures: numbers of the pictures, in the order of their tokens.
        samples: how many conversations it holds.
    """

    ids: list[int]
    targets: list[int]
    positions: list[int]
    segments: list[int]
    pictures: list[int]
    samples: int

    @property
    def trained_tokens(self) -> int:
        """Tokens that the loss is taken over."""
        return sum(target != IGNORED for target in self.targets)


@dataclass(frozen=True)
class Batch:
    """Packed rows as tensors, padded to the right.

    Attributes:
        ids: int64 [R, L].
        targets: int64 [R, L], -100 where nothing is learned.
        positions: int64 [R, L].
        segments: int64 [R, L], as in `Row`.
        owners: int64 [R, L], which row a token belongs to; -1 in the padding.
        pictures: numbers of the pictures, in the order of their tokens.
    """

    ids: Tensor
    targets: Tensor
    positions: Tensor
    segments: Tensor
    owners: Tensor
    pictures: list[int]


def messages(sample: Sample) -> list[dict[str, Any]]:
    """The conversation as chat templates take it."""
    return conversation.messages(sample.turns, len(sample.images), sample.system)


class Encoded(NamedTuple):
    """The tokens of a conversation, with one token for each picture.

    Attributes:
        ids: int32 [T].
        learned: uint8 [T], 1 for tokens that the loss is computed on.
    """

    ids: array[int]
    learned: bytes

    def expand(self, image_token: int, image_tokens: int) -> _Ids:
        """Repeat each picture's token, and compute targets.

        Args:
            image_token: id of the picture's token.
            image_tokens: tokens of one picture.

        Returns:
            Token ids, and for each of them the next token if it is learned, else -100. Both end before the last
            learned token.
        """
        ids: list[int] = []
        learned, start = b"", 0
        for place in [place for place, token in enumerate(self.ids) if token == image_token]:
            ids += [*self.ids[start:place], *[image_token] * image_tokens]
            learned += self.learned[start:place] + self.learned[place : place + 1] * image_tokens
            start = place + 1
        ids += self.ids[start:]
        learned += self.learned[start:]
        end = learned.rindex(1)
        targets = [
            token if mark else IGNORED for token, mark in zip(ids[1 : end + 1], learned[1 : end + 1], strict=True)
        ]
        return ids[:end], targets


def encode(sample: Sample, processor: LlavaProcessor, image_tokens: int) -> _Ids:
    """Token ids of a conversation, and per place the token to predict there or -100; as `tokens_of` otherwise."""
    return tokens_of(sample, processor).expand(processor.image_token_id, image_tokens)


def tokens_of(sample: Sample, processor: LlavaProcessor) -> Encoded:
    """The tokens of a conversation.

    Args:
        sample: the conversation.
        processor: its tokenizer, chat template and image token are used.

    Raises:
        Unusable: if nothing can be learned from it.
        DataError: if the chat template fails, does not write its pictures, or does not mark its answers.
    """
    _check_words(sample)
    with library_errors(
        f"conversation '{sample.key}' cannot be written by the processor's chat template",
        remedy=_TEMPLATE,
        field="processor",
        kind=DataError,
    ):
        out = encoded(processor, messages(sample))
    if out["input_ids"].count(processor.image_token_id) != len(sample.images):
        raise DataError(
            f"conversation '{sample.key}' has {len(sample.images)} pictures, and the processor's chat template writes "
            f"{out['input_ids'].count(processor.image_token_id)}",
            remedy=_TEMPLATE,
            field="processor",
        )
    lead = _lead(processor, out["input_ids"])
    learned = bytes(len(lead)) + bytes(map(bool, out["assistant_masks"]))
    if not any(learned):
        raise DataError(
            f"nothing can be learned from conversation '{sample.key}': the processor's chat template marks none of the "
            "assistant's words",
            remedy=_TEMPLATE,
            field="processor",
        )
    return Encoded(array("i", [*lead, *out["input_ids"]]), learned)


def _lead(processor: LlavaProcessor, ids: list[int]) -> list[int]:
    """The beginning-of-text token where processors put one before a prompt, as Llama's and Gemma's do."""
    first = processor.tokenizer("")["input_ids"][:1]
    return list(first) if first == [processor.tokenizer.bos_token_id] and ids[:1] != first else []


def _check_words(sample: Sample) -> None:
    """Refuse what a sample made by hand can have wrong; readers have checked theirs."""
    conversation.check_words(f"conversation '{sample.key}'", sample.turns, len(sample.images), sample.system)
    if not sample.turns or not all(answer.strip() for _, answer in sample.turns):
        raise Unusable(
            f"nothing can be learned from conversation '{sample.key}': it has an empty answer, or none",
            remedy="fill it in or remove the conversation",
            reason="empty answer",
        )


@dataclass(frozen=True)
class _Group:
    """The conversations of a row: their common pictures, the length of their common prefix, and their indices."""

    pictures: tuple[int, ...]
    prefix: int
    numbers: tuple[int, ...]


class Rows(Sequence[Row]):
    """A sequence of rows. Rows are built when they are read; only compact tokens are held in memory.

    Args:
        conversations: all conversations.
        groups: the conversations of each row.
        image_token: id of the picture's token.
        image_tokens: tokens of one picture.
    """

    def __init__(
        self, conversations: Sequence[Encoded], groups: Sequence[_Group], image_token: int, image_tokens: int
    ) -> None:
        self._conversations = conversations
        self._groups = groups
        self._image = (image_token, image_tokens)

    def __len__(self) -> int:
        return len(self._groups)

    @overload
    def __getitem__(self, place: int) -> Row: ...
    @overload
    def __getitem__(self, place: slice) -> list[Row]: ...
    def __getitem__(self, place: int | slice) -> Row | list[Row]:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        group = self._groups[place]
        held = [self._conversations[number].expand(*self._image) for number in group.numbers]
        return _row(held, group.pictures, group.prefix)


def make_rows(
    samples: Sequence[Sample],
    processor: LlavaProcessor,
    image_tokens: int,
    conversations_per_row: int,
    limit: int,
    skips: Skips | None = None,
) -> tuple[Rows, list[Picture]]:
    """Rows, and the list of pictures that they number.

    Args:
        samples: conversations.
        processor: as in `tokens_of`.
        image_tokens: tokens that one picture takes.
        conversations_per_row: conversations about the same pictures that may come into one row.
        limit: tokens that the language model can read.
        skips: counts the conversations that are left out because nothing can be learned from them or they are too long;
            None: they are refused.

    Raises:
        DataError: if there is no conversation, one is no `Sample`, or as in `tokens_of`.
    """
    if not samples:
        raise DataError("there are no conversations", remedy="check the data", field="data")
    check_samples(samples)
    numbers: dict[str | int, int] = {}
    pictures: list[Picture] = []
    conversations: list[Encoded] = []
    together: dict[tuple[tuple[int, ...], int, bytes], list[int]] = defaultdict(list)
    for sample in samples:
        with skips.counting() if skips else nullcontext():
            held = tokens_of(sample, processor)
            ids, targets = held.expand(processor.image_token_id, image_tokens)
            if len(ids) > limit:
                raise Unusable(
                    f"conversation '{sample.key}' has {len(ids)} tokens, the language model reads {limit}",
                    remedy="shorten or remove it; it is never cut, since that could cut a picture",
                    reason="too long",
                )
            for image in sample.images:
                if same_picture(image) not in numbers:
                    numbers[same_picture(image)] = len(pictures)
                    pictures.append(image)
            shown = tuple(numbers[same_picture(image)] for image in sample.images)
            prefix = _prefix(ids, targets, processor.image_token_id)
            lead = hashlib.sha256(array("i", ids[:prefix]).tobytes()).digest()
            together[shown, prefix, lead].append(len(conversations))
            conversations.append(held)
    groups = []
    for (shown, prefix, _), held_numbers in together.items():
        size = conversations_per_row if prefix else 1
        groups += [
            _Group(shown, prefix, tuple(held_numbers[start : start + size]))
            for start in range(0, len(held_numbers), size)
        ]
    return Rows(conversations, groups, processor.image_token_id, image_tokens), pictures


def _prefix(ids: list[int], targets: list[int], image_token: int) -> int:
    """Tokens up to the last picture; 0 if there is none, or something is learned before it."""
    if image_token not in ids:
        return 0
    prefix = len(ids) - ids[::-1].index(image_token)
    learned = next(place for place, target in enumerate(targets) if target != IGNORED)
    return prefix if prefix <= learned else 0


def _row(group: list[_Ids], pictures: Sequence[int], prefix: int) -> Row:
    ids, targets = group[0][0][:prefix], [IGNORED] * prefix
    positions, segments = list(range(prefix)), [0] * prefix
    for number, (more_ids, more_targets) in enumerate(group, start=1):
        ids += more_ids[prefix:]
        targets += more_targets[prefix:]
        positions += range(prefix, len(more_ids))
        segments += [number] * (len(more_ids) - prefix)
    return Row(ids, targets, positions, segments, list(pictures), len(group))


def collate(rows: Sequence[Row], pad: int) -> Batch:
    """Rows packed into bins of like length, so that hardly any padding is computed; rows do not see each other.

    Args:
        rows: in any order. Without any, the batch is one token that nothing is learned from, so that a process with
            nothing to do goes through the same layers as the others.
        pad: token id that fills up a bin.
    """
    rows = rows or [Row([pad], [IGNORED], [0], [0], [], 0)]
    packings = [_pack(rows, count) for count in range(1, len(rows) + 1)]
    width, bins = min(packings, key=lambda packing: len(packing[1]) * packing[0] * (1 + packing[0] / _ATTENTION))

    def table(lists: Callable[[int], list[int]], fill: int) -> Tensor:
        joined = [[value for number in held for value in lists(number)] for held in bins]
        return torch.tensor([values + [fill] * (width - len(values)) for values in joined])

    return Batch(
        ids=table(lambda number: rows[number].ids, pad),
        targets=table(lambda number: rows[number].targets, IGNORED),
        positions=table(lambda number: rows[number].positions, 0),
        segments=table(lambda number: rows[number].segments, 0),
        owners=table(lambda number: [number] * len(rows[number].ids), -1),
        pictures=[picture for held in bins for number in held for picture in rows[number].pictures],
    )


def _pack(rows: Sequence[Row], count: int) -> tuple[int, list[list[int]]]:
    """Rows' numbers in `count` bins, long rows first, each into the emptiest; before them the fullest bin's length."""
    filled = [(0, number) for number in range(count)]
    bins: list[list[int]] = [[] for _ in range(count)]
    for row in sorted(range(len(rows)), key=lambda number: -len(rows[number].ids)):
        length, number = heapq.heappop(filled)
        bins[number].append(row)
        heapq.heappush(filled, (length + len(rows[row].ids), number))
    return max(filled)[0], bins


class Batches:
    """The batches of a stage. A batch depends only on its position, so a resumed run continues with the next one.

    The rows are shuffled once per epoch.

    Args:
        rows: the training data.
        batch_size: rows per batch; at most all rows.
        seed: seed of the shuffles.
    """

    def __init__(self, rows: Sequence[Row], batch_size: int, seed: str) -> None:
        self._rows = rows
        self._size = min(batch_size, len(rows))
        self._seed = seed
        self._order = lru_cache(1)(self._draw)

    def _draw(self, epoch: int) -> array[int]:
        count = len(self._rows)
        return array("q", random.Random(f"{self._seed} {epoch}").sample(range(count), count))

    def at(self, step: int) -> list[Row]:
        """The rows of step `step`; 0 is the first."""
        epoch, place = divmod(step, len(self._rows) // self._size)
        chosen = self._order(epoch)[place * self._size : (place + 1) * self._size]
        return [self._rows[number] for number in chosen]


def shares(rows: Sequence[Row], micro_batch: int | None, rank: int, world_size: int) -> list[list[Row]]:
    """The micro-batches of one process in a step: as many in each process, the last ones without rows if need be.

    Args:
        rows: those of the step, of all processes.
        micro_batch: rows of one; None: all of this process's.
        rank: this process.
        world_size: how many there are.
    """
    mine = list(rows[rank::world_size])
    most = -(-len(rows) // world_size)
    size = min(micro_batch or most, most)
    return [mine[start : start + size] for start in range(0, most, size)]


def fingerprint(rows: Sequence[Row]) -> str:
    """Hex digest of what is trained on, as far as the tokens tell."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr((row.ids, row.targets, row.pictures)).encode())
    return digest.hexdigest()[:16]
