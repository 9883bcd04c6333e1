# SPDX-License-Identifier: Apache-2.0
"""What the demo's page shows beside the figures of summary.json. What is empty is left out of the page.

Shares and accuracies are in 0..1, times in the unit that their name says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypedDict

from PIL import Image


class CurvePoint(TypedDict):
    """One evaluation of a method while it learns.

    `compute` counts forward passes of the student over one example: a trained example is 3, a scored one 1.
    """

    trained: int
    scored: int
    compute: float
    zero_shot: float


@dataclass(frozen=True)
class Thumb:
    """One pair of the pool; `caption` is what the student was shown, `true_caption` what the picture was made with."""

    image: Image.Image
    caption: str
    true_caption: str
    noisy: bool


@dataclass(frozen=True)
class SelectionMoment:
    """A draw from what one super-batch gave: pairs trained on, and pairs passed over.

    `noisy_selected` and `noisy_passed` are the shares of shuffled captions among all of them, not only those shown.
    """

    step: int
    selected: Sequence[Thumb]
    passed: Sequence[Thumb]
    noisy_selected: float
    noisy_passed: float


@dataclass(frozen=True)
class ZeroShotExample:
    """A held-out picture with its true class and the classes that the student ranks highest, best first."""

    image: Image.Image
    truth: str
    top: Sequence[tuple[str, float]]


@dataclass(frozen=True)
class KindAccuracy:
    """Accuracy on one kind of question, with the pictures and with shuffled pictures (blind)."""

    kind: str
    questions: int
    accuracy: float
    blind: float


@dataclass(frozen=True)
class VlmSample:
    """What the model said of a held-out picture; `question` is empty for a caption, `right` None where none judges."""

    image: Image.Image
    question: str
    said: str
    truth: str
    right: bool | None


@dataclass(frozen=True)
class OnnxFile:
    """One exported file, against torch on the same inputs."""

    part: str
    precision: str
    megabytes: float
    milliseconds: float
    torch_milliseconds: float | None
    min_cosine: float
    zero_shot: float | None = None


@dataclass(frozen=True)
class LicenceRow:
    """One source of pictures or captions; `rows` of it are trained on, 0 where it is for tests or captions alone."""

    source: str
    version: str
    licence: str
    rows: int


@dataclass(frozen=True)
class PageAssets:
    """Everything of the page that is not a figure of the summary.

    Attributes:
        facts: name and value of what was done: pool rows, share of shuffled captions, machine ...
        curves: method to its evaluations, in order.
        selection: moments of the run, early to late.
        selection_method: whose selection that is.
        noise_curve: method to (step, share of shuffled captions among the trained, the same in the pool).
        zero_shot_examples: drawn at random, right and wrong.
        vlm_kinds: accuracy by kind of question.
        vlm_samples: drawn at random, right and wrong.
        onnx_files: what was exported.
        licences: where the data comes from.
        limits: what the figures do not say.
    """

    facts: Sequence[tuple[str, str]] = ()
    curves: Mapping[str, Sequence[CurvePoint]] = field(default_factory=dict)
    selection: Sequence[SelectionMoment] = ()
    selection_method: str = "aced"
    noise_curve: Mapping[str, Sequence[tuple[int, float, float]]] = field(default_factory=dict)
    zero_shot_examples: Sequence[ZeroShotExample] = ()
    vlm_kinds: Sequence[KindAccuracy] = ()
    vlm_samples: Sequence[VlmSample] = ()
    onnx_files: Sequence[OnnxFile] = ()
    licences: Sequence[LicenceRow] = ()
    limits: Sequence[str] = ()
