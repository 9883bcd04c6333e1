# SPDX-License-Identifier: Apache-2.0
"""Who sees what: concepts held out by hash, samples of the rest, and the shuffled captions of the pool."""

from __future__ import annotations

import hashlib
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Literal

from .config import BoxConfig, Size
from .emoji import words
from .pictures import Candidate
from .sources import Kind

Fate = Literal["train", "unseen", "validation"]
_UNSEEN_SHARE = 0.12
_VALIDATION_SHARE = 0.06
_MIN_STYLES = 4  # a held-out concept is worth a class only if several vendors draw it


@dataclass(frozen=True)
class Splits:
    """The candidates of each part."""

    trusted: list[Candidate]
    pool: list[Candidate]
    unseen_style: list[Candidate]
    unseen_concept: list[Candidate]
    flags: list[Candidate]
    validation_style: list[Candidate]
    validation_concept: list[Candidate]

    def everything(self) -> list[Candidate]:
        """Every candidate of any part, once, sorted by key."""
        once: dict[str, Candidate] = {c.key: c for part in fields(self) for c in getattr(self, part.name)}
        return [once[key] for key in sorted(once)]


def split(
    candidates: Sequence[Candidate],
    fates: dict[str, Fate],
    config: BoxConfig,
    size: Size,
    counts: dict[str, Counter[str]],
) -> Splits:
    """Decide the part of every candidate; what is left out of training on purpose is counted under "left_out"."""
    held_out = {words(c.caption) for c in candidates if c.meaning and fates[c.concept] != "train"}
    taken = [c for c in candidates if not c.meaning or share_of(c.concept, config.seed, "slice") < size.concepts]
    trained: list[Candidate] = []
    for candidate in taken:
        if candidate.meaning and fates[candidate.concept] != "train":
            counts["left_out"]["held-out concept"] += candidate.role in ("trusted", "pool")
        elif words(candidate.caption) in held_out:
            counts["left_out"]["caption equals a held-out label"] += 1
        else:
            trained.append(candidate)
    caps: dict[Kind, int | None] = {
        "emoji": size.emoji,
        "icon": size.icons,
        "logo": size.logos,
        "clipart": size.clipart,
    }
    pool: list[Candidate] = []
    for kind, cap in caps.items():
        rows = [c for c in trained if c.role == "pool" and c.kind == kind]
        pool += sample(one_tone(rows, config.seed, counts), cap, config.seed)
    trusted = one_tone([c for c in trained if c.role == "trusted"], config.seed, counts)
    emoji = [c for c in taken if c.kind == "emoji"]
    return Splits(
        trusted=sample(trusted, size.trusted, config.seed),
        pool=pool,
        unseen_style=plain(c for c in trained if c.role == "unseen"),
        unseen_concept=plain(c for c in emoji if fates[c.concept] == "unseen"),
        flags=[c for c in emoji if c.role == "unseen" and c.meaning and c.meaning.country],
        validation_style=plain(c for c in trained if c.role == "validation"),
        # The styles of the final test stay out of what settings are chosen on.
        validation_concept=plain(c for c in emoji if fates[c.concept] == "validation" and c.role != "unseen"),
    )


def decide_fates(candidates: Iterable[Candidate], seed: int) -> dict[str, Fate]:
    """The fate of every emoji concept: about 12 % unseen and 6 % for validation of those that 4 or more styles draw."""
    styles: dict[str, set[str]] = defaultdict(set)
    for candidate in candidates:
        if candidate.meaning:
            styles[candidate.concept].add(candidate.style)
    fates: dict[str, Fate] = {}
    for concept, drawn_by in sorted(styles.items()):
        share = share_of(concept, seed, "fate")
        if len(drawn_by) < _MIN_STYLES or share >= _UNSEEN_SHARE + _VALIDATION_SHARE:
            fates[concept] = "train"
        else:
            fates[concept] = "unseen" if share < _UNSEEN_SHARE else "validation"
    return fates


def share_of(text: str, seed: int, purpose: str) -> float:
    """A number in [0, 1) that depends on nothing but its arguments."""
    digest = hashlib.sha256(f"{seed}:{purpose}:{text}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def sample(rows: Sequence[Candidate], cap: int | None, seed: int) -> list[Candidate]:
    """At most `cap` rows, always the same ones, in their order."""
    if cap is None or len(rows) <= cap:
        return list(rows)
    lowest = sorted(rows, key=lambda c: share_of(c.key, seed, "sample"))[:cap]
    keys = {c.key for c in lowest}
    return [c for c in rows if c.key in keys]


def one_tone(rows: Sequence[Candidate], seed: int, counts: dict[str, Counter[str]]) -> list[Candidate]:
    """All untoned rows and, of each emoji's skin tones, at most one per style: they are near-duplicates."""
    kept: dict[tuple[str, str], Candidate] = {}
    for row in sorted(rows, key=lambda c: share_of(c.key, seed, "tone")):
        if row.meaning and row.meaning.toned:
            kept.setdefault((row.style, row.meaning.drawn), row)
    tones = {c.key for c in kept.values()}
    result = [row for row in rows if not (row.meaning and row.meaning.toned) or row.key in tones]
    counts["left_out"]["further skin tone"] += len(rows) - len(result)
    return result


def plain(rows: Iterable[Candidate]) -> list[Candidate]:
    """Rows to be tested on: without skin tones and gender, one drawing per source and label."""
    once: dict[tuple[str, str], Candidate] = {}
    for row in rows:
        if row.meaning and not row.meaning.toned and not row.meaning.gendered:
            once.setdefault((row.source, row.caption), row)
    return list(once.values())


def shuffle_captions(captions: Sequence[str], share: float, rng: random.Random) -> list[str]:
    """The captions with `share` of them dealt among their rows, so that such a row's caption is not its own.

    Where too many rows share one caption, some keep it.
    """
    rows = rng.sample(range(len(captions)), round(share * len(captions)))
    dealt = [captions[row] for row in rows]
    rng.shuffle(dealt)
    for here, row in enumerate(rows):
        if dealt[here] != captions[row]:
            continue
        for there in rng.sample(range(len(rows)), min(len(rows), 500)):
            if dealt[there] != captions[row] and dealt[here] != captions[rows[there]]:
                dealt[here], dealt[there] = dealt[there], dealt[here]
                break
    result = list(captions)
    for row, caption in zip(rows, dealt, strict=True):
        result[row] = caption
    return result
