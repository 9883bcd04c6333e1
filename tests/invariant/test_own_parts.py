# SPDX-License-Identifier: Apache-2.0
"""Custom curations need no change to the library; a run frees its frozen models before training."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import ClassVar, Literal

import pytest
import torch
from tiny import distillation, encoder, write_pool
from torch import Tensor

import aced_sdk as aced
from aced_sdk import towers
from aced_sdk.cache import frozen
from aced_sdk.config.curation import Curation
from aced_sdk.curation import Embeddings, Selector
from aced_sdk.engine.events import Event
from aced_sdk.errors import ConfigError
from aced_sdk.training.events import Selected, StudentStep


class Last(Curation):
    """Select the last candidates."""

    target: ClassVar[str] = f"{__name__}:LastSelector"

    method: Literal["last"] = "last"
    super_batch: int = 16

    @property
    def candidates(self) -> int:
        return self.super_batch


class LastSelector(Selector):
    config: Last

    def select(
        self, student: Embeddings | None, reference: Embeddings | None, generator: torch.Generator | None = None
    ) -> Tensor:
        return torch.arange(self.config.super_batch)[-self.config.sub_batch :]


def test_a_curation_of_a_users_own_trains_and_survives_yaml(tmp_path: Path) -> None:
    pool, reference = write_pool(tmp_path / "pool", pairs=48), towers.save(encoder(1), tmp_path / "reference")
    config = distillation(tmp_path / "run", pool, reference).replace(
        curation=Last(sub_batch=8), objective=aced.Objective(), reference=None, teacher=None
    )
    heard: list[Event] = []
    run = aced.distill(config, callbacks=[heard.append])
    selected = [event for event in heard if isinstance(event, Selected)]
    assert len(selected) == run.step
    assert all(event.picked == event.candidates[-8:] for event in selected)
    again = aced.DistillConfig.from_yaml(tmp_path / "run" / "config.yaml")
    assert again.curation == Last(sub_batch=8)
    assert again.hash() == config.hash()


def test_the_base_of_curations_cannot_be_used_itself() -> None:
    plain = distillation(Path("run"), Path("x.tar"), None, curation=aced.Iid(), objective=aced.Objective())
    for curation, message in (({"method": ""}, "unknown method ''"), (Curation(), "the base class selects nothing")):
        with pytest.raises(ConfigError, match=message):
            plain.replace(curation=curation)


def test_frozen_models_are_freed_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool, reference = write_pool(tmp_path / "pool", pairs=48), towers.save(encoder(1), tmp_path / "reference")
    loaded: list[weakref.ref[towers.DualEncoder]] = []
    real = frozen.load

    def load(name: str) -> towers.DualEncoder:
        model = real(name)
        loaded.append(weakref.ref(model))
        return model

    alive: list[bool] = []

    def look(event: Event) -> None:
        if isinstance(event, StudentStep):
            gc.collect()
            alive.append(any(model() is not None for model in loaded))

    monkeypatch.setattr(frozen, "load", load)
    aced.distill(distillation(tmp_path / "run", pool, reference), callbacks=[look])
    assert len(loaded) == 1  # the reference is the teacher, too
    assert alive
    assert not any(alive)
