# SPDX-License-Identifier: Apache-2.0
"""Configs of the student, of frozen models and of the pool."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, PositiveInt, SerializeAsAny, ValidationInfo, model_validator

from aced_sdk.config.base import (
    IMPORT_HINT,
    Component,
    Config,
    JsonObject,
    built,
    check_registered,
    register,
    shown,
    unknown,
)
from aced_sdk.config.curation import LossForm
from aced_sdk.errors import ConfigError
from aced_sdk.files import one_line

CaptionLines = Literal["join", "first"]


def _several(value: Any) -> Any:
    """Convert a single path to a tuple."""
    return (fspath(value),) if isinstance(value, str | PathLike) else value


Weight = Annotated[float, Field(gt=0, le=1e6)]


class Student(Config):
    """The encoder to train.

    A folder, `local-dir:FOLDER` or `hf-hub:ORG/REPO` loads trained weights. The name of an open_clip architecture
    (`ViT-B-32`) or a mapping gives new weights.
    """

    architecture: str | JsonObject = Field(
        description="open_clip architecture name (`ViT-B-32`) or `model_cfg` mapping for new weights; "
        "a folder, `local-dir:FOLDER` or `hf-hub:ORG/REPO` for trained weights"
    )
    init_scale: float = Field(10.0, gt=0, description="initial value of the learned scale on cosine similarities")
    init_bias: float = Field(-10.0, description="initial value of the learned bias of the sigmoid loss")
    mean: tuple[float, float, float] = Field((0.5, 0.5, 0.5), description="mean per channel, for pictures in 0..1")
    std: tuple[float, float, float] = Field((0.5, 0.5, 0.5), description="deviation per channel, for pictures in 0..1")
    resize: Literal["squash", "shortest", "longest"] = Field(
        "squash",
        description="how pictures are made square: squash; shortest: resize the shortest side, crop; "
        "longest: resize the longest side, pad",
    )


class FrozenConfig(Component):
    """Base class of the configs of frozen sources, which are used as reference or teacher.

    Subclasses set `kind`, the name used in YAML, and `target`, a class with the interface of
    `aced_sdk.cache.FrozenSource`. A subclass outside this package is registered when its module is imported. Its kind
    must be its own.
    """

    kinds: ClassVar[dict[str, type[FrozenConfig]]] = {}

    kind: str = ""

    @model_validator(mode="after")
    def _own_kind(self) -> Self:
        if self.kind != (own := type(self).model_fields["kind"].default):
            cause = f"{type(self).__name__} is of kind '{own}', not '{one_line(self.kind, 80)}'"
            raise ConfigError(cause, remedy="leave kind out", field="kind")
        return self

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        register(cls, "kind", FrozenConfig.kinds)


class Frozen(FrozenConfig):
    """A frozen dual encoder, used as reference or teacher through its cached embeddings."""

    target: ClassVar[str] = "aced_sdk.cache.frozen:FrozenModel"

    kind: str = "frozen"
    model: str = Field(description="folder of a dual encoder, or an open_clip name such as `hf-hub:ORG/REPO`")
    cache: Path | None = Field(None, description="folder of its embedding cache; default: in the cache home")


class Stored(FrozenConfig):
    """Embeddings stored in the shards (`KEY.npz`), as in DataCompDR. No model is loaded."""

    target: ClassVar[str] = "aced_sdk.cache.frozen:StoredEmbeddings"

    kind: str = "stored"
    scale: float = Field(gt=0, description="scale on cosine similarities (not its logarithm)")
    bias: float = Field(0.0, description="bias of a sigmoid-trained model; 0 for a softmax-trained model")
    trained_with: LossForm | None = Field(
        None, description="loss the model was trained with; None: sigmoid if bias is not 0, else softmax"
    )
    image: str = Field("image_emb", description="name of the array [augmentations, D] or [D]")
    text: str = Field("text_emb", description="name of the array [captions, D] or [D]; the first row is used")
    parts: tuple[PositiveInt, ...] = Field(
        (), description="embedding sizes of the models of an ensemble; each part is normalised separately"
    )
    cache: Path | None = Field(None, description="folder of the embedding cache; default: in the cache home")


class Cached(FrozenConfig):
    """Embeddings of an encoder of your own, written with `aced_sdk.cache.CacheWriter`. No model is loaded."""

    target: ClassVar[str] = "aced_sdk.cache.frozen:CachedEmbeddings"

    kind: str = "cached"
    directory: Path = Field(description="folder of the embedding cache; it must be complete and of the same shards")
    model: str | None = Field(None, description="required name of the model; None: any")


# A mapping without a kind is read as one of these.
_WITHOUT_KIND: tuple[type[FrozenConfig], ...] = (Frozen, Stored, Cached)


def _of_kind(value: Any, info: ValidationInfo) -> FrozenConfig:
    """Build the config of a frozen source from a mapping: by its `kind`, or by its fields if it has none.

    Raises:
        ConfigError: if the kind is unknown, or the config's class is not registered.
    """
    if isinstance(value, FrozenConfig):
        check_registered(value, "kind", FrozenConfig.kinds)
        return value
    if not isinstance(value, Mapping):
        cause = f"'{info.field_name}' takes a mapping of fields (got {shown(value)})"
        raise ConfigError(cause, remedy="write `model: FOLDER`, or a `kind` with its fields")
    if "kind" not in value:
        return built(max(_WITHOUT_KIND, key=lambda kind: len(value.keys() & kind.model_fields.keys())), value)
    kind = value["kind"] if isinstance(value["kind"], str) else ""
    if kind not in FrozenConfig.kinds:
        raise unknown("kind of frozen source", value["kind"], FrozenConfig.kinds, "kind", IMPORT_HINT)
    return built(FrozenConfig.kinds[kind], value)


def _of_kinds(value: Any, info: ValidationInfo) -> FrozenConfig | tuple[FrozenConfig, ...]:
    """As `_of_kind`, for one source or several."""
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        return _of_kind(value, info)
    sources = []
    for place, one in enumerate(value):
        try:
            sources.append(_of_kind(one, info))
        except ConfigError as error:
            raise error.under(str(place)) from None
    return tuple(sources)


_Source = SerializeAsAny[FrozenConfig]
AnyFrozen = Annotated[_Source, BeforeValidator(_of_kind)]
"""Type of a field for a frozen source of any kind."""
SeveralFrozen = Annotated[_Source | tuple[_Source, ...], BeforeValidator(_of_kinds)]
"""Type of a field for one frozen source of any kind, or several."""


class Data(Config):
    """The pool: pairs in WebDataset tars (KEY.jpg|png|webp, KEY.txt, KEY.json)."""

    shards: Annotated[tuple[str, ...], BeforeValidator(_several)] = Field(
        min_length=1, description="tars or folders of tars; braces such as {0000..0099} are expanded"
    )
    prepared: Path | None = Field(
        None,
        description="folder for resized uint8 pictures and tokens, written once and memory-mapped; "
        "for pools that fit on disk",
    )
    max_unusable_fraction: float = Field(0.02, ge=0, le=1, description="fail if more than this fraction is unusable")
    max_pixels: int = Field(100_000_000, gt=0, description="pictures with more pixels are skipped and counted")
    max_caption_bytes: int = Field(
        4096, gt=0, description="pairs with longer captions are skipped and counted: long words are slow to tokenize"
    )
    caption_lines: CaptionLines = Field(
        "join",
        description="for captions of several lines: 'join' reads all lines as one text; 'first' reads the first line, "
        "for pools with one caption per line",
    )
    order: Literal["full", "windows"] = Field(
        "full",
        description="full: one permutation of all pairs per epoch, for storage with fast random access; "
        "windows: shards in shuffled order, a few at a time, for slow or remote storage",
    )
    window: int = Field(4, gt=0, le=10_000, description="shards that are shuffled together; for order 'windows'")
    lanes: int | None = Field(
        None,
        gt=0,
        le=4096,
        description="parallel sequences of the order; a divisor of the pairs drawn per step and a multiple of the "
        "ranks. None: the largest power of two up to 64 that fits",
    )
    weights: tuple[Weight, ...] | None = Field(
        None, description="proportions in which the entries of `shards` are read; None: by their number of pairs"
    )
    workers: int = Field(2, ge=1, le=1024, description="threads that read and decode pairs ahead")

    @model_validator(mode="after")
    def _one_weight_each(self) -> Self:
        if self.weights is not None and len(self.weights) != len(self.shards):
            raise ConfigError(
                f"{len(self.weights)} weights for {len(self.shards)} entries of shards",
                remedy="give each entry one weight",
                field="weights",
            )
        return self
