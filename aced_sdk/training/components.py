# SPDX-License-Identifier: Apache-2.0
"""Build the exchangeable components of a run, and check them before anything is computed with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from aced_sdk.cache import FrozenSource, build_frozen
from aced_sdk.config import Curation, DistillConfig, FrozenConfig
from aced_sdk.curation import Selector
from aced_sdk.data import Pool
from aced_sdk.engine import pick_device
from aced_sdk.errors import ConfigError
from aced_sdk.objectives import WeightedLosses, build_objective
from aced_sdk.towers import DualEncoder, Embeddings

_SOURCE = ("fingerprint", "cache", "to", "width", "write")  # of `FrozenSource`
_TRIAL = 8  # pairs


def build_selector(curation: Curation) -> Selector:
    """Build the selector of a curation.

    Raises:
        ConfigError: if the curation's target is missing or is no `Selector`.
    """
    with _in("curation"):
        selector = curation.build()
        if not isinstance(selector, Selector):
            raise ConfigError(
                f"the target of {type(curation).__name__} is a {type(selector).__name__}, not a Selector",
                remedy="make it a subclass of aced_sdk.curation.Selector",
            )
    return selector


def build_sources(config: DistillConfig) -> tuple[FrozenSource | None, tuple[FrozenSource, ...]]:
    """Build the sources of the reference, if curation reads it, and of the teachers. Equal configs share a source.

    Raises:
        ConfigError: if a target is missing or is no `FrozenSource`.
        ModelError: if a model cannot be loaded.
    """
    built: dict[tuple[type[FrozenConfig], str], FrozenSource] = {}

    def source_of(frozen: FrozenConfig, field: str) -> FrozenSource:
        key = type(frozen), frozen.hash()
        if key not in built:
            with _in(field):
                built[key] = _checked(build_frozen(frozen, field), frozen)
        return built[key]

    reference = config.reference if config.curation.needs_reference else None
    source = None if reference is None else source_of(reference, "reference")
    fields = ["reference" if teacher == config.reference else "teacher" for teacher in config.teachers]
    return source, tuple(map(source_of, config.teachers, fields))


def _checked(source: FrozenSource, frozen: FrozenConfig) -> FrozenSource:
    if missing := [name for name in _SOURCE if not hasattr(source, name)]:
        raise ConfigError(
            f"the target of {type(frozen).__name__} is no source of embeddings: {type(source).__name__} has no "
            f"{', '.join(missing)}",
            remedy="give it the interface of aced_sdk.cache.FrozenSource",
        )
    return source


def build_losses(
    config: DistillConfig, student: DualEncoder, teachers: Sequence[FrozenSource], pool: Pool
) -> WeightedLosses:
    """Build the objective, and compute it once on random embeddings of a few pairs.

    Raises:
        ConfigError: if a loss is missing, does not accept its settings or returns no 0-dim tensor, or if no loss
            depends on the student.
        ModelError: if a loss cannot compare embeddings of these widths.
    """
    objective = build_objective(config.objective)
    pairs, device = min(_TRIAL, config.curation.sub_batch), pick_device(config.engine, 0)
    noise = torch.Generator().manual_seed(0)

    def embeddings(width: int) -> Embeddings:
        image, text = F.normalize(torch.randn(2, pairs, width, generator=noise), dim=-1).to(device)
        return Embeddings(image, text, 10.0, -10.0)

    taught = [embeddings(teacher.width(pool)) for teacher in teachers]
    own = embeddings(student.embedding_dim)
    image, text = (side.requires_grad_() for side in (own.image, own.text))
    scale, bias = (torch.tensor(value, device=device, requires_grad=True) for value in (10.0, -10.0))
    own, captions = Embeddings(image, text, scale, bias), torch.arange(pairs, device=device)
    same = objective(own, taught, captions=captions).total
    if not (same + objective(own, taught, batch="iid").total).requires_grad:
        raise ConfigError(
            "the objective does not depend on the student's embeddings: there is no gradient",
            remedy="compute the loss from the student's embeddings, without detaching them",
            field="objective",
        )
    return objective


@contextmanager
def _in(field: str) -> Iterator[None]:
    """Add the field of the run's config to a ConfigError of a component."""
    try:
        yield
    except ConfigError as error:
        raise error.under(field) from None
