# SPDX-License-Identifier: Apache-2.0
"""A dual encoder with everything that belongs to it: weights, preprocessing, tokenizer, and the folder they live in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from aced_sdk.config import LossForm
from aced_sdk.errors import InputError, ModelError
from aced_sdk.files import tensor_digest
from aced_sdk.processing.plain import PictureError
from aced_sdk.processing.plain.inputs import Picture, at_least_one, open_input, picture_batches, remedy_of
from aced_sdk.processing.processor import Processor
from aced_sdk.processing.transforms import Preprocess
from aced_sdk.towers.embeddings import Embeddings
from aced_sdk.towers.profile import Profile, profile_model
from aced_sdk.towers.replica import evaluating, replaced
from aced_sdk.towers.resolution import any_size, positions_for
from aced_sdk.towers.text import cut, lengths
from aced_sdk.towers.text_files import tokenizing


class DualEncoder(nn.Module):
    """An image tower and a text tower over open_clip, one contract for students, references and teachers.

    Use `build` (new weights) or `load` (a folder or hub name) to make one.

    Attributes:
        model: the open_clip model; its state dict is what folders hold.
        model_cfg: the `model_cfg` of open_clip_config.json.
        preprocess_config: geometry and normalisation.
        processor: pictures and texts to tensors, without the model.
        folder: where it was loaded from; None for a new one.
        trained_with: loss that its scale and bias were trained with: as its manifest says, else sigmoid if it has a
            bias and softmax if it has none.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: nn.Module,
        model_cfg: dict[str, Any],
        preprocess: Preprocess,
        tokenizer: Any,
        folder: Path | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.model_cfg = model_cfg
        self.preprocess_config = preprocess
        self.tokenizer = tokenizer
        self.folder = folder
        self.trained_with: LossForm = "softmax" if model.logit_bias is None else "sigmoid"
        self.processor = Processor(preprocess, self._tokens, int(model_cfg["text_cfg"].get("context_length", 77)))
        if "timm_model_name" in model_cfg["vision_cfg"]:
            _channels_last(model.visual)  # type: ignore[arg-type]
            any_size(model.visual, preprocess.size)  # type: ignore[arg-type]
        self.register_buffer("mean", torch.tensor(preprocess.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(preprocess.std).view(3, 1, 1), persistent=False)

    # -- inputs -------------------------------------------------------------------------------------------------

    def resize(self, image: Image.Image) -> Tensor:
        """A picture at the tower's size, before normalisation: uint8 [3, H, W]."""
        return self.processor.resize(image)

    def preprocess(self, image: Image.Image) -> Tensor:
        """Exactly what open_clip's validation transform gives: normalised float32 [3, H, W]."""
        return self.normalise(self.resize(image))

    def tokenize(self, texts: str | Iterable[str]) -> Tensor:
        """Token ids, int64 [N, context_length], padded and cut as the text tower expects.

        Raises:
            InputError: if something is no text, or has more than 10,000 characters.
            ModelError: if the tokenizer fails.
        """
        return self.processor.tokenize(texts)

    def _tokens(self, texts: list[str]) -> Tensor:
        with tokenizing("the tokenizer fails on these texts"):
            tokens: Tensor = self.tokenizer(texts)
        return tokens

    def normalise(self, pixels: Tensor) -> Tensor:
        """Float pixels with the tower's mean and deviation from uint8 ones; float pixels are taken as normalised."""
        if pixels.dtype != torch.uint8:
            return pixels
        return (pixels.to(torch.float32) / 255 - self.mean) / self.std

    # -- embeddings ---------------------------------------------------------------------------------------------

    def forward(self, images: Tensor, tokens: Tensor) -> Embeddings:
        """Embed N pairs with gradient.

        Args:
            images: uint8 [N, 3, H, W] as `resize` gives, or float as `preprocess` gives; another size than the
                tower's own (`shrink`) is taken where `check_size` says so.
            tokens: int64 [N, L] as `tokenize` gives.

        Raises:
            ModelError: if the tokens are another model's.
        """
        self._check(tokens)
        out = self._towers(self.model, images, tokens)
        bias = out.get("logit_bias")
        return Embeddings(
            image=out["image_features"].float(),
            text=out["text_features"].float(),
            scale=out["logit_scale"],
            bias=0.0 if bias is None else bias,
        )

    def _towers(self, model: nn.Module, images: Tensor | None, tokens: Tensor | None = None) -> dict[str, Tensor]:
        tables: dict[str, Tensor] = {}
        pixels = None
        if images is not None:
            weight = next(model.visual.parameters())  # type: ignore[union-attr]
            pixels = self.normalise(images).to(weight.dtype).contiguous()  # see _channels_last
            positions = positions_for(model.visual, *pixels.shape[-2:])  # type: ignore[arg-type]
            tables |= {f"visual.{name}": value for name, value in positions.items()}
        if tokens is not None:
            tokens, shorter = cut(model, tokens, int(lengths(model, tokens).max()))
            tables |= shorter
        out: dict[str, Tensor] = replaced(model, tables)(pixels, tokens)
        return out

    def _check(self, tokens: Tensor) -> None:
        """Refuse what this tower's tokenizer cannot have made; an index out of range would end a whole GPU process."""
        known = int(self.model.vocab_size)  # type: ignore[arg-type]
        if tokens.shape[1:] == (self.context_length,) and not bool(((tokens < 0) | (tokens >= known)).any()):
            return
        ids = tokens.flatten().tolist() or [0]
        raise ModelError(
            f"these tokens are another model's: this text tower reads [N, {self.context_length}] with ids below "
            f"{known}, and was given {list(tokens.shape)} with ids from {min(ids)} to {max(ids)}",
            remedy="tokenise the texts with this encoder's own .tokenize; the student's tokens mean nothing to a "
            "teacher with another tokenizer",
        )

    @torch.no_grad()
    def encode_image(self, images: Tensor | Picture | Iterable[Picture], batch_size: int | None = None) -> Tensor:
        """L2-normalised float32 [N, D].

        Args:
            images: PIL images, paths, encoded bytes, or uint8 arrays [H, W], [H, W, 3] or [H, W, 4]; one of them counts
                as a list of one. Or a batch of pixels as for `forward`. EXIF orientation is applied to TIFF
                alone, as in training.
            batch_size: pictures of a forward pass; None: what suits the device.

        Raises:
            InputError: naming the picture that cannot be used.
        """
        size = self._image_batch() if batch_size is None else batch_size
        at_least_one(batch_size=size)
        model = evaluating(self.model)
        parts = [
            self._towers(model, part.to(self.mean.device))["image_features"].float()
            for part in self._pixels(images, size)
        ]
        return torch.cat(parts) if parts else torch.empty(0, self.embedding_dim, device=self.mean.device)

    def _pixels(self, images: Tensor | Picture | Iterable[Picture], size: int) -> Iterator[Tensor]:
        """Batches for `_towers`."""
        if isinstance(images, Tensor):
            if (
                images.ndim != 4
                or images.shape[1] != 3
                or not (images.dtype == torch.uint8 or images.is_floating_point())
            ):
                raise InputError(
                    f"images is a tensor of {str(images.dtype).removeprefix('torch.')} {list(images.shape)}",
                    remedy="give uint8 or normalised float pixels [N, 3, H, W]",
                    field="images",
                )
            yield from torch.split(images, size) if len(images) else ()
            return
        for first, batch in picture_batches(images, size):
            pictures = (open_input(picture, f"images[{first + n}]") for n, picture in enumerate(batch))
            yield torch.stack([self._resized(picture, first + n) for n, picture in enumerate(pictures)])

    def _resized(self, picture: Image.Image, number: int) -> Tensor:
        try:
            return self.resize(picture)
        except PictureError as error:
            place = f"images[{number}]"
            raise InputError(f"{place}: {error}", remedy=remedy_of(error), field=place) from error

    def _image_batch(self) -> int:
        """Pictures per forward pass without gradient: on a CPU no more than its caches take, which is faster."""
        height, width = self.preprocess_config.size
        if self.mean.device.type != "cpu":
            return 256
        least = min(8, 2**21 // (height * width))  # activations of 8 large pictures take gigabytes
        return min(256, max(200_000 // (height * width), least, 1))

    @torch.no_grad()
    def encode_text(self, texts: Tensor | str | Iterable[str], batch_size: int = 256) -> Tensor:
        """L2-normalised float32 [N, D] for texts, or for their tokens.

        Raises:
            InputError: if something is no text, or has more than 10,000 characters.
            ModelError: if the tokens are another model's.
        """
        at_least_one(batch_size=batch_size)
        tokens = texts if isinstance(texts, Tensor) else self.tokenize(texts)
        self._check(tokens)
        embeddings = torch.empty(len(tokens), self.embedding_dim)
        # Short texts go together, since a batch is as long as the longest of them.
        order = lengths(self.model, tokens).argsort(stable=True).cpu()
        model = evaluating(self.model)
        for start in range(0, len(tokens), batch_size):
            rows = order[start : start + batch_size]
            part = tokens[rows].to(self.mean.device)
            embeddings[rows] = self._towers(model, None, part)["text_features"].float().cpu()
        return embeddings.to(self.mean.device)

    def __fspath__(self) -> str:
        """Its folder, so that a student can be passed wherever a folder can.

        Raises:
            ModelError: if it was never saved or loaded.
        """
        if self.folder is None:
            raise ModelError("this encoder has no folder yet", remedy="save it with aced_sdk.towers.save first")
        return str(self.folder)

    # -- facts --------------------------------------------------------------------------------------------------

    @property
    def embedding_dim(self) -> int:
        """D, the width of both embeddings."""
        return int(self.model_cfg["embed_dim"])

    @property
    def scale(self) -> float:
        """The learned factor on cosine similarities."""
        return float(self.model.logit_scale.detach().exp())  # type: ignore[operator]

    @property
    def bias(self) -> float:
        """The learned bias of the sigmoid loss; 0 where there is none."""
        bias = self.model.logit_bias
        return 0.0 if bias is None else float(bias.detach())  # type: ignore[operator]

    @property
    def context_length(self) -> int:
        """L, the number of tokens of a text."""
        return self.processor.context_length

    def profile(self, size: int | None = None) -> Profile:
        """Multiply-accumulates of one picture (size x size; None: the tower's own) and one text, and parameters."""
        height, width = self.preprocess_config.size if size is None else (size, size)
        pixels = torch.zeros(1, 3, height, width, device=self.mean.device)
        tokens = self.tokenize("a picture").to(self.mean.device)
        model: Any = evaluating(self.model)
        return profile_model(model, lambda: self._towers(model, pixels), lambda: model.encode_text(tokens))

    def fingerprint(self) -> str:
        """Hex digest of weights and preprocessing: what cached embeddings are bound to."""
        inputs = f"{self.preprocess_config.model_dump_json()}context_length={self.context_length}"
        return tensor_digest(self.model.state_dict(), inputs)


def _channels_last(visual: nn.Module) -> None:
    """The layout in which convolutions are quick, but not where pictures enter.

    There, the backward pass of FastViT's 1 x 1 convolution with stride 2 over 3 channels overruns its memory on a CPU
    (torch 2.15 with oneDNN: "corrupted size vs. prev_size", or worse, nothing).
    """
    for parameter in visual.parameters():
        if parameter.dim() == 4:  # 3-D convolutions, which some timm towers have, know no such layout
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    for module in visual.modules():
        if isinstance(module, nn.Conv2d) and module.in_channels == 3:
            module.to(memory_format=torch.contiguous_format)
