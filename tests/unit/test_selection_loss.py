# SPDX-License-Identifier: Apache-2.0
"""The form of the loss in the scores follows from how the models were trained."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import normalize

from aced_sdk.config import Joint, Score
from aced_sdk.curation import Embeddings, pair_scores, select_independent, select_joint, static_filter
from aced_sdk.curation.scores import loss_form
from aced_sdk.errors import CurationError, CurationWarning

PAIRS, NOISY, SIZE, DIM = 2560, 1280, 512, 64


def embed(scale: float, spread: float, seed: int, shuffled: bool) -> Embeddings:
    """A softmax-trained model of a pool whose first half has shuffled captions; `spread` is its error."""
    numbers = torch.Generator().manual_seed(7)
    truth = normalize(torch.randn(PAIRS, DIM, generator=numbers), dim=-1)
    own = torch.Generator().manual_seed(seed)
    captions = truth.clone()
    if shuffled:
        captions[:NOISY] = captions[:NOISY][torch.randperm(NOISY, generator=numbers)]
    image = normalize(truth + spread * torch.randn(PAIRS, DIM, generator=own), dim=-1)
    text = normalize(captions + spread * torch.randn(PAIRS, DIM, generator=own), dim=-1)
    return Embeddings(image, text, scale)


def noisy_share(picked: torch.Tensor) -> float:
    return float((picked < NOISY).float().mean())


@pytest.mark.parametrize("scale", [15.0, 100.0])
@pytest.mark.parametrize("score", ["learnability", "easy_reference"])
def test_a_softmax_trained_reference_removes_noise_by_default(scale: float, score: Score) -> None:
    reference, student = embed(scale, 0.05, 1, shuffled=True), embed(scale, 1.0, 2, shuffled=True)
    generator = torch.Generator().manual_seed(0)
    picked = select_joint(student, reference, size=SIZE, score=score, generator=generator)
    assert noisy_share(picked) < 0.12
    with pytest.warns(CurationWarning, match="trained with the softmax loss"):
        by_sigmoid = select_joint(student, reference, size=SIZE, score=score, loss="sigmoid", generator=generator)
    assert noisy_share(by_sigmoid) > 3 * noisy_share(picked)


def test_auto_is_sigmoid_only_if_every_model_was_trained_with_it() -> None:
    softmax = embed(15.0, 0.1, 1, shuffled=False)
    sigmoid = replace(softmax, bias=-10.0)
    assert loss_form("auto", softmax) == loss_form("auto", softmax, sigmoid) == "softmax"
    assert loss_form("auto", sigmoid) == loss_form("auto", sigmoid, sigmoid) == "sigmoid"
    assert loss_form("auto", replace(sigmoid, trained_with="softmax")) == "softmax"
    assert loss_form("auto", replace(softmax, trained_with="sigmoid")) == "sigmoid"
    assert loss_form("softmax", sigmoid) == "softmax"
    with pytest.raises(CurationError, match="unknown loss"):
        loss_form("hinge", softmax)  # type: ignore[arg-type]


def test_only_the_models_of_the_score_decide() -> None:
    reference = replace(embed(15.0, 0.1, 1, shuffled=True), bias=-10.0)
    student = embed(15.0, 0.5, 2, shuffled=True)  # softmax-trained, and not read by easy_reference
    noise = torch.zeros(16, PAIRS)
    given = {"size": SIZE, "score": "easy_reference", "gumbel": noise}
    auto, sigmoid = (select_joint(student, reference, loss=loss, **given) for loss in ("auto", "sigmoid"))  # type: ignore[arg-type]
    assert torch.equal(auto, sigmoid)


def test_the_configs_and_the_filter_follow_the_same_rule() -> None:
    reference = embed(100.0, 0.05, 1, shuffled=True)
    config = Joint(sub_batch=SIZE, super_batch=PAIRS, score="easy_reference")
    assert config.loss == "auto"
    assert noisy_share(config.build().select(None, reference, torch.Generator().manual_seed(0))) < 0.12
    assert noisy_share(static_filter(reference, 0.4)) < 0.01
    torch.testing.assert_close(pair_scores(reference), pair_scores(reference, "softmax"))


def test_independent_selection_warns_too_and_honest_models_do_not() -> None:
    reference = embed(100.0, 0.05, 1, shuffled=False)
    with pytest.warns(CurationWarning, match="Remedy"):
        select_independent(None, reference, size=SIZE, score="easy_reference", loss="sigmoid")
    flat = replace(reference, text=reference.image)
    with pytest.warns(CurationWarning, match="close to random"):
        select_joint(None, flat, size=SIZE, score="easy_reference")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        select_joint(None, reference, size=SIZE, score="easy_reference")
        sigmoid = replace(reference, scale=20.0, bias=-10.0)
        select_joint(embed(10.0, 30.0, 3, shuffled=False), sigmoid, size=SIZE)
        select_joint(None, flat, size=PAIRS, score="easy_reference")  # nothing is left out
