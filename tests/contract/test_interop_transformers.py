# SPDX-License-Identifier: Apache-2.0
"""Students as folders that transformers opens by itself: CLIP and SigLIP, whole and the vision tower apart."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.models import register_model
from timm.models.vision_transformer import _create_vision_transformer

import export
from aced_sdk import towers
from aced_sdk.config import Student
from aced_sdk.errors import ConfigError, ModelError, UnsupportedError
from aced_sdk.towers.huggingface import is_clip_vit, is_siglip_vit, siglip_vision_model
from export.folders.to_transformers import BIAS_KEY

TEXTS = ["a red apple", "Two apples, it's 12!", "a photo of a cat " * 9]
ALONE = """
import json, sys
sys.modules.update(dict.fromkeys(("aced_sdk", "export", "open_clip", "timm", "vlm")))  # an import of one would fail
import numpy as np, torch
from PIL import Image
from transformers import AutoModel, AutoProcessor
folder, picture, out, texts = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder, backend="pil")
inputs = processor(
    images=[Image.open(picture)], text=texts, padding="max_length", truncation=True, return_tensors="pt"
)
with torch.no_grad():
    found = model(**inputs)
np.savez(out, image=found.image_embeds, text=found.text_embeds, logits=found.logits_per_image)
"""


@register_model
def vit_toy_siglip_32(pretrained: bool = False, **options: Any) -> Any:
    """A SigLIP ViT as timm builds them, small enough for seconds."""
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    kind = {"class_token": False, "global_pool": "map", "act_layer": "gelu_tanh"}
    return _create_vision_transformer("vit_base_patch32_siglip_256", pretrained=pretrained, **(sizes | kind | options))


def words(folder: Path, side: str = "right") -> Path:
    """A tokenizer of a few words, which ends texts as SigLIP's does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    known = ["[PAD]", "[UNK]", "</s>", "a", "red", "apple", "apples", "photo", "of", "cat", "two", "its", "12"]
    raw = Tokenizer(models.WordLevel({word: number for number, word in enumerate(known)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    marks = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "</s>", "padding_side": side}
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, **marks)
    fast.save_pretrained(folder)
    return folder


def siglip(
    folder: Path, vision: dict[str, Any] | None = None, side: str = "right", embed_dim: int = 32, **text: Any
) -> Path:
    """A student in SigLIP's shape, saved; `side` is where its tokenizer pads."""
    vision_cfg = {
        "image_size": 32,
        "timm_model_name": "vit_toy_siglip_32",
        "timm_model_pretrained": False,
        "timm_pool": "map",
        "timm_proj": "none",
    }
    text_cfg = {
        "context_length": 8, "vocab_size": 16, "width": 48, "heads": 2, "layers": 1,
        "no_causal_mask": True, "proj_bias": True, "pool_type": "last",
        "norm_kwargs": {"eps": 1e-6}, "act_kwargs": {"approximate": "tanh"},
        "hf_tokenizer_name": str(words(folder / "words", side)), "tokenizer_kwargs": {"clean": "canonicalize"},
    }  # fmt: skip
    architecture = {
        "embed_dim": embed_dim,
        "custom_text": True,
        "vision_cfg": vision_cfg | (vision or {}),
        "text_cfg": text_cfg | text,
    }
    encoder = towers.build(Student(architecture=architecture, init_bias=-7.0), seed=0)
    with torch.no_grad():
        encoder.model.text.text_projection.bias.normal_()  # type: ignore[union-attr]
    return towers.save(encoder, folder / "s", license="Apache-2.0")


@pytest.fixture(scope="module", params=["clip", "siglip"])
def student_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    return siglip(folder) if request.param == "siglip" else towers.save(tiny.encoder(), folder / "s")


def picture(path: Path) -> Image.Image:
    pixels = np.random.default_rng(3).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((90, 70), Image.Resampling.BICUBIC).save(path)
    return Image.open(path)


def test_a_process_with_transformers_alone(student_folder: Path, tmp_path: Path) -> None:
    report = export.to_transformers(student_folder, tmp_path / "t")
    assert report.image_max_abs <= 1e-5
    assert report.text_max_abs is not None
    assert report.text_max_abs <= 1e-5
    assert report.pixels_max_abs_pil == 0
    student, image = towers.load(student_folder), picture(tmp_path / "p.png")
    words = [str(tmp_path / name) for name in ("t", "p.png", "out.npz")]
    done = subprocess.run(
        [sys.executable, "-c", ALONE, *words, json.dumps(TEXTS)],
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "out.npz")
    image_embed, text_embeds = student.encode_image([image]), student.encode_text(TEXTS)
    np.testing.assert_allclose(found["image"], image_embed.numpy(), atol=1e-5)
    np.testing.assert_allclose(found["text"], text_embeds.numpy(), atol=1e-5)
    logits = student.scale * (image_embed @ text_embeds.T).numpy()
    if is_siglip_vit(student):
        logits += student.bias  # SiglipModel has a place for it, CLIPModel has none
    np.testing.assert_allclose(found["logits"], logits, atol=1e-3)
    assert (BIAS_KEY in json.loads((tmp_path / "t/config.json").read_text())) == is_clip_vit(student)


def test_the_vision_tower_apart(student_folder: Path, tmp_path: Path) -> None:
    import transformers

    report = export.to_transformers(student_folder, tmp_path / "v", part="vision")
    assert report.text_max_abs is None
    student, image = towers.load(student_folder), picture(tmp_path / "p.png")
    kind = "SiglipVisionModel" if is_siglip_vit(student) else "CLIPVisionModelWithProjection"
    assert kind in (tmp_path / "v/README.md").read_text()
    model = getattr(transformers, kind).from_pretrained(tmp_path / "v").eval()
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "v", backend="pil")
    with torch.no_grad():
        out = model(**processor(images=[image], return_tensors="pt"))
    raw = out.pooler_output if is_siglip_vit(student) else out.image_embeds
    torch.testing.assert_close(
        torch.nn.functional.normalize(raw, dim=-1), student.encode_image([image]), atol=1e-5, rtol=0
    )
    # the prefix that transformers 4 and servers know
    assert all(
        name.startswith(("vision_model.", "visual_projection.")) for name in load_file(tmp_path / "v/model.safetensors")
    )
    assert not (tmp_path / "v/tokenizer.json").exists()


def test_sentence_transformers_pads_to_the_whole_context(student_folder: Path, tmp_path: Path) -> None:
    """By its own configs; tools.clients compares the embeddings."""
    export.to_transformers(student_folder, tmp_path / "t")
    export.to_transformers(student_folder, tmp_path / "v", part="vision")
    is_siglip = is_siglip_vit(towers.load(student_folder))
    names = ("modules.json", "sentence_bert_config.json")
    assert [(tmp_path / "t" / name).is_file() for name in names] == [is_siglip] * 2
    assert not any((tmp_path / "v" / name).exists() for name in names)
    if is_siglip:
        config = json.loads((tmp_path / "t/sentence_bert_config.json").read_text())
        assert config["processing_kwargs"] == {"text": {"padding": "max_length", "truncation": True}}


def test_the_card_gives_scores_where_the_pipeline_fails(student_folder: Path, tmp_path: Path) -> None:
    from transformers import pipeline

    export.to_transformers(student_folder, tmp_path / "t")
    labels, image = ["red apple", "cat"], picture(tmp_path / "p.png")
    classify = pipeline("zero-shot-image-classification", str(tmp_path / "t"), device="cpu")
    with pytest.raises(ValueError, match="max_position_embeddings"):
        classify(image, candidate_labels=labels)
    card = (tmp_path / "t/README.md").read_text()
    assert "zero-shot pipeline" in card
    first, second = (block.split("```")[0] for block in card.split("```python")[1:])
    names = {"labels": labels, "images": [image]}
    with torch.no_grad():
        exec(first.replace("FOLDER", str(tmp_path / "t")) + second, names)
    student = towers.load(student_folder)
    texts = student.encode_text([f"This is a photo of {label}." for label in labels])
    logits = student.scale * student.encode_image([image]) @ texts.T
    want = (logits + student.bias).sigmoid() if is_siglip_vit(student) else logits.softmax(-1)
    torch.testing.assert_close(names["scores"], want, atol=1e-4, rtol=0)


def test_files_that_others_look_for(student_folder: Path, tmp_path: Path) -> None:
    export.to_transformers(student_folder, tmp_path / "t")
    for part in ({}, {"part": "vision"}):
        export.to_transformers(student_folder, tmp_path / "t", **part)  # type: ignore[arg-type] # replaces its own
        assert json.loads((tmp_path / "t/preprocessor_config.json").read_text())["image_mean"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text("{}")
    with pytest.raises(export.ExportError, match="holds something else"):
        export.to_transformers(student_folder, tmp_path / "other")
    with pytest.raises(ConfigError, match="part is 'text'"):
        export.to_transformers(student_folder, tmp_path / "new", part="text")  # type: ignore[arg-type]


def test_siglip_at_another_projection_and_act(tmp_path: Path) -> None:
    folder = siglip(tmp_path, act_kwargs={}, mlp_ratio=2.0)
    assert export.to_transformers(folder, tmp_path / "t").image_max_abs <= 1e-5
    config = json.loads((tmp_path / "t/config.json").read_text())
    assert (config["text_config"]["hidden_act"], config["vision_config"]["hidden_act"]) == ("gelu", "gelu_pytorch_tanh")
    assert config["text_config"]["intermediate_size"] == 96


def test_towers_that_transformers_cannot_hold(tmp_path: Path) -> None:
    causal = siglip(tmp_path / "causal", no_causal_mask=False)
    with pytest.raises(UnsupportedError, match=r"pairs other ones.*part='vision'"):
        export.to_transformers(causal, tmp_path / "t")
    assert export.to_transformers(causal, tmp_path / "v", part="vision").image_max_abs <= 1e-5
    # registers have no place in SiglipVisionModel
    vision = {"timm_model_name": "test_vit3", "image_size": 160}
    registers = towers.load(siglip(tmp_path / "registers", vision, embed_dim=96))
    assert not is_siglip_vit(registers)
    with pytest.raises(ModelError, match="no SigLIP ViT"):
        siglip_vision_model(registers)
    with pytest.raises(UnsupportedError, match="neither"):
        export.to_transformers(tmp_path / "registers/s", tmp_path / "t", part="vision")
    assert not (tmp_path / "t").exists()


def test_graphs_of_another_student_are_refused(tmp_path: Path) -> None:
    mine = towers.save(tiny.encoder(1), tmp_path / "s")
    graphs = tiny.exported(tmp_path / "other")
    with pytest.raises(export.ExportError, match="made from another student"):
        export.to_transformers(mine, tmp_path / "t", onnx=graphs)
    with pytest.raises(export.ExportError, match="no export"):
        export.to_transformers(mine, tmp_path / "t", onnx=mine)
    export.to_transformers(tmp_path / "other/s", tmp_path / "t", onnx=graphs)
    names = {path.name for path in (tmp_path / "t/onnx").iterdir()}
    assert names == {"vision_model.onnx", "text_model.onnx"}
    (graphs / "onnx/text_model.onnx").write_bytes(b"altered")
    with pytest.raises(export.ExportError, match="text_model"):
        export.to_transformers(tmp_path / "other/s", tmp_path / "t", onnx=graphs)


# -- ONNX folders, which other programs open by the same files -----------------------------------------------------


@pytest.mark.parametrize("kind", ["clip", "siglip", "siglip_left"])
def test_onnx_folders_open_with_transformers_processors(kind: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

    left = kind == "siglip_left"
    folder = (
        towers.save(tiny.encoder(), tmp_path / "s")
        if kind == "clip"
        else siglip(tmp_path, side="left" if left else "right")
    )
    student, target, image = towers.load(folder), tmp_path / "o", picture(tmp_path / "p.png")
    export.to_onnx(folder, target, ("vision", "text", "both"), ("fp32",), measure=False)
    config = AutoConfig.from_pretrained(target)
    assert config.model_type == kind.split("_")[0]
    assert config.text_config.max_position_embeddings == student.context_length
    texts = ["  A red_apple,\n Two APPLES!", "cat", "a photo of a cat " * 9]
    tokenizer = AutoTokenizer.from_pretrained(target)
    ids = tokenizer(texts, padding=True, truncation=True, return_tensors="np")["input_ids"]
    short = tokenizer(["cat"], return_tensors="np")["input_ids"]  # not padded
    assert short.shape[1] < student.context_length
    pixels = AutoImageProcessor.from_pretrained(target, backend="pil")(images=[image], return_tensors="np")[
        "pixel_values"
    ]
    image_embeds, want = student.encode_image([image]), student.encode_text(texts)
    session = onnxruntime.InferenceSession(str(target / "onnx/text_model.onnx"))
    for given, rows in ((ids, want), (short, want[1:2])):
        (found,) = session.run(None, {"input_ids": given.astype(np.int64)})
        np.testing.assert_allclose(torch.nn.functional.normalize(torch.from_numpy(found), dim=-1), rows, atol=1e-5)
    whole = onnxruntime.InferenceSession(str(target / "onnx/model.onnx"))
    inputs = {"pixel_values": pixels, "input_ids": ids.astype(np.int64)}
    per_image, per_text = whole.run(["logits_per_image", "logits_per_text"], inputs)
    bias = 0.0 if kind == "clip" else student.bias  # as CLIPModel and SiglipModel
    np.testing.assert_allclose(per_image, (student.scale * image_embeds @ want.T + bias).numpy(), atol=1e-3)
    np.testing.assert_array_equal(per_text, per_image.T)
    assert export.OnnxEncoder(target, parts=("both",)).graph_bias == pytest.approx(bias)
    assert len(export.verify_folder(target)) == 3


@pytest.mark.parametrize(("part", "kind"), [("vision", "clip_vision_model"), ("text", "clip_text_model")])
def test_configs_of_one_tower(part: Any, kind: str, tmp_path: Path) -> None:
    folder = towers.save(tiny.encoder(), tmp_path / "s")
    export.to_onnx(folder, tmp_path / "o", (part,), ("fp32",), measure=False)
    assert json.loads((tmp_path / "o/config.json").read_text())["model_type"] == kind
    names = [(tmp_path / "o" / name).is_file() for name in ("preprocessor_config.json", "tokenizer_config.json")]
    assert names == [part == "vision", part == "text"]
