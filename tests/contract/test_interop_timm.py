# SPDX-License-Identifier: Apache-2.0
"""Image towers as folders that timm opens by itself: convolutional ones folded, ViTs as they are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from torch.nn.modules.batchnorm import _BatchNorm

import export
from aced_sdk import towers
from aced_sdk.config import Student
from aced_sdk.errors import ModelError, UnsupportedError

ALONE = """
import sys
sys.modules.update(dict.fromkeys(("aced_sdk", "export", "open_clip", "transformers", "vlm")))
import numpy as np, timm, torch
from PIL import Image
folder, picture, out = sys.argv[1:]
model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
pixels = transform(Image.open(picture))[None]
with torch.no_grad():
    np.savez(out, pixels=pixels, embeds=model(pixels))
"""


def save(folder: Path, resize: str = "squash", size: int = 64, embed_dim: int = 16, **vision: Any) -> Path:
    """A student with an image tower of timm, its batch norms as if it had been trained."""
    vision_cfg = {"image_size": size, "timm_model_pretrained": False, "timm_pool": "avg", "timm_proj": None, **vision}
    architecture = tiny.ARCHITECTURE | {"vision_cfg": vision_cfg, "embed_dim": embed_dim}
    encoder = towers.build(Student(architecture=architecture, resize=resize), seed=0)
    torch.manual_seed(0)
    for module in encoder.modules():
        if isinstance(module, _BatchNorm):
            for tensor, low, high in (
                (module.running_mean, -0.3, 0.3), (module.running_var, 0.5, 2.0), (module.weight, 0.5, 1.5),
            ):  # fmt: skip
                torch.nn.init.uniform_(tensor, low, high)  # type: ignore[arg-type]
    return towers.save(encoder, folder, license="Apache-2.0")


def picture(path: Path) -> Image.Image:
    pixels = np.random.default_rng(3).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((190, 120), Image.Resampling.BICUBIC).save(path)
    return Image.open(path)


TOWERS: dict[str, dict[str, Any]] = {
    "fastvit": {"timm_model_name": "fastvit_t8"},
    "fastvit_projection": {"timm_model_name": "fastvit_t8", "timm_proj": "linear", "resize": "shortest"},
    "mobileclip": {"timm_model_name": "fastvit_mci0"},  # its last stage attends, and is named in another way
    "resnet": {"timm_model_name": "test_resnet", "timm_proj": "linear"},
    "convnext": {"timm_model_name": "test_convnext", "timm_proj": "linear"},
    "vit": {"timm_model_name": "test_vit", "size": 160, "timm_pool": "token", "timm_proj": "linear"},
    "vit_avg": {"timm_model_name": "test_vit", "size": 160, "timm_pool": "avg", "timm_proj": "linear"},
    "vit_avg_bare": {
        "timm_model_name": "test_vit",
        "size": 160,
        "embed_dim": 64,
        "timm_pool": "avg",
        "timm_proj": "none",
    },
}


@pytest.mark.parametrize("name", list(TOWERS))
def test_towers_of_timm(name: str, tmp_path: Path) -> None:
    report = export.to_timm(save(tmp_path / "s", **TOWERS[name]), tmp_path / "t")
    assert report.image_max_abs <= 1e-5
    assert report.pixels_max_abs <= 1e-6
    assert report.reparameterized == (name in ("fastvit", "fastvit_projection", "mobileclip"))
    card = (tmp_path / "t/README.md").read_text()
    assert "license: Apache-2.0" in card
    assert ("folded" in card) == report.reparameterized
    assert {path.name for path in (tmp_path / "t").iterdir()} == {"config.json", "model.safetensors", "README.md"}


@pytest.mark.parametrize("kind", ["convolutional", "clip_vit", "quick_gelu"])
def test_a_process_with_timm_alone(kind: str, tmp_path: Path) -> None:
    if kind == "convolutional":
        folder = save(tmp_path / "s", "shortest", timm_model_name="fastvit_t8")
    else:
        folder = towers.save(tiny.encoder(quick_gelu=kind == "quick_gelu"), tmp_path / "s")
    export.to_timm(folder, tmp_path / "t")
    student, image = towers.load(folder), picture(tmp_path / "p.png")
    paths = [str(tmp_path / name) for name in ("t", "p.png", "out.npz")]
    done = subprocess.run(
        [sys.executable, "-c", ALONE, *paths], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "out.npz")
    np.testing.assert_allclose(found["pixels"][0], student.preprocess(image).numpy(), atol=1e-6)
    embeds = found["embeds"] / np.linalg.norm(found["embeds"], axis=1, keepdims=True)
    np.testing.assert_allclose(embeds, student.encode_image([image]).numpy(), atol=1e-5)


def test_what_timm_cannot_hold(tmp_path: Path) -> None:
    mlp = save(tmp_path / "mlp", timm_model_name="test_resnet", timm_proj="mlp")
    with pytest.raises(UnsupportedError, match=r"at most a linear projection.*export\.to_onnx"):
        export.to_timm(mlp, tmp_path / "t")
    longest = save(tmp_path / "longest", "longest", timm_model_name="test_resnet")
    with pytest.raises(UnsupportedError, match="pads after the longest side"):
        export.to_timm(longest, tmp_path / "t")
    assert not (tmp_path / "t").exists()
    (tmp_path / "t").mkdir()
    (tmp_path / "t/config.json").write_text("{}")
    with pytest.raises(export.ExportError, match="holds something else"):
        export.to_timm(towers.save(tiny.encoder(), tmp_path / "s"), tmp_path / "t")
    assert json.loads((tmp_path / "t/config.json").read_text()) == {}


def test_a_vit_of_another_picture_size_is_refused() -> None:
    tower = {"timm_model_name": "vit_tiny_patch16_224", "timm_model_pretrained": False, "image_size": 64}
    with pytest.raises(ModelError, match=r"takes pictures of 224 x 224, not 64 x 64.*vision_cfg\.image_size"):
        tiny.encoder(vision_cfg=tower)
