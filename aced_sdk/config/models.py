# SPDX-License-Identifier: Apache-2.0
"""Which models take part, and the pool they read."""

from __future__ import annotations

from os import PathLike, fspath
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, PositiveInt

from aced_sdk.config.base import Component, Config, JsonObject
from aced_sdk.config.curation import LossForm

CaptionLines = Literal["join", "first"]


def _several(value: Any) -> Any:
    """One path stands for a tuple of one."""
    return (fspath(value),) if isinstance(value, str | PathLike) else value


class Student(Config):
    """The encoder to be trained.

    A name of weights (a folder, `local-dir:FOLDER` or `hf-hub:ORG/REPO`) loads them. The name of an open_clip
    architecture (`ViT-B-32`) and a mapping give new weights.
    """

    architecture: str | JsonObject = Field(
        description="open_clip architecture name (`ViT-B-32`) or `model_cfg` mapping for new weights; "
        "a folder, `local-dir:FOLDER` or `hf-hub:ORG/REPO` for trained ones"
    )
    init_scale: float = Field(10.0, gt=0, description="first value of the learned scale on cosine similarities")
    init_bias: float = Field(-10.0, description="first value of the learned bias of the sigmoid loss")
    mean: tuple[float, float, float] = Field((0.5, 0.5, 0.5), description="per-channel mean, pictures in 0..1")
    std: tuple[float, float, float] = Field((0.5, 0.5, 0.5), description="per-channel deviation, pictures in 0..1")
    resize: Literal["squash", "shortest", "longest"] = Field(
        "squash",
        description="how a picture becomes square: squash, crop after the shortest side, pad after the longest",
    )


class Frozen(Component):
    """A frozen dual encoder that serves as reference or teacher through its cached embeddings."""

    target: ClassVar[str] = "aced_sdk.cache.frozen:FrozenModel"

    model: str = Field(description="folder of a dual encoder, or an open_clip name such as `hf-hub:ORG/REPO`")
    cache: Path | None = Field(None, description="folder of its embedding cache; default: beside the run's caches")


class Stored(Component):
    """Embeddings that the shards themselves carry in `KEY.npz`, as DataCompDR's do; no model is loaded."""

    target: ClassVar[str] = "aced_sdk.cache.frozen:StoredEmbeddings"

    scale: float = Field(gt=0, description="scale on cosine similarities: the factor, not its logarithm")
    bias: float = Field(0.0, description="bias of a sigmoid-trained model; 0 for a softmax-trained one")
    trained_with: LossForm | None = Field(
        None, description="loss that the model was trained with; None: sigmoid if there is a bias, else softmax"
    )
    image: str = Field("image_emb", description="name of the array [augmentations, D] or [D]")
    text: str = Field("text_emb", description="name of the array [captions, D] or [D]; its first row is the caption's")
    parts: tuple[PositiveInt, ...] = Field(
        (), description="embedding sizes of an ensemble's models; each part of the embedding is normalised separately"
    )
    cache: Path | None = Field(None, description="folder of the embedding cache made of them; default: as for a model")


class Data(Config):
    """The pool: pairs in WebDataset tars (KEY.jpg|png|webp, KEY.txt, KEY.json)."""

    shards: Annotated[tuple[str, ...], BeforeValidator(_several)] = Field(
        min_length=1, description="a tar, a folder of tars, or several; braces such as {0000..0099} expand"
    )
    prepared: Path | None = Field(
        None,
        description="folder for resized uint8 pictures and tokens, made once and memory-mapped; "
        "for pools that fit on disk",
    )
    max_bad_fraction: float = Field(0.02, ge=0, le=1, description="share of unusable pairs above which the run stops")
    max_pixels: int = Field(100_000_000, gt=0, description="pictures with more pixels are skipped and counted")
    max_caption_bytes: int = Field(
        4096, gt=0, description="pairs with longer captions are skipped and counted: a word of many letters takes long"
    )
    caption_lines: CaptionLines = Field(
        "join",
        description="a caption of several lines: 'join' reads it as one text, 'first' takes its first line, "
        "for pools that hold one caption per line",
    )
    workers: int = Field(2, ge=1, le=1024, description="threads that read and decode ahead")
