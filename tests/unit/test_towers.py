# SPDX-License-Identifier: Apache-2.0
"""A folder is the tower: the same numbers here, in open_clip and in transformers, and nothing altered gets in."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import ARCHITECTURE, encoder

from aced_sdk import towers
from aced_sdk.config import Student
from aced_sdk.errors import AcedError, ModelError, UnsupportedError
from aced_sdk.towers import huggingface
from aced_sdk.towers.folder import CONFIG, MANIFEST, WEIGHTS

TEXTS = ["a red boat", "two small stars", "tree"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return towers.save(encoder(), tmp_path_factory.mktemp("towers") / "student", license="MIT", facts={"seed": 0})


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def pictures() -> list[Image.Image]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(24, 40, "RGB"), (60, 31, "RGBA"), (16, 16, "L"), (33, 20, "P")]
    made = []
    for height, width, mode in shapes:
        pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8).numpy()
        made.append(Image.fromarray(pixels).convert(mode))
    return made


def test_equal_seeds_build_equal_towers_and_leave_the_generator_alone() -> None:
    before = torch.get_rng_state()
    one, two, other = encoder(3), encoder(3), encoder(4)
    assert torch.equal(torch.get_rng_state(), before)
    assert one.fingerprint() == two.fingerprint() != other.fingerprint()
    assert one.scale == pytest.approx(10.0)
    assert one.bias == -10.0


def test_save_and_load_are_bit_equal(saved: Path) -> None:
    own, again = encoder(), towers.load(saved)
    for name, tensor in own.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name
    assert again.fingerprint() == own.fingerprint()
    assert torch.equal(again.encode_image(pictures()), own.encode_image(pictures()))
    assert torch.equal(again.encode_text(TEXTS), own.encode_text(TEXTS))
    manifest = towers.read_manifest(saved)
    assert (manifest.license, manifest.facts) == ("MIT", {"seed": 0})
    assert "MACs" in (saved / "README.md").read_text()


@pytest.mark.parametrize("resize", ["squash", "shortest", "longest"])
def test_open_clip_gives_the_same_embeddings_and_preprocessing(tmp_path: Path, resize: str) -> None:
    own = towers.build(Student(architecture=ARCHITECTURE, resize=resize, mean=(0.1, 0.2, 0.3)), 0)
    towers.save(own, tmp_path / "student")
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'student'}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'student'}")
    model.eval()
    opaque = [picture for picture in pictures() if picture.mode != "RGBA"]  # open_clip turns transparent pixels black
    for picture in opaque:
        torch.testing.assert_close(own.preprocess(picture), preprocess(picture.convert("RGB")), atol=1e-6, rtol=0)
    with torch.no_grad():
        theirs = model.encode_image(torch.stack([preprocess(p.convert("RGB")) for p in opaque]), normalize=True)
        texts = model.encode_text(tokenizer(TEXTS), normalize=True)
    torch.testing.assert_close(own.encode_image(opaque), theirs, atol=1e-6, rtol=0)
    torch.testing.assert_close(own.encode_text(TEXTS), texts, atol=1e-6, rtol=0)


def test_transparent_pictures_lie_on_white() -> None:
    clear = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    assert int(encoder().resize(clear).min()) == 255


def test_embeddings_do_not_depend_on_the_batch_or_leave_the_mode_changed() -> None:
    own = encoder().train()
    images = pictures()
    whole = own.encode_image(images, batch_size=4)
    torch.testing.assert_close(own.encode_image(images, batch_size=1), whole, atol=1e-6, rtol=0)
    torch.testing.assert_close(own.encode_text(TEXTS, batch_size=2), own.encode_text(TEXTS), atol=1e-6, rtol=0)
    torch.testing.assert_close(whole.norm(dim=1), torch.ones(4))
    assert own.training
    assert own.encode_image([]).shape == (0, 16)


def test_altered_weights_are_refused(copied: Path) -> None:
    content = bytearray((copied / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (copied / WEIGHTS).write_bytes(content)
    with pytest.raises(ModelError, match="is not the file that was saved"):
        towers.load(copied)


def test_weights_of_another_architecture_are_refused(copied: Path) -> None:
    (copied / MANIFEST).unlink()  # a folder that open_clip itself saved has no manifest
    assert towers.load(copied).fingerprint() == encoder().fingerprint()
    config = json.loads((copied / CONFIG).read_text())
    config["model_cfg"]["vision_cfg"]["layers"] = 2
    (copied / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ModelError, match="lacks 12 tensors"):
        towers.load(copied)
    config["model_cfg"]["vision_cfg"] |= {"layers": 1, "width": 64}
    (copied / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ModelError, match="does not fit its config"):
        towers.load(copied)
    weights = load_file(copied / WEIGHTS)
    save_file(weights | {"stray": torch.zeros(1)}, copied / WEIGHTS)
    config["model_cfg"] = ARCHITECTURE | {"init_logit_bias": -10}
    (copied / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ModelError, match="1 unknown ones"):
        towers.load(copied)


@pytest.mark.parametrize(
    ("content", "cause"), [(None, "is no model folder"), ("{", "is not JSON"), ("[]", "model_cfg")]
)
def test_a_folder_without_a_config_is_refused(copied: Path, content: str | None, cause: str) -> None:
    (copied / CONFIG).unlink()
    if content is not None:
        (copied / CONFIG).write_text(content)
    with pytest.raises(ModelError, match=cause):
        towers.load(copied)


def test_pickled_weights_are_never_loaded(copied: Path) -> None:
    torch.save(load_file(copied / WEIGHTS), copied / "open_clip_pytorch_model.bin")
    (copied / WEIGHTS).unlink()
    with pytest.raises(ModelError, match=r"holds no open_clip_model.safetensors"):
        towers.load(copied)


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        ("ViT-B-33", ModelError),
        ({"embed_dim": 16, "vision_cfg": {"image_size": 16}, "text_cfg": {"hights": 1}}, ModelError),
        ({"embed_dim": 16}, AcedError),
        (ARCHITECTURE | {"multimodal_cfg": {}}, UnsupportedError),
        (ARCHITECTURE | {"text_cfg": ARCHITECTURE["text_cfg"] | {"vocab_size": 100}}, ModelError),
    ],
)
def test_architectures_that_cannot_be_built_are_refused(architecture: object, kind: type[AcedError]) -> None:
    with pytest.raises(kind) as caught:
        towers.build(Student(architecture=architecture), 0)
    assert caught.value.remedy


def test_transformers_sees_what_the_tower_sees() -> None:
    own = encoder()
    model = huggingface.clip_vision_model(own)
    processor = huggingface.clip_image_processor(own)
    opaque = [picture.convert("RGB") for picture in pictures()]
    pixels = processor(opaque, return_tensors="pt")["pixel_values"]
    images = torch.stack([own.preprocess(picture) for picture in opaque])
    # Its resampling may be torchvision's, which rounds otherwise than Pillow: the same geometry, a few levels apart.
    assert float((pixels - images).abs().mean()) < 0.01
    assert float((pixels - images).abs().max()) < 0.2
    with torch.no_grad():
        embedded = model(images).pooler_output @ own.model.visual.proj
        ours = own.model.encode_image(images)
    torch.testing.assert_close(embedded, ours, atol=1e-5, rtol=0)


def test_a_tower_that_transformers_cannot_hold_is_refused() -> None:
    vision = ARCHITECTURE["vision_cfg"] | {"pool_type": "avg"}
    with pytest.raises(ModelError, match="no plain CLIP ViT"):
        huggingface.clip_vision_model(encoder(vision_cfg=vision))


def test_macs_of_the_papers_vit_b_32_are_those_of_the_paper() -> None:
    vision = {"image_size": 256, "layers": 12, "width": 768, "patch_size": 32}
    text = {"context_length": 64, "vocab_size": 49408, "width": 384, "heads": 6, "layers": 12}
    profile = encoder(embed_dim=384, vision_cfg=vision, text_cfg=text).profile()
    assert profile.macs == pytest.approx(7.14e9, rel=0.01)
    assert profile.macs == profile.image_macs + profile.text_macs
    assert profile.parameters > profile.image_parameters > 85e6


def test_an_encoder_is_a_path_once_it_has_one(saved: Path) -> None:
    own = encoder()
    with pytest.raises(ModelError, match="lies in no folder"):
        os.fspath(own)
    loaded = towers.load(saved)
    assert os.fspath(loaded) == str(saved)
    assert towers.load(loaded).fingerprint() == loaded.fingerprint()


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ModelError, match="cannot be saved"):
        towers.save(encoder(), tmp_path / "file" / "student")
