# SPDX-License-Identifier: Apache-2.0
"""A zero-shot classifier on an encoder: the classes are embedded once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from aced_sdk.processing.plain.inputs import Picture, at_least_one
from export.runtime.encoder import Floats, OnnxEncoder
from export.runtime.errors import EncoderError


class Guess(NamedTuple):
    """A class and its probability among the classes given."""

    name: str
    probability: float


class ZeroShot:
    """Which of some classes a picture shows, by the similarity of picture and class texts (CLIP, arXiv 2103.00020).

    May be used from several threads at once.

    Args:
        encoder: an encoder with both towers.
        classes: C names.
        templates: texts with `{}` or `{c}` where the name belongs; a class is the mean of its texts' embeddings.

    Raises:
        InputError: if there are no classes or a template has no place for the name.
        FolderError: if the encoder has no text graph.
    """

    def __init__(
        self, encoder: OnnxEncoder, classes: Sequence[str], templates: Sequence[str] = ("a photo of a {}.",)
    ) -> None:
        self.encoder = encoder
        self._embeddings = encoder.encode_classes(classes, templates)
        self.classes = tuple(classes)

    def logits(self, embeddings: Floats) -> Floats:
        """scale * cosine + bias, float32 [N, C], for picture embeddings [N, D] such as a `Batcher` gives."""
        return np.asarray(self.encoder.scale * (embeddings @ self._embeddings.T) + self.encoder.bias, np.float32)

    def classify(self, images: Sequence[Picture], top: int = 1) -> list[list[Guess]]:
        """For each picture its `top` most probable classes, best first.

        Probabilities are a softmax over the classes given, also for encoders trained with the sigmoid loss.

        Raises:
            InputError: naming the picture that cannot be used.
            EncoderError: if embeddings or logits are not finite.
        """
        return self.guesses(self.encoder.encode_image(images), top)

    def guesses(self, embeddings: Floats, top: int = 1) -> list[list[Guess]]:
        """As `classify`, for picture embeddings [N, D]."""
        at_least_one(top=top)
        logits = self.logits(embeddings)
        if not np.isfinite(logits).all():
            raise EncoderError("the graph gives values that are not finite", remedy="take another precision, or fp32")
        exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)
        best = np.argsort(-probabilities, axis=1, kind="stable")[:, :top]
        return [
            [Guess(self.classes[c], float(row[c])) for c in columns]
            for row, columns in zip(probabilities, best, strict=True)
        ]
