# SPDX-License-Identifier: Apache-2.0
"""Every tower with every family of language models: tokens counted right, features untouched, folders that open."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from test_vlm import language
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer, _create_vision_transformer
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

import vlm
from aced_sdk import towers
from aced_sdk.config import Student
from vlm.data.pictures import feature_shape, tower_features
from vlm.data.rows import encode, messages

Outside = Callable[[Tensor], Tensor]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
# every family, embeddings tied and untied
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "qwen2": {"tie_word_embeddings": False, "vocab_size": 300},
    "qwen3": {"head_dim": 16, "tie_word_embeddings": True},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16},
    "gemma3_text": {"head_dim": 16, "sliding_window": 64},
    "smollm3": {"tie_word_embeddings": False},
    "mistral": {"sliding_window": 64},
}


def siglip_vit(size: int, **options: Any) -> VisionTransformer:
    """timm's SigLIP ViT in small: no class token, pooled by attention."""
    shape = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": size, "act_layer": "gelu_tanh"}
    kind = {"class_token": False, "global_pool": "map"}
    return _create_vision_transformer("vit_base_patch16_siglip_224", **(shape | kind | options))


@register_model
def vit_matrix_siglip_32(pretrained: bool = False, **options: Any) -> VisionTransformer:
    return siglip_vit(32, **options)


@register_model
def vit_matrix_siglip_48(pretrained: bool = False, **options: Any) -> VisionTransformer:
    return siglip_vit(48, **options)


def student(vision: dict[str, Any]) -> towers.DualEncoder:
    text = {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    return towers.build(Student(architecture={"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}), seed=0).eval()


def after(module: torch.nn.Module, run: Callable[[Tensor], Any]) -> Outside:
    """What a block of the original tower puts out."""

    def outside(pixels: Tensor) -> Tensor:
        outputs: list[Tensor] = []
        hook = module.register_forward_hook(lambda _, __, output: outputs.append(output))
        run(pixels)
        hook.remove()
        return outputs[0]

    return outside


def open_clip_vit(folder: Path, size: int) -> tuple[Any, Outside, int]:
    encoder = student({"image_size": size, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16})
    visual: Any = encoder.model.visual
    last = after(visual.transformer.resblocks[-1], visual)
    return towers.save(encoder, folder), lambda pixels: last(pixels)[:, 1:], (size // 8) ** 2


def open_clip_siglip(folder: Path, size: int) -> tuple[Any, Outside, int]:
    name = f"vit_matrix_siglip_{size}"
    vision = {"timm_model_name": name, "timm_pool": "map", "timm_proj": "none", "image_size": size}
    encoder = student(vision)
    visual: Any = encoder.model.visual
    towers.save(encoder, folder)
    return f"local-dir:{folder}", after(visual.trunk.blocks[-1], visual), (size // 8) ** 2


def fastvit(folder: Path, size: int) -> tuple[Any, Outside, int]:
    size *= 2  # its stride is 32
    vision = {"timm_model_name": "fastvit_mci0", "timm_pool": "avg", "timm_proj": None, "image_size": size}
    encoder = student(vision)
    trunk: Any = encoder.model.visual.trunk  # type: ignore[union-attr]
    return encoder, lambda pixels: trunk.forward_features(pixels).flatten(2).transpose(1, 2), (size // 32) ** 2


def resnet(folder: Path, size: int) -> tuple[Any, Outside, int]:
    size = {32: 64, 48: 80}[size]  # the second is no multiple of its stride: 3 x 3 tokens
    encoder = student({"timm_model_name": "resnet10t", "timm_pool": "avg", "timm_proj": "linear", "image_size": size})
    trunk: Any = encoder.model.visual.trunk  # type: ignore[union-attr]
    return encoder, lambda pixels: trunk.forward_features(pixels).flatten(2).transpose(1, 2), (-(-size // 32)) ** 2


def hugging_face(
    model: str, config: str, processor: str, both: bool
) -> Callable[[Path, int], tuple[Any, Outside, int]]:
    """An encoder as transformers saves it; `both`: with its text tower, as hubs have CLIP and SigLIP."""

    def make(folder: Path, size: int) -> tuple[Any, Outside, int]:
        sizes = SIZES | {"image_size": size, "patch_size": 8}
        if not config.startswith("Dinov2"):
            sizes["intermediate_size"] = 64
        kind = getattr(transformers, config)
        texts = SIZES | {"intermediate_size": 64, "vocab_size": 60, "projection_size": 32}
        torch.manual_seed(1)
        whole = getattr(transformers, model)(kind(vision_config=sizes, text_config=texts) if both else kind(**sizes))
        whole.eval().save_pretrained(folder)
        squash = {"height": size, "width": size}
        crop = {} if processor == "SiglipImageProcessor" else {"crop_size": squash}
        getattr(transformers, processor)(size=squash, **crop).save_pretrained(folder)
        tower = whole.vision_model if both else whole
        prefix = 0 if "Siglip" in model else 1

        def outside(pixels: Tensor) -> Tensor:
            hidden: Tensor = tower(pixels, output_hidden_states=True).hidden_states[-1]
            return hidden[:, prefix:]

        return folder, outside, (size // 8) ** 2

    return make


TOWERS: dict[str, Callable[[Path, int], tuple[Any, Outside, int]]] = {
    "our CLIP ViT": open_clip_vit,
    "open_clip SigLIP": open_clip_siglip,
    "FastViT": fastvit,
    "ResNet": resnet,
    "CLIPModel": hugging_face("CLIPModel", "CLIPConfig", "CLIPImageProcessor", True),
    "CLIPVisionModel": hugging_face("CLIPVisionModel", "CLIPVisionConfig", "CLIPImageProcessor", False),
    "SiglipModel": hugging_face("SiglipModel", "SiglipConfig", "SiglipImageProcessor", True),
    "SiglipVisionModel": hugging_face("SiglipVisionModel", "SiglipVisionConfig", "SiglipImageProcessor", False),
    "DINOv2": hugging_face("Dinov2Model", "Dinov2Config", "BitImageProcessor", False),
    "ViT": hugging_face("ViTModel", "ViTConfig", "ViTImageProcessor", False),
}


@pytest.fixture(scope="module")
def languages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("languages")
    found = {
        name: language(folder / name, chatml=name != "gemma", family=name, **changes)
        for name, changes in FAMILIES.items()
    }
    # transformers reads a Qwen 2 folder with this tokenizer whatever it says
    letters = {letter: number for number, letter in enumerate(bytes_to_unicode().values())}
    marks = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]}
    Qwen2Tokenizer(vocab=letters, merges=[], **marks).save_pretrained(found["qwen2"])
    return found


def question(processor: Any, picture: Image.Image) -> Any:
    prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what colour is it ?"}]}]
    text = processor.apply_chat_template(prompt, add_generation_prompt=True)
    return processor(images=[picture], text=[text], return_tensors="pt")


def check(model: Any, processor: Any, outside: Outside, tokens: int) -> tuple[Any, Tensor]:
    """Tokens, features and an answer; returns the inputs and their logits."""
    picture = Image.effect_noise((45, 33), 90).convert("RGB")
    inputs = question(processor, picture)
    counted = int((inputs["input_ids"] == model.config.image_token_id).sum())
    assert counted == tokens == model.config.image_seq_length
    assert processor._get_num_multimodal_tokens(image_sizes=[(33, 45)])["num_image_tokens"] == [
        tokens
    ]  # as servers ask
    sample = vlm.Sample("s", (("what is it ?", "red"),), (picture,))
    ids, targets = encode(sample, processor, tokens)
    text = processor.apply_chat_template(messages(sample), tokenize=False)
    assert processor(images=[picture], text=[text])["input_ids"][0][: len(ids)] == ids
    assert processor.tokenizer.decode([target for target in targets if target >= 0][:-1]) == "red"
    with torch.no_grad():
        inside = tower_features(model, inputs["pixel_values"])
        torch.testing.assert_close(inside, outside(inputs["pixel_values"]), atol=1e-5, rtol=1e-5)
        assert inside.shape[1:] == feature_shape(model)
        seen = model.get_image_features(inputs["pixel_values"]).pooler_output
        projected = model.model.multi_modal_projector(inside)
        torch.testing.assert_close(torch.cat(list(seen)).flatten(), projected.flatten(), atol=1e-5, rtol=1e-5)
        logits = model(**inputs).logits
        answer = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert answer.shape[1] > inputs["input_ids"].shape[1]
    return inputs, logits


# all pairs, but of the slow towers and those that share a class with another one only two, one of each size
FEW = ("FastViT", "ResNet", "CLIPVisionModel", "SiglipVisionModel", "ViT")
MATRIX = [(name, family) for name in TOWERS for family in FAMILIES if name not in FEW or family in ("llama", "qwen2")]


def same_weights(found: Any, expected: Any) -> None:
    """Every tensor, bit for bit; outputs may differ in the last digits, since libraries choose other kernels."""
    own = expected.state_dict()
    assert found.state_dict().keys() == own.keys()
    assert [name for name, tensor in found.state_dict().items() if not torch.equal(tensor, own[name])] == []


@pytest.mark.parametrize(("name", "family"), MATRIX)
def test_every_tower_with_every_language_model(
    name: str, family: str, languages: dict[str, Path], tmp_path: Path
) -> None:
    size = (32, 48)[list(FAMILIES).index(family) % 2]
    vision, outside, tokens = TOWERS[name](tmp_path / "tower", size)
    model, processor = vlm.build(vision, languages[family])
    inputs, logits = check(model, processor, outside, tokens)
    saved = vlm.save(model, processor, tmp_path / "saved")
    again, loading = AutoModelForImageTextToText.from_pretrained(saved, output_loading_info=True)
    assert not any(loading.values()), loading
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(**inputs).logits, logits, atol=1e-5, rtol=1e-5)
    same_weights(again, model)
    same = question(AutoProcessor.from_pretrained(saved), Image.new("RGB", (9, 70), (200, 3, 60)))
    ours = question(processor, Image.new("RGB", (9, 70), (200, 3, 60)))
    assert all(torch.equal(same[key], ours[key]) for key in ours)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize(
    ("name", "size", "factor"), [("our CLIP ViT", 48, 3), ("SiglipModel", 32, 2), ("DINOv2", 32, 4)]
)
def test_pixel_shuffle_takes_so_many_times_fewer_tokens(
    name: str, size: int, factor: Any, family: str, languages: dict[str, Path], tmp_path: Path
) -> None:
    vision, outside, tokens = TOWERS[name](tmp_path / "tower", size)
    projector = vlm.Projector(kind="pixel_shuffle", factor=factor)
    model, processor = vlm.build(vision, languages[family], projector=projector)
    inputs, logits = check(model, processor, outside, tokens // factor**2)
    saved = vlm.save(model, processor, tmp_path / "saved")
    again, loading = AutoModelForImageTextToText.from_pretrained(saved, output_loading_info=True)
    assert not any(loading.values()), loading
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(**inputs).logits, logits, atol=1e-5, rtol=1e-5)
    same_weights(again, model)


FRESH = """
import sys, json, torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode
for folder in sys.argv[1:]:
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what colour is it ?"}]}]
    text = processor.apply_chat_template(prompt, add_generation_prompt=True)
    batch = processor(images=[Image.new("RGB", (40, 30), (9, 200, 30))], text=[text], return_tensors="pt")
    with torch.no_grad():
        print(json.dumps([type(model).__name__, model.eval()(**batch).logits[0, -1].tolist()]))
assert not {"aced_sdk", "vlm"} & set(sys.modules)
"""


def test_a_fresh_process_without_this_package_computes_the_same(languages: dict[str, Path], tmp_path: Path) -> None:
    kinds = {
        "our CLIP ViT": ("mlp", "LlavaForConditionalGeneration"),
        "DINOv2": ("linear", "LlavaForConditionalGeneration"),
        "FastViT": ("mlp", "FastVlmForConditionalGeneration"),
        "SiglipModel": ("pixel_shuffle", "AyaVisionForConditionalGeneration"),
    }
    folders, expected = [], []
    for number, (name, (projector, kind)) in enumerate(kinds.items()):
        vision, _, _ = TOWERS[name](tmp_path / f"tower-{number}", 32)
        model, processor = vlm.build(vision, languages["qwen2"], projector=vlm.Projector(kind=projector))  # type: ignore[arg-type]
        folders.append(str(vlm.save(model, processor, tmp_path / f"saved-{number}")))
        with torch.no_grad():
            logits = model(**question(processor, Image.new("RGB", (40, 30), (9, 200, 30)))).logits[0, -1]
        expected.append((kind, logits))
    done = subprocess.run([sys.executable, "-c", FRESH, *folders], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for line, (kind, logits) in zip(done.stdout.splitlines(), expected, strict=True):
        name, values = json.loads(line)
        assert name == kind
        torch.testing.assert_close(torch.tensor(values), logits, atol=1e-5, rtol=1e-5)
