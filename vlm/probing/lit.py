# SPDX-License-Identifier: Apache-2.0
"""LiT-Decoder: a small new text decoder reads a frozen image tower (ACED, arXiv 2411.18674, section 4).

No language model's knowledge stands between the tower and the score, and the tower is run once over the pictures: what
such a decoder learns of captions and answers in so many steps says what the tower holds for generative tasks.

Shapes: P pictures, T tokens of a tower, W their width; R rows of a batch, L their length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from aced_sdk.config import Config, Optimizer, Schedule
from aced_sdk.config import Engine as EngineConfig
from aced_sdk.engine import Learned, Step, TrainingEngine, build_engine, take_steps
from aced_sdk.errors import ConfigError, DataError, EngineError
from aced_sdk.reporting import Progress
from aced_sdk.towers import DualEncoder
from vlm.data.chat import IMAGE
from vlm.data.conversation import check_words
from vlm.data.pictures import Picture, pixels_of, same_picture
from vlm.data.samples import Sample, check_samples
from vlm.generation import Question, asked, check_positive
from vlm.model.towers import VisionTower, open_tower

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_SPECIAL = ("<pad>", "<start>", "<end>", "<answer>")
_PAD, _START, _END, _ANSWER = range(len(_SPECIAL))
_AT_ONCE = 64  # pictures in a forward pass of the tower
_ENGINE = EngineConfig(kind="single", device="cpu", max_nonfinite_steps=0)


class LitDecoder(Config):
    """Size and training of the decoder."""

    width: int = Field(256, gt=0, description="of its residual stream")
    layers: int = Field(4, gt=0, description="blocks of self-attention, attention to the picture and MLP")
    heads: int = Field(4, gt=0, description="of both attentions")
    vocabulary: int = Field(4096, gt=300, description="largest number of byte-level BPE tokens, learned from the data")
    max_tokens: int = Field(64, gt=3, description="of a question and its answer; longer ones are refused")
    steps: int = Field(1000, gt=0, description="optimiser steps")
    batch_size: int = Field(64, gt=0, description="questions with their answers per step")
    learning_rate: float = Field(1e-3, gt=0, description="peak rate of AdamW; cosine to zero")
    weight_decay: float = Field(0.01, ge=0, description="decoupled; matrices only")
    warmup: float = Field(0.05, ge=0, lt=1, description="fraction of the steps with a linear rise")

    @property
    def places(self) -> int:
        """Tokens that the decoder can read and write."""
        return 2 * self.max_tokens

    @model_validator(mode="after")
    def _whole_heads(self) -> Self:
        if self.width % self.heads:
            raise ConfigError(
                f"a width of {self.width} does not divide into {self.heads} heads",
                remedy="make width a multiple of heads",
                field="heads",
            )
        return self


@dataclass(frozen=True, eq=False)
class Turns:
    """Questions about pictures with their answers, each alone.

    Attributes:
        pictures: the different ones.
        places: int64 [N], the picture of each question.
        questions: N texts.
        answers: N texts.
    """

    pictures: list[Picture]
    places: Tensor
    questions: list[str]
    answers: list[str]


class LitModel:
    """A tower with the decoder that was trained on it. Made by `lit_decoder`."""

    def __init__(self, tower: VisionTower, tokenizer: Tokenizer, decoder: _Decoder) -> None:
        self.tower = tower
        self.tokenizer = tokenizer
        self.decoder = decoder

    def answer(self, images: Sequence[Picture], questions: Sequence[Question], max_new_tokens: int = 24) -> list[str]:
        """One answer for each picture and its question, decoded greedily.

        Raises:
            ConfigError: if `max_new_tokens` is not above 0.
            DataError: if the numbers differ, a question is no text or has not one picture, a picture cannot be read, or
                a question is too long.
        """
        made = asked(images, questions)
        if any(len(one.images) != 1 or len(one.turns) != 1 for one in made):
            raise DataError(
                "a LiT-decoder reads one picture and one question",
                remedy="give one picture and one text for each, or use a model of vlm.build",
                field="questions",
            )
        if not made:
            return []
        shown = [one.images[0] for one in made]
        different = {same_picture(image): image for image in shown}
        order = {name: place for place, name in enumerate(different)}
        places = torch.tensor([order[same_picture(image)] for image in shown], dtype=torch.int64)
        texts = [_read_as(one.turns[0][0]) for one in made]
        return self.answer_from(features(self.tower, list(different.values())), places, texts, max_new_tokens)

    @torch.inference_mode()
    def answer_from(
        self, features_PTW: Tensor, places: Tensor, questions: Sequence[str], max_new_tokens: int = 24
    ) -> list[str]:
        """`answer` with the tower's features at hand; `places` int64 [N] names the picture of each question."""
        decoder = self.decoder.eval()
        check_room(self.tokenizer, questions, decoder.text.config.n_positions, max_new_tokens)
        ids = [self.tokenizer.encode(question).ids for question in questions]
        order = sorted(range(len(ids)), key=lambda number: len(ids[number]))  # like lengths pad little
        said = [""] * len(ids)
        for start in range(0, len(order), 2 * _AT_ONCE):
            chosen = order[start : start + 2 * _AT_ONCE]
            rows = [[_START, *ids[number], _ANSWER] for number in chosen]
            width = max(map(len, rows))
            tokens = torch.tensor([[_PAD] * (width - len(row)) + row for row in rows])
            out = decoder.text.generate(
                tokens,
                attention_mask=(tokens != _PAD).long(),
                encoder_hidden_states=decoder.read(features_PTW[places[chosen]]),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=_PAD,
            )
            for number, row in zip(chosen, out[:, width:].tolist(), strict=True):
                end = row.index(_END) if _END in row else len(row)
                said[number] = self.tokenizer.decode(row[:end]).strip()
        return said


def check_room(tokenizer: Tokenizer, questions: Sequence[str], room: int, max_new_tokens: int) -> None:
    """Refuse questions that a decoder with so many places cannot read and answer.

    Raises:
        ConfigError: if `max_new_tokens` is not above 0.
        DataError: naming the longest question.
    """
    check_positive(max_new_tokens=max_new_tokens)
    width, longest = max((2 + len(tokenizer.encode(question).ids), question) for question in questions)
    if width + max_new_tokens > room:
        raise DataError(
            f"a question of {width} tokens and {max_new_tokens} new ones do not fit into {room} places: "
            f"'{longest[:60]}'",
            remedy="shorten the question, lower max_new_tokens, or train with a larger max_tokens",
            field="questions",
        )


class _Decoder(nn.Module):
    """Features to the decoder's width, and a GPT-2 that attends to them."""

    def __init__(self, config: LitDecoder, width: int, vocabulary: int) -> None:
        from transformers import GPT2Config, GPT2LMHeadModel

        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, config.width)
        self.text: Any = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=vocabulary,
                n_positions=config.places,
                n_embd=config.width,
                n_layer=config.layers,
                n_head=config.heads,
                add_cross_attention=True,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                bos_token_id=_START,
                eos_token_id=_END,
            )
        )

    def read(self, features_RTW: Tensor) -> Tensor:
        """[R, T, width of the decoder]."""
        out: Tensor = self.project(self.norm(features_RTW.float()))
        return out

    def forward(self, features_RTW: Tensor, ids_RL: Tensor, targets_RL: Tensor) -> Tensor:
        """Mean cross-entropy over the targets that are not -100."""
        hidden = self.text.transformer(ids_RL, encoder_hidden_states=self.read(features_RTW)).last_hidden_state
        learned = targets_RL != -100
        loss: Tensor = F.cross_entropy(self.text.lm_head(hidden[learned]), targets_RL[learned])
        return loss


def lit_decoder(
    vision: str | Path | DualEncoder, data: Sequence[Sample], config: LitDecoder | None = None, seed: int = 0
) -> LitModel:
    """Train a new decoder on a frozen tower, on all questions and captions of the data together.

    Args:
        vision: whatever `vlm.build` takes.
        data: conversations with one picture each; every turn is learned alone.
        config: size and training; None: the defaults.
        seed: of the decoder's first weights and the order of the data.

    Raises:
        ModelError: if the tower cannot be loaded.
        DataError: if a conversation has no or several pictures, is too long, or its picture cannot be read.
        EngineError: if the loss or its gradient is not finite.
    """
    config = config or LitDecoder()
    tower, held = open_tower(vision), turns(data)
    return train(tower, features(tower, held.pictures), held, learn_tokens(held, config), config, seed)


def turns(data: Sequence[Sample]) -> Turns:
    """All turns of the conversations, each with the system prompt before its question.

    Raises:
        DataError: if there is none, one is no `Sample`, or a conversation has no turns, an empty answer, not exactly
            one picture, or words that cannot be read.
    """
    if not data:
        raise DataError("there are no conversations", remedy="check the data", field="data")
    check_samples(data)
    if odd := next((sample for sample in data if len(sample.images) != 1), None):
        raise DataError(
            f"conversation '{odd.key}' has {len(odd.images)} pictures, and a LiT-decoder reads one",
            remedy="leave it out, or tune a model of vlm.build, which takes any number",
            field="data",
        )
    if odd := next((one for one in data if not one.turns or not all(reply.strip() for _, reply in one.turns)), None):
        raise DataError(
            f"nothing can be learned from conversation '{odd.key}': it has an empty answer, or none",
            remedy="fill it in or remove the conversation",
            field="data",
        )
    for sample in data:
        check_words(f"conversation '{sample.key}'", sample.turns, 1, sample.system)
    different = {same_picture(sample.images[0]): sample.images[0] for sample in data}
    order = {name: place for place, name in enumerate(different)}
    places = [order[same_picture(sample.images[0])] for sample in data for _ in sample.turns]
    questions = [_read_as(question, one.system) for one in data for question, _ in one.turns]
    replies = [reply for sample in data for _, reply in sample.turns]
    return Turns(list(different.values()), torch.tensor(places), questions, replies)


def _read_as(question: str, system: str = "") -> str:
    """A question as the decoder reads it; the picture has no place in its words."""
    words = question.replace(IMAGE, "").strip() if IMAGE in question else question
    return f"{system}\n{words}" if system else words


@torch.no_grad()
def features(tower: VisionTower, pictures: Sequence[Picture]) -> Tensor:
    """What the frozen tower makes of each picture: its last tokens, float16 [P, T, W]."""
    parts = []
    with Progress("frozen features", len(pictures), "pictures") as bar:
        for start in range(0, len(pictures), _AT_ONCE):
            pixels = pixels_of(tower.image_processor, pictures[start : start + _AT_ONCE])
            hidden = tower.model(pixels).last_hidden_state
            parts.append((hidden.flatten(2).transpose(1, 2) if tower.convolutional else hidden).half())
            bar.advance(len(pixels))
    return torch.cat(parts)


def learn_tokens(held: Turns, config: LitDecoder) -> Tokenizer:
    """A byte-level BPE of the questions and answers; equal data, equal tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocabulary,
        special_tokens=list(_SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*held.questions, *held.answers], trainer)
    return tokenizer


def train(
    tower: VisionTower, features_PTW: Tensor, held: Turns, tokenizer: Tokenizer, config: LitDecoder, seed: int
) -> LitModel:
    """`lit_decoder` with the tower's features and the tokens at hand."""
    rows = _rows(held, tokenizer, config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        decoder = _Decoder(config, features_PTW.shape[-1], tokenizer.get_vocab_size())
    optimizer = Optimizer(
        learning_rate=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.999), clip_norm=1.0
    )
    engine = build_engine(decoder, _ENGINE, optimizer)
    schedule = Schedule(steps=config.steps, warmup=config.warmup, cooldown=0)
    with Progress("train a decoder", config.steps, "steps") as bar:
        learning = _Learning(features_PTW, held.places, rows, config.batch_size, seed, engine, bar)
        take_steps(learning, engine, schedule, config.learning_rate, _ENGINE)
    return LitModel(tower, tokenizer, decoder.eval())


class _Learning:
    """The steps of the decoder, for `take_steps`; nothing is saved on the way."""

    def __init__(
        self,
        features_PTW: Tensor,
        places: Tensor,
        rows: list[tuple[list[int], int]],
        batch_size: int,
        seed: int,
        engine: TrainingEngine,
        bar: Progress,
    ) -> None:
        self.features, self.places, self.rows = features_PTW, places, rows
        self.engine, self.bar = engine, bar
        self.size = min(batch_size, len(rows))
        self.order = torch.Generator().manual_seed(seed)
        self.left = torch.empty(0, dtype=torch.int64)

    def learn(self, number: int) -> Learned:
        if len(self.left) < self.size:
            self.left = torch.cat([self.left, torch.randperm(len(self.rows), generator=self.order)])
        chosen, self.left = self.left[: self.size], self.left[self.size :]
        ids, targets = _collate([self.rows[row] for row in chosen.tolist()])
        loss = self.engine.forward(self.features[self.places[chosen]], ids, targets)
        finite = bool(loss.detach().isfinite())
        if finite:
            self.engine.backward(loss)
        return Learned(float(loss.detach()), has_gradient=finite)

    def taken(self, step: Step) -> None:
        self.bar.advance(1, loss=step.loss)

    def skipped(self, step: Step, in_a_row: int) -> None:
        """The first one ends the training."""

    def snapshot(self) -> None:
        """Nothing to resume: it takes minutes."""

    def saved(self, number: int, folder: Path) -> None:
        """Never called."""

    def diverged(self, step: Step, in_a_row: int) -> EngineError:
        what = "gradient" if math.isfinite(step.loss) else "loss"
        return EngineError(
            f"the decoder's {what} is not finite at step {step.number}",
            remedy="lower the learning rate, and check the tower's features",
            field="config.learning_rate",
        )


def _rows(held: Turns, tokenizer: Tokenizer, config: LitDecoder) -> list[tuple[list[int], int]]:
    """Token ids of each question and answer, and how many of them come before the answer."""
    rows = []
    for question, answer in zip(held.questions, held.answers, strict=True):
        lead = [_START, *tokenizer.encode(question).ids, _ANSWER]
        row = [*lead, *tokenizer.encode(answer).ids, _END]
        if len(row) > config.max_tokens:
            raise DataError(
                f"'{question[:60]}' and its answer have {len(row)} tokens, more than {config.max_tokens}",
                remedy="raise max_tokens, or leave it out",
                field="config.max_tokens",
            )
        rows.append((row, len(lead)))
    return rows


def _collate(rows: Sequence[tuple[list[int], int]]) -> tuple[Tensor, Tensor]:
    """Ids int64 [R, L] and the token to predict at each place, -100 outside the answers."""
    width = max(len(row) for row, _ in rows) - 1
    ids = torch.full((len(rows), width), _PAD)
    targets = torch.full((len(rows), width), -100)
    for place, (row, lead) in enumerate(rows):
        ids[place, : len(row) - 1] = torch.tensor(row[:-1])
        targets[place, lead - 1 : len(row) - 1] = torch.tensor(row[lead:])
    return ids, targets
