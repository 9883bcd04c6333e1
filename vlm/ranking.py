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
from vlm.data import Sample
from vlm.metrics import caption_scores
from vlm.pictures import same_picture
from vlm.probing import LitDecoder, LitModel, check_room, features, learn_tokens, train, turns
from vlm.scoring import deal, right
from vlm.towers import open_tower

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
    """

    name: str
    scores: dict[str, Spread]


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

    def lead(self, name: str, over: str, score: str | None = None) -> Spread:
        """By how much one encoder is better than another, seed by seed.

        Raises:
            EvaluationError: if there is no such encoder or score.
        """
        found = {encoder.name: encoder.scores for encoder in self.encoders}
        metric = score or self.by
        for one in (name, over):
            if metric not in found.get(one, {}):
                raise EvaluationError(
                    f"the ranking has no {metric} of '{one}'",
                    remedy=f"name two of {', '.join(found)}, and one of {', '.join(self.encoders[0].scores)}",
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
    exam = _Exam(held_out, asked.places, captions, seeds[0])
    tokenizer = learn_tokens(taught, config)
    check_room(tokenizer, exam.questions, config.places, max_new_tokens)  # before anything is trained
    ranks = []
    for name, visions in towers.items():
        found: dict[str, list[float]] = defaultdict(list)
        read: dict[int, tuple[Any, Tensor, Tensor]] = {}
        for seed, vision in zip(seeds, visions, strict=True):
            if id(vision) not in read:
                tower = open_tower(vision)
                read = {id(vision): (tower, features(tower, taught.pictures), features(tower, asked.pictures))}
            tower, seen, unseen = read[id(vision)]
            model = train(tower, seen, taught, tokenizer, config, seed)
            for metric, value in exam.score(model, unseen, max_new_tokens).items():
                found[metric].append(value)
        ranks.append(EncoderRank(name, {metric: spread(values) for metric, values in found.items()}))
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

    def __init__(self, held_out: Sequence[Sample], places: Tensor, captions: Collection[str], seed: int) -> None:
        self.questions = [question for sample in held_out for question, _ in sample.turns]
        self.accepted = [
            tuple(dict.fromkeys((reply, *(sample.answers if turn == len(sample.turns) - 1 else ()))))
            for sample in held_out
            for turn, (_, reply) in enumerate(sample.turns)
        ]
        kinds = [sample.kind in captions for sample in held_out for _ in sample.turns]
        self.captions = [number for number, caption in enumerate(kinds) if caption]
        self.others = [number for number, caption in enumerate(kinds) if not caption]
        own = [sample.images for sample in held_out for _ in sample.turns]
        of_picture = {same_picture(images[0]): int(place) for images, place in zip(own, places.tolist(), strict=True)}
        self.places = places
        self.dealt = torch.tensor([of_picture[same_picture(images[0])] for images in deal(own, seed)])

    def score(self, model: LitModel, unseen: Tensor, max_new_tokens: int) -> dict[str, float]:
        """Figures by name."""
        found = {}
        for prefix, places in (("", self.places), ("blind_", self.dealt)):
            said = model.answer_from(unseen, places, self.questions, max_new_tokens)
            if self.others:
                found[f"{prefix}accuracy"] = mean(right(said[n], self.accepted[n]) for n in self.others)
            if self.captions:
                texts, references = [said[n] for n in self.captions], [self.accepted[n] for n in self.captions]
                found[f"{prefix}cider"] = caption_scores(texts, references)["cider"]
        return found
