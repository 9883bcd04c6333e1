# SPDX-License-Identifier: Apache-2.0
"""What open_clip opens from a local folder opens here too, with equal numbers; safetensors alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import export
from aced_sdk import towers
from aced_sdk.errors import ModelError
from aced_sdk.towers.folder import CONFIG, WEIGHTS

Json = dict[str, Any]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return towers.save(tiny.encoder(), tmp_path_factory.mktemp("towers") / "student")


def foreign(saved: Path, folder: Path, name: str = WEIGHTS) -> Path:
    """A student as another program saves it: no manifest, and weights under this name."""
    folder.mkdir()
    (folder / CONFIG).write_bytes((saved / CONFIG).read_bytes())
    (folder / name).write_bytes((saved / WEIGHTS).read_bytes())
    return folder


def equal_to_open_clip(folder: Path) -> towers.DualEncoder:
    ours = towers.load(folder)
    theirs, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.model.state_dict().items())
    image = tiny.picture(3)
    (folder / "p.png").write_bytes(image)
    from PIL import Image

    torch.testing.assert_close(ours.preprocess(Image.open(folder / "p.png")), transform(Image.open(folder / "p.png")))
    return ours


@pytest.mark.parametrize(
    "change",
    [
        lambda given: None,
        lambda given: given | {"crop_pct": 0.9, "color_jitter": 0.1, "mean": None},
        lambda given: given | {"interpolation": "random"},
        lambda given: given | {"size": 24},  # the tower's own size counts
    ],
    ids=["none", "more keys", "random", "another size"],
)
def test_preprocessing_of_open_clip(saved: Path, tmp_path: Path, change: Callable[[Json], Json | None]) -> None:
    folder = foreign(saved, tmp_path / "f")
    config = json.loads((folder / CONFIG).read_text())
    given = change(config.pop("preprocess_cfg"))
    (folder / CONFIG).write_text(json.dumps(config | ({} if given is None else {"preprocess_cfg": given})))
    equal_to_open_clip(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda weights: {name: value for name, value in weights.items() if name != "logit_bias"},
        lambda weights: weights | {"logit_scale": weights["logit_scale"].reshape(1)},
        lambda weights: {f"module.{name}": value for name, value in weights.items()},
    ],
    ids=["no bias", "a scale of one dimension", "of a wrapped model"],
)
def test_weights_of_open_clip(
    saved: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> None:
    folder = foreign(saved, tmp_path / "f")
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)
    equal_to_open_clip(folder)


@pytest.mark.parametrize("name", ["open_clip_pytorch_model.safetensors", "model.safetensors", "epoch_5.safetensors"])
def test_other_names_of_weights(saved: Path, tmp_path: Path, name: str) -> None:
    folder = foreign(saved, tmp_path / "f", name)
    (folder / "zz.safetensors").write_bytes(b"another file")
    ours = equal_to_open_clip(folder)
    assert ours.fingerprint() == towers.load(saved).fingerprint()
    report = export.to_onnx(folder, tmp_path / "o", parts=("vision",), precisions=("fp32",), measure=False)
    assert report.graphs[0].max_abs <= 1e-5


def test_the_order_of_names(saved: Path, tmp_path: Path) -> None:
    folder = foreign(saved, tmp_path / "f")
    for name in ("open_clip_pytorch_model.safetensors", "model.safetensors", "a.safetensors"):
        (folder / name).write_bytes(b"another file")
    equal_to_open_clip(folder)


def test_a_pickled_file_that_open_clip_prefers_is_refused(saved: Path, tmp_path: Path) -> None:
    """Beside it model.safetensors is often another library's."""
    folder = foreign(saved, tmp_path / "f", "model.safetensors")
    torch.save({}, folder / "open_clip_pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled weights are not loaded"):
        towers.load(folder)


def test_a_saved_student_has_one_name(saved: Path, tmp_path: Path) -> None:
    folder = towers.save(tiny.encoder(), tmp_path / "s")
    (folder / WEIGHTS).rename(folder / "model.safetensors")
    with pytest.raises(ModelError, match=f"holds no {WEIGHTS}"):
        towers.load(folder)
