# SPDX-License-Identifier: Apache-2.0
"""Pictures as RGB, and the frozen tower's features of them, remembered while memory allows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from aced_sdk.errors import DataError, ModelError
from aced_sdk.files import printable
from aced_sdk.processing import plain
from aced_sdk.towers.trust import library_errors
from vlm.data.skips import Unusable

if TYPE_CHECKING:
    from transformers import LlavaProcessor, PreTrainedModel

Picture = str | Path | Image.Image
_MAX_ASPECT = 10_000  # long side over short side
_MAX_RESIZED = 100_000_000  # pixels
_MAX_UNSCALED = 2**24  # pixels that become numbers as they are
_MAX_TOKENS = 2**14  # of a picture
_MAX_NAME = 64  # characters of a token that is written once for each patch


def open_picture(source: Picture) -> Image.Image:
    """The whole picture as RGB; transparent parts become white, as they are for the student.

    Of an animation it is the first frame. EXIF orientation is applied to TIFF alone, as in distillation. 16-bit grey
    keeps its upper 8 bits.

    Raises:
        Unusable: if the file is missing, torn, no picture or in a format that is not read, has too many pixels, or its
            samples have 32 bits.
    """
    if not isinstance(source, Picture):
        raise Unusable(
            f"a picture is given as {type(source).__name__}", remedy="give the path of a file, or a PIL picture"
        )
    try:
        return plain.to_rgb(plain.open_picture(source, max_aspect=_MAX_ASPECT))
    except plain.PictureError as error:
        raise Unusable(
            f"the picture {printable(source)} cannot be read: {printable(error)}",
            remedy="replace or remove the file",
            reason=error.reason,
        ) from error


def pixels_of(image_processor: Any, pictures: Sequence[Picture]) -> Tensor:
    """Pictures as an image processor prepares them, [P, 3, H, W].

    Raises:
        DataError: if a picture cannot be read, or is so long and thin that resizing would take gigabytes.
        ModelError: if the image processor fails.
    """
    images = [open_picture(picture) for picture in pictures]
    check_shapes(image_processor, images)
    with fitting():
        pixels: Tensor = image_processor(images=images, return_tensors="pt")["pixel_values"]
        return pixels


def check_shapes(image_processor: Any, images: Sequence[Image.Image]) -> None:
    """Refuse pictures that an image processor would blow up: by the short side, to a square, or not made smaller.

    Raises:
        DataError: naming the shape.
    """
    options = image_processor
    edge = dict(options.size or {}).get("shortest_edge") or 0
    whole = not getattr(options, "do_resize", True) and not getattr(options, "do_center_crop", False)
    squared = type(options).__name__.startswith("Llava") and getattr(options, "do_pad", False)
    for image in images:
        if (
            edge**2 * max(image.size) // min(image.size) > _MAX_RESIZED
            or (squared and max(image.size) ** 2 > _MAX_RESIZED)
            or (whole and image.width * image.height > _MAX_UNSCALED)
        ):
            raise DataError(
                f"a picture of {image.width} x {image.height} is too large, or too long and thin, for this model",
                remedy="make it smaller, crop or remove it",
            )


def check_tokens(processor: Any, images: Sequence[Image.Image]) -> None:
    """Refuse pictures of too many tokens: a processor writes all of them before anything counts them.

    Raises:
        DataError: naming the shape.
    """
    options, patch = processor.image_processor, processor.patch_size
    cropped, resized = getattr(options, "do_center_crop", False), getattr(options, "do_resize", True)
    size = dict(options.size or {})
    given = [size, *(dict(getattr(options, name, None) or {}) for name in ("crop_size", "pad_size"))]
    side = max([getattr(processor, "img_size", 0), *(side for sides in given for side in sides.values() if side)])
    tiles = 1 + options.max_patches if getattr(options, "crop_to_patches", False) else 1
    for image in images:
        long, short = max(image.size), min(image.size)
        free = 0 if cropped else (size.get("shortest_edge") or 0) ** 2 * long // short if resized else long**2
        if (tokens := max(side**2 * tiles, free) // patch**2) > _MAX_TOKENS:
            raise DataError(
                f"a picture of {image.width} x {image.height} may become {tokens:,} tokens, more than {_MAX_TOKENS:,}",
                remedy="make it smaller, or correct patch_size and size in the model's processor files",
            )


def check_fit(model: PreTrainedModel, processor: Any) -> None:
    """Refuse the processor of another model, which writes pictures as a token that this one does not know.

    Raises:
        ModelError: if it is one, no processor at all, or writes pictures as tokens of very long names.
    """
    if (found := getattr(processor, "image_token_id", None)) != model.config.image_token_id:
        raise ModelError(
            f"the processor writes pictures as token {found}, the model reads them at {model.config.image_token_id}",
            remedy="pass the processor that vlm.build or vlm.load gave with this model",
            field="processor",
        )
    for name, token in vars(processor).items():
        if name.endswith("_token") and isinstance(token, str) and len(token) > _MAX_NAME:
            raise ModelError(
                f"the processor's {name} has {len(token):,} characters, more than {_MAX_NAME}",
                remedy="give the token a short name in processor_config.json and the tokenizer's files",
                field="processor",
            )


@contextmanager
def fitting() -> Iterator[None]:
    """A block in which any error is over pixels or tokens that the model cannot take; that memory is short passes.

    Raises:
        ModelError: made of the error.
    """
    try:
        with library_errors(
            "what the processor prepares does not fit the model",
            remedy="pass the processor that vlm.build or vlm.load gave with this model",
            field="processor",
        ):
            yield
    except ModelError as error:
        if isinstance(error.__cause__, RuntimeError) and "out of memory" in str(error.__cause__):
            raise error.__cause__ from None
        raise


def same_picture(source: Picture) -> str | int:
    """What tells two pictures apart: a path, or the object's identity."""
    return id(source) if isinstance(source, Image.Image) else str(source)


@torch.no_grad()
def tower_features(model: PreTrainedModel, pixels: Tensor) -> Tensor:
    """What the projector reads: [P, N, D] of pixels [P, 3, H, W], by the model's own layer and strategy."""
    tower: Any = model.model.vision_tower
    if model.config.model_type == "fast_vlm":
        features: Tensor = tower(pixels).last_hidden_state.flatten(2).transpose(1, 2)
        return features
    layer = model.config.vision_feature_layer
    hidden = tower(pixels, output_hidden_states=True).hidden_states
    chosen = torch.cat([hidden[index] for index in ([layer] if isinstance(layer, int) else layer)], dim=-1)
    return chosen[:, 1:] if model.config.vision_feature_select_strategy == "default" else chosen


def feature_shape(model: PreTrainedModel) -> tuple[int, int]:
    """N and D of one picture's features: tokens before the projector reduces them, and their width."""
    layer = model.config.vision_feature_layer
    layers = 1 if isinstance(layer, int) else len(layer)
    tokens = int(model.config.image_seq_length) * int(getattr(model.config, "downsample_factor", 1)) ** 2
    return tokens, int(model.config.vision_config.hidden_size) * layers


class Features:
    """The frozen tower's features of a list of pictures, computed once each.

    Args:
        model: whose tower is asked.
        processor: its image processor prepares the pictures.
        pictures: the list that `of` numbers.
        memory_mb: MiB to remember features in; those beyond are computed anew each time.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: LlavaProcessor,
        pictures: Sequence[Picture],
        memory_mb: int,
    ) -> None:
        self._model = model
        self._processor = processor
        self._pictures = pictures
        self._left = memory_mb * 2**20
        self._known: dict[int, Tensor] = {}

    def of(self, numbers: Sequence[int]) -> Tensor:
        """Features [P, N, D] of the pictures with these numbers, in this order.

        Without numbers they are one picture's zeros, which no token asks for: the projector runs in every step, so
        that no rank waits for another's.
        """
        if not numbers:
            return torch.zeros(1, *feature_shape(self._model))
        missing = sorted({number for number in numbers if number not in self._known})
        fresh = dict(zip(missing, self._compute(missing), strict=True)) if missing else {}
        for number, feature in fresh.items():
            size = feature.numel() * feature.element_size()
            if size <= self._left:
                self._left -= size
                self._known[number] = feature
        return torch.stack([self._known[n] if n in self._known else fresh[n] for n in numbers])

    def _compute(self, numbers: Sequence[int]) -> list[Tensor]:
        weight = next(self._model.model.vision_tower.parameters())
        pixels = pixels_of(self._processor.image_processor, [self._pictures[number] for number in numbers])
        with fitting():
            features = tower_features(self._model, pixels.to(weight.device, weight.dtype))
        if features.shape[1:] != feature_shape(self._model):
            raise ModelError(
                f"the vision tower makes {features.shape[1]} tokens of a picture, and the model's config counts "
                f"{feature_shape(self._model)[0]}",
                remedy="correct image_seq_length in its config.json, or build the model with vlm.build",
                field="model",
            )
        return list(features)
