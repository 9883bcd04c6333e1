# SPDX-License-Identifier: Apache-2.0
"""Encoders ranked by what small decoders learn from them, with the spread over seeds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor

from aced_sdk.errors import ConfigError, EvaluationError
from aced_sdk.towers import DualEncoder
from vlm.data.pictures import same_picture
from vlm.data.samples import Sample
from vlm.model.towers import open_tower
from vlm.probing.lit import LitDecoder, LitModel, Turns, check_room, features, learn_tokens, train, turns
from vlm.scoring.captions import caption_scores
from vlm.scoring.evaluate import deal, right

Vision = str | Path | DualEncoder


@dataclass(frozen=True)
class Spread:
    """One figure over seeds: mean, sample deviation (0 for one seed) and the values in the order of the seeds."""

    mean: float
    std: float
    values: tuple[float, ...]


@dataclass(frozen=True)
class EncoderRank:
    """One encoder.

    Attributes:
        name: as given.
        scores: `accuracy` of answers (0 to 1) and `cider` of captions (0 to 10), whichever there is to measure, and
            each with `blind_` before it: with other samples' pictures.
        by_kind: the same of each kind of conversation (`Sample.kind`) alone.
    """

    name: str
    scores: dict[str, Spread]
    by_kind: dict[str, dict[str, Spread]]


@dataclass(frozen=True)
class Ranking:
    """Encoders, the best first by `by`.

    Attributes:
        by: the figure that orders them: accuracy, or cider where only captions are scored.
        seeds: of the decoders.
        encoders: one each.
    """

    by: str
    seeds: tuple[int, ...]
    encoders: tuple[EncoderRank, ...]

    def lead(self, name: str, over: str, score: str | None = None, kind: str | None = None) -> Spread:
        """By how much one encoder is better than another, seed by seed.

        Args:
            name: the one.
            over: the other.
            score: which figure; None: the one that orders the ranking.
            kind: of these conversations alone; None: of all.

        Raises:
            EvaluationError: if there is no such encoder, score or kind.
        """
        found = {one.name: one.scores if kind is None else one.by_kind.get(kind, {}) for one in self.encoders}
        metric = score or self.by
        for one in (name, over):
            if metric not in found.get(one, {}):
                raise EvaluationError(
                    f"the ranking has no {metric} of '{one}'" + ("" if kind is None else f" for the kind '{kind}'"),
                    remedy=f"name two of {', '.join(found)}, one of {', '.join(self.encoders[0].scores)}, and as kind "
                    f"None or one of {', '.join(self.encoders[0].by_kind)}",
                    field="name",
                )
        pairs = zip(found[name][metric].values, found[over][metric].values, strict=True)
        return spread([ours - theirs for ours, theirs in pairs])

    def table(self) -> str:
        """Markdown, a row an encoder: mean ± deviation; accuracy in per cent, CIDEr times 100 as published tables."""
        metrics = list(self.encoders[0].scores)
        lines = ["| encoder | " + " | ".join(name.replace("_", " ") for name in metrics) + " |"]
        lines.append("|---|" + "---|" * len(metrics))
        for encoder in self.encoders:
            cells = [f"{100 * score.mean:.1f} ± {100 * score.std:.1f}" for score in encoder.scores.values()]
            lines.append(f"| {encoder.name} | " + " | ".join(cells) + " |")
        return "\n".join(lines) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)


def rank_encoders(
    encoders: Mapping[str, Vision | Sequence[Vision]] | Sequence[str | Path],
    data: Sequence[Sample],
    held_out: Sequence[Sample],
    config: LitDecoder | None = None,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    captions: Collection[str] = ("caption",),
    max_new_tokens: int = 24,
) -> Ranking:
    """Train a new decoder on every encoder with every seed, and score them on the same held-out pictures.

    Args:
        encoders: name to encoder (whatever `vlm.build` takes); or to as many as there are seeds, where each was itself
            made with a seed: then the spread is that of both. A list of folders or hub names is named by itself.
        data: conversations with one picture each, to learn from.
        held_out: conversations to be scored by. None of their pictures should be in `data`.
        config: size and training of the decoders; None: the defaults.
        seeds: of the decoders; each is the same for every encoder, so that leads can be taken in pairs.
        captions: the kinds of conversations (`Sample.kind`) that are scored by CIDEr, against their answers; all others
            are scored by accuracy, as `vlm.evaluate` does.
        max_new_tokens: longest answer.

    Raises:
        ConfigError: if there is no encoder or seed, an encoder stands twice in a list or comes in another number than
            the seeds, or `max_new_tokens` is not above 0.
        ModelError, DataError, EngineError: as `lit_decoder`.
        EvaluationError: if a held-out picture is one of those learned from, or all are the same.
    """
    config, seeds = config or LitDecoder(), tuple(seeds)
    captions = (captions,) if isinstance(captions, str) else captions
    towers = {name: _per_seed(name, vision, seeds) for name, vision in _named(encoders).items()}
    if not towers or not seeds or len(set(seeds)) < len(seeds):
        raise ConfigError(
            f"{len(towers)} encoders and the seeds {list(seeds)}",
            remedy="give one encoder or more, and one seed or more, each once",
            field="seeds" if towers else "encoders",
        )
    taught, asked = turns(data), turns(held_out)
    known = {same_picture(picture) for picture in taught.pictures}
    if both := [picture for picture in asked.pictures if same_picture(picture) in known]:
        raise EvaluationError(
            f"{len(both)} held-out pictures are learned from, {both[0]} first",
            remedy="keep the pictures of both sets apart",
            field="held_out",
        )
    exam = _Exam(held_out, asked, captions, seeds[0])
    tokenizer = learn_tokens(taught, config)
    check_room(tokenizer, exam.questions, config.places, max_new_tokens)  # before anything is trained
    ranks = []
    for name, visions in towers.items():
        found: dict[tuple[str | None, str], list[float]] = defaultdict(list)
        read: dict[int, tuple[Any, Tensor, Tensor]] = {}
        for seed, vision in zip(seeds, visions, strict=True):
            if id(vision) not in read:
                tower = open_tower(vision)
                read = {id(vision): (tower, features(tower, taught.pictures), features(tower, asked.pictures))}
            tower, seen, unseen = read[id(vision)]
            model = train(tower, seen, taught, tokenizer, config, seed)
            for figure, value in exam.score(model, unseen, max_new_tokens).items():
                found[figure].append(value)
        spreads: dict[str | None, dict[str, Spread]] = defaultdict(dict)
        for (kind, metric), values in found.items():
            spreads[kind][metric] = spread(values)
        ranks.append(EncoderRank(name, spreads[None], {kind: of for kind, of in spreads.items() if kind is not None}))
    by = "accuracy" if "accuracy" in ranks[0].scores else "cider"
    ranks.sort(key=lambda rank: -rank.scores[by].mean)
    return Ranking(by, seeds, tuple(ranks))


def spread(values: Sequence[float]) -> Spread:
    """Mean and sample deviation."""
    return Spread(mean(values), stdev(values) if len(values) > 1 else 0.0, tuple(values))


def _named(
    encoders: Mapping[str, Vision | Sequence[Vision]] | Sequence[str | Path],
) -> Mapping[str, Vision | Sequence[Vision]]:
    if isinstance(encoders, Mapping):
        return encoders
    given = [encoders] if isinstance(encoders, str | Path) else list(encoders)
    named = {str(one): one for one in given if isinstance(one, str | Path)}
    if len(named) < len(given):
        raise ConfigError(
            "the list of encoders names one twice, or holds a loaded one",
            remedy="write {name: encoder}",
            field="encoders",
        )
    return named


def _per_seed(name: str, vision: Vision | Sequence[Vision], seeds: Sequence[int]) -> list[Vision]:
    if isinstance(vision, str | Path | DualEncoder):
        return [vision] * len(seeds)
    if len(vision) != len(seeds):
        raise ConfigError(
            f"'{name}' names {len(vision)} encoders, and there are {len(seeds)} seeds",
            remedy="name one encoder, or one for each seed",
            field="encoders",
        )
    return list(vision)


class _Exam:
    """The held-out questions, each about its own picture and about another sample's."""

    def __init__(self, held_out: Sequence[Sample], asked: Turns, captions: Collection[str], seed: int) -> None:
        self.questions, places = asked.questions, asked.places
        self.accepted = [
            tuple(dict.fromkeys((reply, *(sample.answers if turn == len(sample.turns) - 1 else ()))))
            for sample in held_out
            for turn, (_, reply) in enumerate(sample.turns)
        ]
        kinds = [sample.kind for sample in held_out for _ in sample.turns]
        self.captions = {number for number, kind in enumerate(kinds) if kind in captions}
        self.asked: dict[str | None, list[int]] = {None: list(range(len(kinds)))}
        for number, kind in enumerate(kinds):
            self.asked.setdefault(kind, []).append(number)
        own = [sample.images for sample in held_out for _ in sample.turns]
        of_picture = {same_picture(images[0]): int(place) for images, place in zip(own, places.tolist(), strict=True)}
        self.places = places
        self.dealt = torch.tensor([of_picture[same_picture(images[0])] for images in deal(own, seed)])

    def score(self, model: LitModel, unseen: Tensor, max_new_tokens: int) -> dict[tuple[str | None, str], float]:
        """Figures by kind and name; those of all kinds together under None."""
        found = {}
        for prefix, places in (("", self.places), ("blind_", self.dealt)):
            said = model.answer_from(unseen, places, self.questions, max_new_tokens)
            for kind, numbers in self.asked.items():
                if others := [number for number in numbers if number not in self.captions]:
                    found[kind, f"{prefix}accuracy"] = mean(right(said[n], self.accepted[n]) for n in others)
                if captions := [number for number in numbers if number in self.captions]:
                    texts, references = [said[n] for n in captions], [self.accepted[n] for n in captions]
                    found[kind, f"{prefix}cider"] = caption_scores(texts, references)["cider"]
        return found
