# SPDX-License-Identifier: Apache-2.0
"""A folder is the tower: the same numbers here, in open_clip and in transformers, and nothing altered gets in."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import ARCHITECTURE, encoder
from torch import Tensor, nn

from aced_sdk import towers
from aced_sdk.config import Engine, Optimizer, Student
from aced_sdk.engine import build_engine
from aced_sdk.errors import AcedError, ConfigError, ModelError, UnsupportedError
from aced_sdk.towers import architecture, huggingface
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
    torch.testing.assert_close(again.encode_image(pictures()), own.encode_image(pictures()), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(again.encode_text(TEXTS), own.encode_text(TEXTS), atol=1e-6, rtol=1e-5)
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


def test_the_allow_list_has_the_fields_and_architectures_of_open_clip() -> None:
    for ours, theirs in ((architecture.Vision, CLIPVisionCfg), (architecture.Text, CLIPTextCfg)):
        assert set(ours.model_fields) == {field.name for field in dataclasses.fields(theirs)}
    for name in open_clip.list_models():
        model_cfg = open_clip.get_model_config(name)
        if "multimodal_cfg" not in model_cfg:
            architecture.check(model_cfg)


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
    assert profile.parameters > 85e6


def test_an_encoder_is_a_path_once_it_has_one(saved: Path) -> None:
    own = encoder()
    with pytest.raises(ModelError, match="has no folder yet"):
        os.fspath(own)
    loaded = towers.load(saved)
    assert os.fspath(loaded) == str(saved)
    assert towers.load(loaded).fingerprint() == loaded.fingerprint()


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ModelError, match="cannot be saved"):
        towers.save(encoder(), tmp_path / "file" / "student")


# -- other sizes ----------------------------------------------------------------------------------------------------


def coarse(count: int, side: int = 16) -> Tensor:
    """Pictures that keep most of what they show at half the side: uint8 [count, 3, side, side]."""
    generator = torch.Generator().manual_seed(1)
    blocks = torch.randint(0, 256, (count, 3, 4, 4), generator=generator, dtype=torch.uint8)
    return blocks.repeat_interleave(side // 4, dim=2).repeat_interleave(side // 4, dim=3)


def timm_tower(name: str, size: int, **vision: object) -> towers.DualEncoder:
    tower = {"timm_model_name": name, "timm_model_pretrained": False, "timm_proj": "linear", "image_size": size}
    return encoder(vision_cfg=tower | vision)


def test_shrunk_pictures_are_pillows() -> None:
    images = torch.stack([encoder().resize(picture) for picture in pictures()])
    small = towers.shrink(images, 8)
    assert (small.shape, small.dtype) == ((4, 3, 8, 8), torch.uint8)
    for picture, own in zip(images, small, strict=True):
        theirs = Image.fromarray(picture.permute(1, 2, 0).numpy()).resize((8, 8), Image.Resampling.BICUBIC)
        distance = own.permute(1, 2, 0).int() - torch.from_numpy(np.array(theirs)).int()
        assert int(distance.abs().max()) <= 1  # rounding
    assert towers.shrink(images, 16) is images


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_shrunk_pictures_are_the_same_on_a_gpu() -> None:
    images = coarse(4, 64)
    distance = towers.shrink(images.cuda(), 24).cpu().int() - towers.shrink(images, 24).int()
    assert int(distance.abs().max()) <= 1


def test_the_own_size_is_left_as_it_was() -> None:
    own, images = encoder(), coarse(4)
    with torch.no_grad():
        out = own(images, own.tokenize(["a"] * 4))
        plain = own.model.encode_image(own.normalise(images), normalize=True)
    torch.testing.assert_close(out.image, plain, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(own.encode_image(images), plain, atol=1e-6, rtol=1e-5)


def test_half_the_size_is_another_view_of_the_same_picture() -> None:
    own, images = encoder(), coarse(16)
    names = list(own.state_dict())
    whole, half = own.encode_image(images), own.encode_image(towers.shrink(images, 8))
    assert torch.isfinite(half).all()
    assert not torch.equal(half, whole)
    similar = whole @ half.T
    assert similar.diagonal().mean() > similar.mean()
    assert list(own.state_dict()) == names
    assert own.profile(8).image_macs < 0.5 * own.profile().image_macs
    assert own.profile(8).text_macs == own.profile().text_macs


def test_resampled_positions_are_those_that_open_clip_gives_a_smaller_tower() -> None:
    sizes = {"layers": 1, "width": 32, "patch_size": 8, "head_width": 16}
    large = encoder(vision_cfg=sizes | {"image_size": 32})
    small = encoder(vision_cfg=sizes | {"image_size": 16})
    weights = large.model.state_dict()
    open_clip.factory.resize_pos_embed(weights, small.model)
    small.model.load_state_dict(weights)
    images = coarse(4)
    torch.testing.assert_close(large.encode_image(images), small.encode_image(images), atol=1e-6, rtol=0)


class Images(nn.Module):
    def __init__(self, encoder: towers.DualEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        image: Tensor = self.encoder(images, tokens).image
        return image


@pytest.mark.parametrize(("kind", "stage"), [("single", 0), ("deepspeed", 0), ("deepspeed", 2)])
def test_both_sizes_train_the_one_set_of_positions(kind: Any, stage: Any) -> None:
    steps = []
    for size in (16, 8):
        own = encoder()
        positions = own.model.visual.positional_embedding
        before = positions.detach().clone()
        config = Engine(kind=kind, zero_stage=stage, device="cpu")
        engine = build_engine(Images(own), config, Optimizer(weight_decay=0))
        engine.backward(engine.forward(towers.shrink(coarse(4), size), own.tokenize(["a"] * 4))[:, 0].sum())
        engine.step(1e-2)
        steps.append((own.model.visual.positional_embedding.detach() - before).abs().amax(dim=1))
    assert all((step > 1e-3).all() for step in steps)  # the class token's and each patch's
    assert not torch.equal(*steps)


def test_a_size_that_the_tower_cannot_take_is_told_before_training() -> None:
    towers.check_size(encoder(), 8)
    towers.check_size(encoder(), 16)
    for size, cause, remedy in ((12, "no multiple of the student's patch of 8", "take 8"), (24, "16 x 16", "smaller")):
        with pytest.raises(ConfigError, match=cause) as caught:
            towers.check_size(encoder(), size, field="curation.scoring_size")
        assert (remedy in caught.value.remedy, caught.value.field) == (True, "curation.scoring_size")


@pytest.mark.parametrize(
    ("name", "size", "pool", "learned"),
    [
        ("vit_tiny_patch16_224", 224, "token", "trunk.pos_embed"),
        ("vit_pwee_patch16_reg1_gap_256", 256, "avg", "trunk.pos_embed"),  # no position of a class token, as SigLIP
        ("resnet18", 64, "avg", "trunk.conv1.weight"),
    ],
)
def test_timms_vits_and_convolutional_towers_take_other_sizes(name: str, size: int, pool: str, learned: str) -> None:
    own, half = timm_tower(name, size, timm_pool=pool), size // 2
    towers.check_size(own, half)
    own(towers.shrink(coarse(2, size), half), own.tokenize(["a", "b"])).image[:, 0].sum().backward()
    gradient = own.model.visual.get_parameter(learned).grad
    assert gradient is not None
    assert float(gradient.abs().sum()) > 0
    assert own.profile(half).image_macs < 0.5 * own.profile().image_macs


def test_a_tower_of_one_size_says_so() -> None:
    with pytest.raises(ConfigError, match="224 x 224 alone"):
        towers.check_size(timm_tower("eva02_tiny_patch14_224", 224, timm_pool="token"), 112)


def test_a_timm_tower_whose_size_is_no_multiple_of_its_patch_still_works() -> None:
    tower = {"timm_model_name": "vit_so400m_patch14_siglip_384", "timm_pool": "map", "image_size": 384}
    student = towers.ProfiledStudent(architecture=ARCHITECTURE | {"vision_cfg": tower})
    assert student.profile().image_macs == pytest.approx(335e9, rel=0.01)


@pytest.mark.slow
def test_fastvits_stem_trains_on_a_cpu() -> None:
    # In a process of its own, for it broke the process's memory: see _channels_last.
    code = (
        "from tiny import encoder; import torch; torch.set_num_threads(1)\n"
        "vision = dict(timm_model_name='fastvit_mci0', timm_pool='avg', image_size=256)\n"
        "own = encoder(vision_cfg=vision).train()\n"
        "for _ in range(5): own.model.visual.trunk.stem(torch.zeros(2, 3, 256, 256)).sum().backward()"
    )
    folder = Path(__file__).resolve().parents[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(folder.parent)])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


# -- wrong tokens ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tokens",
    [
        torch.full((2, 8), 49408),  # of a larger vocabulary
        torch.full((2, 8), -100),  # a label's padding
        torch.ones(2, 77, dtype=torch.int64),  # of a longer context
        torch.ones(8, dtype=torch.int64),
    ],
)
def test_tokens_of_another_model_are_refused(tokens: Tensor) -> None:
    own = encoder()
    for embed in (own.encode_text, lambda tokens: own(coarse(2), tokens)):
        with pytest.raises(ModelError, match=r"another model's.*\[N, 8\] with ids below 49408") as caught:
            embed(tokens)
        assert "own .tokenize" in caught.value.remedy
    torch.testing.assert_close(own.encode_text(own.tokenize(TEXTS)), own.encode_text(TEXTS), atol=1e-6, rtol=1e-5)


# -- profiles -------------------------------------------------------------------------------------------------------


def test_a_student_is_profiled_without_weights(saved: Path) -> None:
    by_shape = towers.ProfiledStudent(architecture=ARCHITECTURE)
    assert by_shape.profile() == encoder().profile()
    assert by_shape.profile(8) == encoder().profile(8)
    assert towers.ProfiledStudent(architecture=f"local-dir:{saved}").profile() == encoder().profile()
    assert by_shape.hash() == Student(architecture=ARCHITECTURE).hash()
    with pytest.raises(ModelError, match="knows no architecture"):
        towers.ProfiledStudent(architecture="ViT-B-33").profile()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_encoder_in_half_precision_embeds_like_itself(dtype: torch.dtype) -> None:
    own, half = encoder(), encoder().to(dtype)
    for found, expected in (
        (half.encode_image(pictures()), own.encode_image(pictures())),
        (half.encode_text(TEXTS), own.encode_text(TEXTS)),
    ):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, atol=0.03, rtol=0)
