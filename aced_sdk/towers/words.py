# SPDX-License-Identifier: Apache-2.0
"""Byte-pair encoding of words of any length in bounded time and memory, as open_clip's tokenizer gives it.

open_clip goes over a whole word for each merge, so that its time grows with the square of the word's length: a caption
of one word with 4,096 letters takes half a second. It also keeps every word that it has ever seen.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping

_KEPT_WORDS = 100_000
_KEPT_LETTERS = 64  # of a word that is kept; longer ones hardly come twice
END = "</w>"


class Words:
    """From a word to its tokens, joined by spaces; takes the place of `SimpleTokenizer.bpe`.

    Args:
        ranks: pairs of tokens in the order in which they are merged.
        special: tokens that stand for themselves.
    """

    def __init__(self, ranks: Mapping[tuple[str, str], int], special: Mapping[str, str]) -> None:
        self._ranks = ranks
        self._special = dict(special)
        self._known: dict[str, str] = {}

    def __call__(self, word: str) -> str:
        if word in self._special:
            return self._special[word]
        if (known := self._known.get(word)) is not None:
            return known
        pieces = " ".join(merge([*word[:-1], word[-1] + END], self._ranks))
        if len(word) <= _KEPT_LETTERS:
            if len(self._known) >= _KEPT_WORDS:
                self._known.clear()
            self._known[word] = pieces
        return pieces


def merge(pieces: list[str], ranks: Mapping[tuple[str, str], int]) -> list[str]:
    """Merge neighbours, the pair of the lowest rank first: all its places from left to right, then the next pair.

    O(n log n) for n pieces: neighbours are linked, and pairs wait in a heap by rank and place.
    """
    tokens: list[str | None] = list(pieces)
    after = list(range(1, len(tokens) + 1))
    before = list(range(-1, len(tokens) - 1))
    heap: list[tuple[int, int, str, str]] = []

    def offer(place: int) -> None:
        """Let the pair that begins at a place wait for its turn."""
        if place < 0 or (following := after[place]) == len(tokens):
            return
        first, second = tokens[place], tokens[following]
        if first is not None and second is not None and (rank := ranks.get((first, second))) is not None:
            heapq.heappush(heap, (rank, place, first, second))

    for place in range(len(tokens) - 1):
        offer(place)
    while heap:
        lowest = heap[0][0]
        merged = []
        while heap and heap[0][0] == lowest:  # what these merges offer comes after all of them
            _, place, first, second = heapq.heappop(heap)
            following = after[place]
            if tokens[place] != first or following == len(tokens) or tokens[following] != second:
                continue  # one of them has been merged with its other neighbour
            tokens[place], tokens[following] = first + second, None
            after[place] = after[following]
            if after[place] < len(tokens):
                before[after[place]] = place
            merged.append(place)
        for place in merged:
            offer(before[place])
            offer(place)
    return [token for token in tokens if token is not None]
