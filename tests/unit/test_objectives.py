# SPDX-License-Identifier: Apache-2.0
"""Losses against written-out float64 forms, against open_clip, and by their gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from aced_sdk import config
from aced_sdk.config.objective import DISTILLATION_LOSSES, LossKind
from aced_sdk.curation import Embeddings
from aced_sdk.errors import ConfigError, ModelError
from aced_sdk.objectives import (
    build_objective,
    feature_matching,
    interactive,
    relational,
    sigmoid_kd,
    sigmoid_loss,
    softmax_kd,
    softmax_loss,
)

Array = npt.NDArray[np.float64]


def model(seed: int, pairs: int = 9, dim: int = 6, scale: float = 8.0, bias: float = -3.0) -> Embeddings:
    noise = torch.Generator().manual_seed(seed)
    image, text = torch.randn(2, pairs, dim, dtype=torch.float64, generator=noise)
    scale_bias = torch.tensor([scale, bias], dtype=torch.float64)
    return Embeddings(F.normalize(image, dim=1), F.normalize(image + text, dim=1), scale_bias[0], scale_bias[1])


def learned(embeddings: Embeddings) -> tuple[Embeddings, tuple[Tensor, ...]]:
    """The same embeddings as leaves that want gradients."""
    values = (embeddings.image, embeddings.text, embeddings.scale, embeddings.bias)
    leaves = tuple(torch.as_tensor(value).detach().clone().requires_grad_() for value in values)
    return Embeddings(*leaves), leaves


STUDENT, TEACHER = model(0), model(1, dim=10, scale=40.0, bias=-12.0)
SAME_DIM = model(2, scale=20.0)


def logits(embeddings: Embeddings, scale: float | None = None) -> Array:
    factor = float(embeddings.scale) if scale is None else scale
    return factor * embeddings.image.numpy() @ embeddings.text.numpy().T


def log_softmax(x: Array) -> Array:
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


def test_contrastive_losses_are_their_formulas() -> None:
    x = logits(STUDENT) - 3.0
    expected = sum(np.logaddexp(0, -x[i, j] if i == j else x[i, j]) for i in range(9) for j in range(9)) / 9
    assert sigmoid_loss(STUDENT).item() == pytest.approx(expected, abs=1e-12)
    s = logits(STUDENT)
    expected = -(np.diag(log_softmax(s)).mean() + np.diag(log_softmax(s.T)).mean()) / 2
    assert softmax_loss(STUDENT).item() == pytest.approx(expected, abs=1e-12)


def test_contrastive_losses_are_open_clips() -> None:
    loss = pytest.importorskip("open_clip.loss")
    image, text, scale, bias = (
        STUDENT.image,
        STUDENT.text,
        torch.as_tensor(STUDENT.scale),
        torch.as_tensor(STUDENT.bias),
    )
    torch.testing.assert_close(sigmoid_loss(STUDENT), loss.SigLipLoss()(image, text, scale, bias))
    torch.testing.assert_close(softmax_loss(STUDENT), loss.ClipLoss()(image, text, scale))


# Every loss over pairs, as a function of student, teacher, captions and slab.
PAIRWISE: dict[str, Callable[..., Tensor]] = {
    "sigmoid": lambda s, t, c, chunk: sigmoid_loss(s, chunk),
    "sigmoid masked": lambda s, t, c, chunk: sigmoid_loss(s, chunk, captions=c, repeated="masked"),
    "sigmoid positives": lambda s, t, c, chunk: sigmoid_loss(s, chunk, captions=c, repeated="positives"),
    "softmax": lambda s, t, c, chunk: softmax_loss(s, chunk),
    "softmax masked": lambda s, t, c, chunk: softmax_loss(s, chunk, captions=c, repeated="masked"),
    "softmax positives": lambda s, t, c, chunk: softmax_loss(s, chunk, captions=c, repeated="positives"),
    "softmax kd": lambda s, t, c, chunk: softmax_kd(s, t, chunk=chunk),
    "sigmoid kd": lambda s, t, c, chunk: sigmoid_kd(s, t, student_scale=3.0, chunk=chunk),
    "interactive": lambda s, t, c, chunk: interactive(s, t, chunk=chunk),
    "relational": lambda s, t, c, chunk: relational(s, t, teacher_scale=5.0, chunk=chunk),
}
CAPTIONS = torch.tensor([4, 7, 4, 4, 1, 7, 0, 9, 4])


@pytest.mark.parametrize("chunk", [1, 4, 9, 100])
@pytest.mark.parametrize("name", PAIRWISE)
def test_slabs_change_neither_loss_nor_gradients(name: str, chunk: int) -> None:
    whole, whole_leaves = learned(STUDENT)
    slabs, slab_leaves = learned(STUDENT)
    expected, loss = (PAIRWISE[name](s, SAME_DIM, CAPTIONS, size) for s, size in ((whole, None), (slabs, chunk)))
    expected.backward()
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    for ours, theirs in zip(slab_leaves, whole_leaves, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", PAIRWISE)
def test_slabs_are_not_kept_for_the_backward_pass(name: str) -> None:
    def kept(chunk: int | None) -> list[Tensor]:
        saved: list[Tensor] = []
        student, _ = learned(model(3, pairs=64, dim=2))
        teacher, captions = model(4, pairs=64, dim=2), torch.arange(64) % 40
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
            PAIRWISE[name](student, teacher, captions, chunk)
        return saved

    assert max(x.numel() for x in kept(None)) == 64 * 64
    assert max(x.numel() for x in kept(8)) <= 64 * 2
    # All of it together, memory that tensors share counted once, is less than a quarter of one matrix of logits.
    apart = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept(8)}
    assert sum(apart.values()) < 64 * 64 * 8 / 4


def test_softmax_kd_is_equation_3() -> None:
    for teacher_scale, student_scale in ((None, None), (25.0, 5.0)):
        p, q = logits(TEACHER, teacher_scale), logits(STUDENT, student_scale)
        expected = -0.5 * np.mean(
            (np.exp(log_softmax(p)) * log_softmax(q)).sum(1) + (np.exp(log_softmax(p.T)) * log_softmax(q.T)).sum(1)
        )
        loss = softmax_kd(STUDENT, TEACHER, teacher_scale=teacher_scale, student_scale=student_scale)
        assert loss.item() == pytest.approx(expected, abs=1e-12)


def test_sigmoid_kd_is_its_formula() -> None:
    for teacher_scale, student_scale in ((None, None), (25.0, 5.0)):
        y = 1 / (1 + np.exp(-(logits(TEACHER, teacher_scale) - 12.0)))
        x = logits(STUDENT, student_scale) - 3.0
        expected = (y * np.logaddexp(0, -x) + (1 - y) * np.logaddexp(0, x)).sum() / 9
        loss = sigmoid_kd(STUDENT, TEACHER, teacher_scale=teacher_scale, student_scale=student_scale)
        assert loss.item() == pytest.approx(expected, abs=1e-12)


def test_feature_matching_and_interactive_are_their_formulas() -> None:
    squares = [
        (ours.numpy() - theirs.numpy()) ** 2
        for ours, theirs in ((STUDENT.image, SAME_DIM.image), (STUDENT.text, SAME_DIM.text))
    ]
    expected = squares[0].mean() + squares[1].mean()
    assert feature_matching(STUDENT, SAME_DIM).item() == pytest.approx(expected, abs=1e-14)
    assert feature_matching(STUDENT, STUDENT).item() == 0
    for scale in (None, 30.0):
        factor = 8.0 if scale is None else scale
        by_image = factor * STUDENT.image.numpy() @ SAME_DIM.text.numpy().T
        by_text = factor * STUDENT.text.numpy() @ SAME_DIM.image.numpy().T
        expected = -(np.diag(log_softmax(by_image)).mean() + np.diag(log_softmax(by_text)).mean()) / 2
        assert interactive(STUDENT, SAME_DIM, student_scale=scale).item() == pytest.approx(expected, abs=1e-12)


def test_relational_is_softmax_kd_less_the_teachers_entropy() -> None:
    entropy = softmax_kd(TEACHER, TEACHER)
    torch.testing.assert_close(relational(STUDENT, TEACHER), softmax_kd(STUDENT, TEACHER) - entropy)
    assert relational(TEACHER, TEACHER).item() == pytest.approx(0, abs=1e-12)
    one, one_leaves = learned(STUDENT)
    two, two_leaves = learned(STUDENT)
    relational(one, TEACHER).backward()
    softmax_kd(two, TEACHER).backward()
    for ours, theirs in zip(one_leaves[:3], two_leaves[:3], strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize(
    ("loss", "reads_bias"),
    [
        (lambda s: sigmoid_loss(s), True),
        (lambda s: sigmoid_loss(s, 4), True),
        (lambda s: sigmoid_loss(s, 4, captions=CAPTIONS, repeated="positives"), True),
        (lambda s: softmax_loss(s), False),
        (lambda s: softmax_loss(s, captions=CAPTIONS, repeated="masked"), False),
        (lambda s: softmax_loss(s, 4, captions=CAPTIONS, repeated="positives"), False),
        (lambda s: softmax_kd(s, TEACHER), False),
        (lambda s: softmax_kd(s, TEACHER, teacher_scale=9.0, student_scale=3.0), False),
        (lambda s: sigmoid_kd(s, TEACHER), True),
        (lambda s: feature_matching(s, SAME_DIM), False),
        (lambda s: interactive(s, SAME_DIM), False),
        (lambda s: relational(s, TEACHER), False),
    ],
)
def test_gradients(loss: Callable[[Embeddings], Tensor], reads_bias: bool) -> None:
    _, leaves = learned(STUDENT)
    if not reads_bias:
        leaves = (*leaves[:3], leaves[3].detach())
    assert torch.autograd.gradcheck(lambda *values: loss(Embeddings(*values)), leaves)


def test_learned_scale_and_bias_get_gradients_and_the_teacher_none() -> None:
    student, leaves = learned(STUDENT)
    teacher, teacher_leaves = learned(TEACHER)
    (sigmoid_loss(student) + sigmoid_kd(student, teacher) + softmax_kd(student, teacher)).backward()
    assert all(leaf.grad is not None and leaf.grad.abs().sum() > 0 for leaf in leaves)
    assert all(leaf.grad is None for leaf in teacher_leaves)


def test_half_precision_and_autocast_compute_in_float32() -> None:
    student, teacher = (replace(m, image=m.image.bfloat16(), text=m.text.bfloat16()) for m in (STUDENT, TEACHER))
    wide, wide_teacher = (replace(m, image=m.image.float(), text=m.text.float()) for m in (student, teacher))
    for loss in (
        lambda s, t: sigmoid_loss(s),
        lambda s, t: sigmoid_loss(s, 4),
        lambda s, t: softmax_loss(s),
        softmax_kd,
        sigmoid_kd,
        relational,
    ):
        expected = loss(wide, wide_teacher)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = loss(student, teacher)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_objective_adds_weighted_terms() -> None:
    objective = build_objective(
        config.Objective(
            contrastive=config.Contrastive(weight=0.5, chunk=4),
            distillation=(
                config.Distillation(weight=2.0, teacher_scale=60.0),
                config.Distillation(loss="sigmoid"),
                config.Distillation(loss="softmax", weight=0.25),
                config.Distillation(loss="relational", weight=0.0),
            ),
        )
    )
    terms = objective(STUDENT, TEACHER)
    expected = {
        "contrastive": sigmoid_loss(STUDENT),
        "softmax": softmax_kd(STUDENT, TEACHER, teacher_scale=60.0),
        "sigmoid": sigmoid_kd(STUDENT, TEACHER),
        "softmax_2": softmax_kd(STUDENT, TEACHER),
    }
    assert list(terms.parts) == list(expected)
    for name, part in expected.items():
        torch.testing.assert_close(terms.parts[name], part)
    weights = (0.5, 2.0, 1.0, 0.25)
    total = sum(weight * part for weight, part in zip(weights, expected.values(), strict=True))
    torch.testing.assert_close(terms.total, total)


def test_parts_are_detached_and_the_total_is_not() -> None:
    student, leaves = learned(STUDENT)
    terms = build_objective(config.Objective())(student)
    assert list(terms.parts) == ["contrastive"]
    assert not terms.parts["contrastive"].requires_grad
    terms.total.backward()
    assert leaves[2].grad is not None


@pytest.mark.parametrize("loss", ["softmax", "sigmoid", "feature", "interactive", "relational"])
def test_every_distillation_loss_can_be_built_and_trains_alone(loss: str) -> None:
    objective = build_objective(
        config.Objective(contrastive=config.Contrastive(weight=0.0), distillation=(config.Distillation(loss=loss),))
    )
    student, leaves = learned(STUDENT)
    terms = objective(student, SAME_DIM)
    terms.total.backward()
    assert list(terms.parts) == [loss]
    assert leaves[0].grad is not None
    with pytest.raises(ConfigError, match="needs teacher 0"):
        objective(student)


def test_softmax_contrastive_can_be_built() -> None:
    terms = build_objective(config.Objective(contrastive=config.Contrastive(loss="softmax")))(STUDENT)
    torch.testing.assert_close(terms.total, softmax_loss(STUDENT))


def test_terms_find_their_teacher_and_their_batch() -> None:
    objective = build_objective(
        config.Objective(
            distillation=(
                config.Distillation(teacher=1, weight=2.0),
                config.Distillation(loss="feature", batch="iid", weight=3.0),
                config.Distillation(loss="sigmoid", teacher=1, batch="iid"),
            )
        )
    )
    same = objective(STUDENT, [SAME_DIM, TEACHER])
    assert list(same.parts) == ["contrastive", "softmax"]
    torch.testing.assert_close(same.total, sigmoid_loss(STUDENT) + 2 * softmax_kd(STUDENT, TEACHER))
    second = objective(STUDENT, [SAME_DIM, TEACHER], batch="iid")
    assert list(second.parts) == ["feature", "sigmoid"]
    torch.testing.assert_close(second.total, 3 * feature_matching(STUDENT, SAME_DIM) + sigmoid_kd(STUDENT, TEACHER))
    with pytest.raises(ConfigError, match=r"needs teacher 1 \(counted from 0\), got 1 teachers"):
        objective(STUDENT, SAME_DIM)


def test_a_batch_without_terms_has_no_loss() -> None:
    alone = config.Objective(contrastive=config.Contrastive(weight=0), distillation=(config.Distillation(batch="iid"),))
    terms = build_objective(alone)(STUDENT, TEACHER)
    assert (terms.total.item(), terms.parts) == (0, {})


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_captions_that_never_repeat_change_nothing(loss: str) -> None:
    forms = [
        build_objective(config.Objective(contrastive=config.Contrastive(loss=loss, repeated=repeated)))(
            STUDENT, captions=torch.arange(9).flip(0)
        ).total
        for repeated in ("negatives", "masked", "positives")
    ]
    torch.testing.assert_close(forms[1], forms[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(forms[2], forms[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("loss", [sigmoid_loss, softmax_loss])
def test_a_caption_repeated_a_hundred_times_weighs_less_than_twice(loss: Callable[..., Tensor]) -> None:
    many = model(5, pairs=120)
    captions = torch.cat([torch.zeros(100, dtype=torch.int64), torch.arange(1, 21)])
    text = torch.cat([many.text[:1].expand(100, -1), many.text[100:]])  # equal captions, equal embeddings
    student = replace(many, text=text, scale=1.0, bias=0.0)
    masked = loss(student, captions=captions, repeated="masked").item()
    positives = loss(student, captions=captions, repeated="positives").item()
    assert masked < positives < 2 * masked


def test_one_caption_alone_leaves_nothing_to_tell_apart() -> None:
    student, leaves = learned(STUDENT)
    for repeated in ("masked", "positives"):
        softmax_loss(student, captions=torch.zeros(9), repeated=repeated).backward()
        assert all(leaf.grad is None or not leaf.grad.any() for leaf in leaves)


def test_captions_that_are_missing_or_do_not_fit_are_refused() -> None:
    for loss in (sigmoid_loss, softmax_loss):
        with pytest.raises(ConfigError, match="needs captions, and none are given") as caught:
            loss(STUDENT, repeated="masked")
        assert caught.value.field == "objective.contrastive.repeated"
        with pytest.raises(ModelError, match=r"captions have shape \[3\] for 9 pairs"):
            loss(STUDENT, captions=torch.arange(3), repeated="positives")


def test_settings_without_meaning_are_refused() -> None:
    for term, name in (
        ({"loss": "feature", "student_scale": 2.0}, "student_scale"),
        ({"loss": "interactive", "teacher_scale": 2.0}, "teacher_scale"),
        ({"loss": "feature", "chunk": 2}, "chunk"),
    ):
        with pytest.raises(ConfigError, match=f"has no {name}") as caught:
            config.Objective(**{"distillation": ({}, term)})
        assert caught.value.field == f"distillation.1.{name}"


def cosine_loss(student: Embeddings, teacher: Embeddings) -> torch.Tensor:
    """A loss of a user's own."""
    return 1 - (student.image * teacher.image).sum(dim=1).mean()


def test_a_loss_of_a_users_own_is_named_in_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="unknown distillation loss 'cosine'"):
        config.Distillation(loss="cosine")
    monkeypatch.setitem(DISTILLATION_LOSSES, "cosine", LossKind(f"{__name__}:cosine_loss"))
    terms = build_objective(config.Objective(distillation=(config.Distillation(loss="cosine"),)))(STUDENT, SAME_DIM)
    torch.testing.assert_close(terms.parts["cosine"], cosine_loss(STUDENT, SAME_DIM))


def test_embeddings_that_do_not_fit_are_refused() -> None:
    for loss in (feature_matching, interactive):
        with pytest.raises(ModelError, match="6 dimensions, the teacher 10"):
            loss(STUDENT, TEACHER)
    for loss in (softmax_kd, sigmoid_kd, relational, feature_matching, interactive):
        with pytest.raises(ModelError, match="9 pairs and the teacher 5"):
            loss(STUDENT, model(4, pairs=5))
    for broken in (replace(STUDENT, text=STUDENT.text[:3]), replace(STUDENT, image=STUDENT.image[0])):
        with pytest.raises(ModelError, match="shapes"):
            sigmoid_loss(broken)
