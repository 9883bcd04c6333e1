# SPDX-License-Identifier: Apache-2.0
"""Model folders whose settings are in bounds one by one, and whose model cannot embed, answer, or do it in time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import ARCHITECTURE, encoder

from aced_sdk import towers
from aced_sdk.config import Student
from aced_sdk.towers.folder import CONFIG, WEIGHTS
from aced_sdk.towers.trial import check_embeds
from tests.security.folders import BERT, change, text_tower, with_text, write
from tests.security.sandbox import run
from tests.security.vlm_parts import MANIFEST, edit, foreign, open_all, parts, refused

__all__ = ["parts"]
Parts = dict[str, Path]
Weights = dict[str, torch.Tensor]
RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8}


def load(folder: Path) -> str:
    return str(towers.load(folder).embedding_dim)


def rewrite(path: Path, change: Callable[[Weights], Weights]) -> None:
    weights = load_file(path)
    save_file(weights | change(weights), path, {"format": "pt"})


def fits(folder: Path, architecture: dict[str, Any]) -> Path:
    """A folder of somebody else whose weights fit its settings, whatever these do."""
    folder.mkdir(exist_ok=True)
    made = towers.build(Student(architecture=architecture), 0)
    weights = {name: tensor.clone().contiguous() for name, tensor in made.model.state_dict().items()}
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    model_cfg = made.model_cfg
    for key in {"hf_model_name", "hf_tokenizer_name"} & model_cfg["text_cfg"].keys():
        model_cfg["text_cfg"][key] = "./t"
    write(folder / CONFIG, {"model_cfg": model_cfg})
    return folder


# -- dual encoders ----------------------------------------------------------------------------------------------------


def test_weights_are_finite_in_the_models_own_type(tmp_path: Path) -> None:
    folder = fits(tmp_path / "s", ARCHITECTURE)
    rewrite(folder / WEIGHTS, lambda weights: {"visual.proj": weights["visual.proj"].double() * 0 + 1e300})
    assert run(load, folder).refused("visual.proj", "not finite")


@pytest.mark.parametrize(
    ("tower", "settings"),
    [
        ("vision_cfg", {"output_tokens": True}),
        ("vision_cfg", {"pool_type": "none"}),
        ("vision_cfg", {"attentional_pool": "parallel", "attn_pooler_queries": 4}),
        ("vision_cfg", {"timm_model_name": "test_resnet", "timm_pool": "", "timm_proj": None, "image_size": 32}),
        ("text_cfg", {"output_tokens": True}),
        ("text_cfg", {"pool_type": "none"}),
        ("text_cfg", {"proj_type": "none", "width": 32}),
        ("text_cfg", {"proj_type": "none", "width": 1, "heads": 1}),
    ],
    ids=str,
)
def test_towers_give_one_embedding_of_the_models_width(tmp_path: Path, tower: str, settings: dict[str, Any]) -> None:
    architecture: dict[str, Any] = ARCHITECTURE | {"custom_text": True}
    timm = "timm_model_name" in settings
    architecture[tower] = settings if timm else architecture[tower] | settings
    assert run(load, fits(tmp_path / "s", architecture)).refused(str(tmp_path), "cannot embed")


@pytest.mark.parametrize(
    "settings",
    [{"chunk_size_feed_forward": 7}, {"return_dict": False}, {"type_vocab_size": 0}, {"dtype": "float16"}],
    ids=str,
)
def test_settings_of_a_text_tower_work_together(tmp_path: Path, settings: dict[str, Any]) -> None:
    architecture = with_text(tmp_path / "s/t")
    if "type_vocab_size" in settings:  # decides the shapes of the weights
        text_tower(tmp_path / "s/t", **settings)
    folder = fits(tmp_path / "s", architecture)
    change(folder / "t/config.json", **settings)
    assert run(load, folder).refused(
        "s", next(iter(settings)) if "chunk_size_feed_forward" in settings else "cannot embed"
    )


def test_positions_of_a_text_tower_reach_to_the_last_token(tmp_path: Path) -> None:
    """RoBERTa counts them from its padding token on."""
    architecture = with_text(tmp_path / "s/t")
    text_tower(tmp_path / "s/t", **BERT | {"model_type": "roberta", "max_position_embeddings": 9, "pad_token_id": 2})
    assert run(load, fits(tmp_path / "s", architecture)).refused("cannot embed")


def test_a_variance_below_zero_is_found(tmp_path: Path) -> None:
    folder = fits(tmp_path / "s", ARCHITECTURE | {"vision_cfg": RESNET})
    rewrite(folder / WEIGHTS, lambda weights: {name: -weights[name] for name in weights if "running_var" in name})
    assert run(load, folder).refused("image embeddings are not finite")


def test_a_loaded_model_is_as_it_was_saved(tmp_path: Path) -> None:
    """Embedding something on load changes no weight, no random number and no embedding."""
    made = encoder(vision_cfg=RESNET)
    folder = towers.save(made, tmp_path / "s")
    loaded = towers.load(folder)
    before = torch.get_rng_state()
    check_embeds(loaded, folder)
    assert torch.equal(torch.get_rng_state(), before)
    assert not loaded.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in loaded.model.parameters())
    own = made.model.state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in loaded.model.state_dict().items())
    picture = Image.linear_gradient("L")
    assert torch.equal(loaded.encode_image(picture), made.encode_image(picture))


def embed_thin(resize: str) -> None:
    sizes = ARCHITECTURE["vision_cfg"] | {"image_size": 2_048, "patch_size": 512}
    student = Student(architecture=ARCHITECTURE | {"vision_cfg": sizes}, resize=resize)
    towers.build(student, 0).encode_image(Image.new("L", (200, 1)))


def test_a_thin_picture_is_not_blown_up() -> None:
    """Of 200 x 1 pixels, 409,600 x 2,048 would be made before the crop."""
    outcome = run(embed_thin, "shortest")
    assert outcome.refused("images[0]", "too long and thin")
    assert outcome.mib < 200
    assert run(embed_thin, "squash").kind == "returned"


def test_large_pictures_are_embedded_one_by_one() -> None:
    """Eight pictures of 2,048 pixels took 4 GB in a ResNet."""
    sizes = {224: 8, 512: 8, 1_024: 2, 2_048: 1, 16: 256}
    for side, count in sizes.items():
        made = encoder()
        made.preprocess_config = made.preprocess_config.replace(size=(side, side))
        assert made._image_batch() == count


def test_texts_have_a_bound() -> None:
    """Nested escapes take ftfy time that grows with the square of a text's length."""
    nested = "&#65286;" + "#65286;" * 9_000
    for call in (tokenize, embed_text):
        assert run(call, ["a boat", nested], seconds=10).refused("texts[1] has 63008 characters")


def tokenize(texts: list[str]) -> None:
    encoder().tokenize(texts)


def embed_text(texts: list[str]) -> None:
    encoder().encode_text(texts)


ODD: list[tuple[str, Any]] = [
    ("_attn_implementation", "flex_attention"),
    ("attn_implementation", "flash_attention_2"),
    ("quantization_config", {"quant_method": "bitnet"}),
    ("chunk_size_feed_forward", 3),
]


@pytest.mark.parametrize(("name", "value"), ODD)
def test_a_text_tower_asks_for_no_kernels_and_no_other_weights(tmp_path: Path, name: str, value: Any) -> None:
    folder = fits(tmp_path / "s", with_text(tmp_path / "s/t"))
    change(folder / "t/config.json", **{name: value})
    assert run(load, folder).refused("config.json", name)


def test_a_text_tower_may_name_plain_attention(tmp_path: Path) -> None:
    folder = fits(tmp_path / "s", with_text(tmp_path / "s/t"))
    change(folder / "t/config.json", _attn_implementation="eager", chunk_size_feed_forward=0)
    assert run(load, folder).returned() == "16"


# -- vision-language models -------------------------------------------------------------------------------------------


def test_a_folder_asks_for_no_kernels_and_no_other_weights(parts: Parts, tmp_path: Path) -> None:
    """flex_attention compiles for minutes, and so do some kinds of quantised weights."""
    folders = []
    for number, (name, value) in enumerate([*ODD, ("_attn_implementation", {"text_config": "flex_attention"})]):
        for kind, part in (("merged", ""), ("merged", "text_config."), ("language", ""), ("vision", "")):
            folders.append((kind, foreign(parts[kind], tmp_path / f"{number}-{kind}-{part}")))
            edit(folders[-1][1] / "config.json", part + name, value)
    refused(folders, parts, "config.json")


def test_every_tensor_of_a_tower_is_read(parts: Parts, tmp_path: Path) -> None:
    """A config that leaves out biases or norms would give other answers without an error."""
    left_out = {"merged": "mlp.gate_proj.bias", "language": "self_attn.q_norm.weight", "vision": "mlp.extra.bias"}
    folders = []
    for kind, name in left_out.items():
        folders.append((kind, foreign(parts[kind], tmp_path / kind)))
        whole = "model.language_model" if kind == "merged" else "model" if kind == "language" else "encoder"
        prefix = {name.partition(".layers.")[0] for name in load_file(folders[-1][1] / "model.safetensors")}
        prefix = {one for one in prefix if whole in one} or {whole}
        extra = {f"{min(prefix)}.layers.0.{name}": torch.ones(4)}
        rewrite(folders[-1][1] / "model.safetensors", lambda _, extra=extra: extra)
    refused(folders, parts, "its config leaves out a tensor")


def test_tensors_that_are_computed_today_may_be_left_over(parts: Parts, tmp_path: Path) -> None:
    folder = foreign(parts["language"], tmp_path / "language")
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), "classifier.weight": torch.ones(4)}
    rewrite(folder / "model.safetensors", lambda _: extra)
    assert run(open_all, [("language", folder)], parts).returned() == [""]


def test_generation_settings_together_leave_a_token(parts: Parts, tmp_path: Path) -> None:
    count = 1000
    folders = []
    for number, settings in enumerate(
        [
            {"bad_words_ids": [[n] for n in range(count)]},
            {"suppress_tokens": list(range(0, count, 2)), "begin_suppress_tokens": list(range(1, count, 2))},
        ]
    ):
        folders.append(("merged", foreign(parts["merged"], tmp_path / str(number))))
        for name, value in settings.items():
            edit(folders[-1][1] / "generation_config.json", name, value)
    refused(folders, parts, "suppress every token")


def test_answers_come_from_finite_values(parts: Parts, tmp_path: Path) -> None:
    """Weights that are finite can still overflow."""
    folder = foreign(parts["merged"], tmp_path / "merged")
    rewrite(
        folder / "model.safetensors",
        lambda weights: {name: weights[name] * 0 + 3e38 for name in weights if "language" in name and "proj" in name},
    )
    refused([("merged", folder)], parts, "computes values that are not finite")


def test_a_manifest_is_an_object(parts: Parts, tmp_path: Path) -> None:
    folder = foreign(parts["merged"], tmp_path / "merged")
    write(folder / MANIFEST, [1])
    refused([("merged", folder)], parts, f"{MANIFEST} holds no JSON object")
