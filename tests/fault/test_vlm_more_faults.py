# SPDX-License-Identifier: Apache-2.0
"""Questions that do not fit, parts that do not belong together, folders that are not whole: refused, never silent."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, PreTrainedTokenizerFast

import vlm
from aced_sdk import towers
from aced_sdk.config import Student
from aced_sdk.errors import ConfigError, DataError, ModelError
from aced_sdk.processing.plain import to_rgb
from vlm.data.pictures import open_picture, pixels_of

sys.path.insert(0, str(Path(__file__).parents[1] / "contract"))
from test_vlm import config, language, samples, student

QUESTION = "what is it ?"
PICTURE = samples(1)[0].images[0]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("parts")
    return student(folder / "student"), language(folder / "language")


@pytest.fixture(scope="module")
def model(folders: tuple[Path, Path]) -> Any:
    return vlm.build(vision=folders[0], language=folders[1])


@pytest.fixture(scope="module")
def saved(folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tuned model, merged and apart."""
    folder = tmp_path_factory.mktemp("saved")
    llava, processor = vlm.build(*folders)
    result = vlm.tune(llava, processor, samples(1), config(adapt=4), directory=folder / "run")
    return (
        vlm.save(result.model, processor, folder / "merged"),
        vlm.save(result.model, processor, folder / "apart", merge=False),
    )


# -- questions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "questions", "options", "kind", "words"),
    [
        ([PICTURE], ["what is " * 200], {}, DataError, r"414 tokens.*24 new ones.*the 128 .*what is what is"),
        ([[PICTURE] * 12], [QUESTION], {}, DataError, r"with its pictures and 24 new ones.*what is it"),
        ([PICTURE], ["<image> is <image> red ?"], {}, DataError, "'is red .' has 2 <image> markers .* and 1 pictures"),
        ([()], ["is <image> red ?"], {}, DataError, "'is red .' has 1 <image> markers in its words and 0 pictures"),
        ("picture.png", ["a"] * 11, {}, DataError, "come as lists"),
        (PICTURE, [QUESTION], {}, DataError, "come as lists"),
        ([PICTURE], "a", {}, DataError, "come as lists"),
        ([b"png"], [QUESTION], {}, DataError, "the pictures of a question are a bytes"),
        ([PICTURE], [QUESTION], {"batch_size": 0}, ConfigError, r"batch_size is 0.*field: batch_size"),
        ([PICTURE], [QUESTION], {"batch_size": -1}, ConfigError, "batch_size is -1"),
        ([PICTURE], [QUESTION], {"max_new_tokens": 0}, ConfigError, "max_new_tokens is 0"),
    ],
)
def test_questions_that_cannot_be_asked(
    model: Any, images: Any, questions: Any, options: Any, kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        vlm.answer(*model, images, questions, **options)


def test_streams_and_captions_refuse_the_same_at_once(model: Any) -> None:
    with pytest.raises(DataError, match="414 tokens"):
        vlm.stream_answer(*model, PICTURE, "what is " * 200)
    with pytest.raises(ConfigError, match="max_new_tokens is 0"):
        vlm.stream_answer(*model, PICTURE, QUESTION, max_new_tokens=0)
    with pytest.raises(DataError, match="come as lists"):
        vlm.caption(*model, PICTURE)
    assert vlm.answer(*model, [], []) == []
    for bad in ({"limit": 0}, {"limit": -1}, {"max_new_tokens": 0}, {"batch_size": 0}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            vlm.evaluate(*model, samples(1), **bad)


def test_questions_with_different_numbers_of_pictures_are_answered_alike_alone_and_together(model: Any) -> None:
    pictures = [one.images[0] for one in samples()[::2]]
    asked = [pictures[:5], (), pictures[0], pictures[:2]]
    together = vlm.answer(*model, asked, [QUESTION] * 4, 4)
    assert together == [vlm.answer(*model, [one], [QUESTION], 4)[0] for one in asked]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_of_half_precision_answer_and_are_scored(folders: tuple[Path, Path], dtype: torch.dtype) -> None:
    llava, processor = vlm.build(*folders)
    llava.to(dtype)
    assert (
        "".join(vlm.stream_answer(llava, processor, PICTURE, QUESTION, 4))
        == (vlm.answer(llava, processor, [PICTURE], [QUESTION], 4)[0])
    )
    assert vlm.evaluate(llava, processor, samples(1), max_new_tokens=2).total.count == 6


# -- parts of different models ----------------------------------------------------------------------------------------


def test_the_processor_of_another_model(model: Any, folders: tuple[Path, Path], tmp_path: Path) -> None:
    llava, _ = model
    _, words = vlm.build(folders[0], language(tmp_path / "words", chatml=False))
    vision = {"image_size": 48, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16}
    text = {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    encoder = towers.build(Student(architecture={"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}), seed=0)
    _, eyes = vlm.build(encoder, folders[1])
    plan = vlm.TuneConfig(stages=[vlm.Align(steps=1)])
    for processor, cause in ((words, "as token 23, the model reads them at 24"), (eyes, r"48\*48")):
        actions: list[Callable[[], Any]] = [
            lambda one=processor: vlm.answer(llava, one, [PICTURE], [QUESTION]),
            lambda one=processor: vlm.evaluate(llava, one, samples(1)),
            lambda one=processor: vlm.tune(llava, one, samples(1), plan, directory=tmp_path / f"run{id(one)}"),
        ]
        for action in actions:
            with pytest.raises(ModelError, match=f"{cause}.*field: processor"):
                action()
    for nothing in (words, None, words.tokenizer):
        with pytest.raises(ModelError, match="writes pictures as token"):
            vlm.save(llava, nothing, tmp_path / "mixed")
    assert not (tmp_path / "mixed").exists()


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}{% endfor %}",
        "{% for m in messages %}{{ m['role'] }}{% endfor %}",
        "{% for m in messages %}",
    ],
)
def test_chat_templates_for_text_alone(folders: tuple[Path, Path], tmp_path: Path, template: str) -> None:
    llava, processor = vlm.build(*folders)
    processor.chat_template = template
    with pytest.raises(ModelError, match="field: processor"):
        vlm.answer(llava, processor, [PICTURE], [QUESTION])
    with pytest.raises(DataError, match=r"'red0'.*generation.*field: processor"):
        vlm.tune(llava, processor, samples(1), config(), directory=tmp_path)


@pytest.mark.parametrize("unknown", ["<unk>", None])
def test_a_tokenizer_that_cannot_end_an_answer(folders: tuple[Path, Path], tmp_path: Path, unknown: str | None) -> None:
    folder = language(tmp_path / "language", chatml=False)
    raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").unlink()
    PreTrainedTokenizerFast(tokenizer_object=raw, unk_token=unknown).save_pretrained(folder)
    with pytest.raises(ModelError, match=r"no token that ends a text.*field: language"):
        vlm.build(folders[0], folder)


# -- folders ----------------------------------------------------------------------------------------------------------


def without(source: Path, target: Path, file: str, part: str) -> Path:
    """A copy in which one file has lost the tensors whose names hold `part`."""
    shutil.copytree(source, target)
    (target / "aced_vlm.json").unlink(missing_ok=True)  # as a folder that another program wrote
    kept = {name: tensor for name, tensor in load_file(target / file).items() if part not in name}
    assert len(kept) < len(load_file(target / file))
    save_file(kept, target / file, metadata={"format": "pt"})
    return target


@pytest.mark.parametrize(
    ("apart", "file", "part"),
    [
        (0, "model.safetensors", "vision_tower"),
        (0, "model.safetensors", "multi_modal_projector"),
        (0, "model.safetensors", "layers.1."),
        (1, "base/model.safetensors", "vision_tower"),
        (1, "adapter/adapter_model.safetensors", "multi_modal_projector"),
        (1, "adapter/adapter_model.safetensors", "layers.0."),
    ],
)
def test_nothing_that_a_folder_lacks_is_made_up(
    saved: tuple[Path, Path], tmp_path: Path, apart: int, file: str, part: str
) -> None:
    vlm.load(saved[apart])
    with pytest.raises(ModelError, match=part.rstrip(".") + r".*field: directory"):
        vlm.load(without(saved[apart], tmp_path / "torn", file, part))


@pytest.mark.parametrize(
    ("apart", "file"),
    [
        (0, "model.safetensors"),
        (0, "config.json"),
        (0, "tokenizer.json"),
        (0, "preprocessor_config.json"),
        (1, "base/model.safetensors"),
        (1, "adapter/adapter_model.safetensors"),
        (1, "adapter/adapter_config.json"),
    ],
)
def test_a_torn_or_missing_file(saved: tuple[Path, Path], tmp_path: Path, apart: int, file: str) -> None:
    shutil.copytree(saved[apart], tmp_path / "torn")
    damaged = tmp_path / "torn" / file
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(ModelError, match=r"(?s)holds no model.*field: directory"):
        vlm.load(tmp_path / "torn")
    damaged.unlink()
    with pytest.raises(ModelError, match=r"(?s)holds no model.*field: directory"):
        vlm.load(tmp_path / "torn")


def test_folders_of_other_models_are_not_loaded(folders: tuple[Path, Path], tmp_path: Path) -> None:
    for folder in (*folders, tmp_path / "none"):
        with pytest.raises(ModelError, match="holds no model"):
            vlm.load(folder)


def test_saving_replaces_models_alone(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    monkeypatch.chdir(home)
    for target in (home, tmp_path / "file", "."):
        with pytest.raises(ModelError, match=r"something else than a model.*field: directory"):
            vlm.save(*model, target)
    assert (home / "thesis.txt").read_text() == (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    for _ in range(2):
        vlm.load(vlm.save(*model, tmp_path / "empty"))


def test_encoders_and_language_models_that_are_not_whole(folders: tuple[Path, Path], tmp_path: Path) -> None:
    half = without(folders[1], tmp_path / "half", "model.safetensors", "layers.1.")
    with pytest.raises(ModelError, match=r"lacks 9 of its tensors, model\.layers\.1\..*field: language"):
        vlm.build(folders[0], half)
    (half / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ModelError, match=r"cannot be loaded.*field: language"):
        vlm.build(folders[0], half)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=16, patch_size=8)).save_pretrained(tmp_path / "clip")
    CLIPImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "clip")
    (tmp_path / "clip" / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ModelError, match=r"cannot be loaded.*field: vision"):
        vlm.build(tmp_path / "clip", folders[1])


# -- pictures ---------------------------------------------------------------------------------------------------------


def odd_pictures(folder: Path) -> dict[str, Path]:
    noise = Image.effect_noise((40, 30), 90)
    turned = noise.convert("RGB").getexif()
    turned[0x0112] = 6  # orientation: a quarter turn
    written: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "one.png": (Image.new("RGB", (1, 1), (9, 90, 200)), {}),
        "wide.png": (Image.effect_noise((10000, 2), 90).convert("RGB"), {}),
        "tall.png": (Image.effect_noise((2, 10000), 90), {}),
        "cmyk.jpg": (noise.convert("CMYK"), {}),
        "bits.png": (noise.convert("1"), {}),
        "turned.jpg": (noise.convert("RGB"), {"exif": turned}),
        "clear.png": (Image.new("RGB", (20, 20), (9, 9, 9)), {"transparency": (9, 9, 9)}),
        "grey.png": (Image.new("L", (20, 20), 9), {"transparency": 9}),
        "moving.gif": (noise.convert("P"), {"save_all": True, "append_images": [Image.new("P", (40, 30))]}),
    }
    for name, (image, options) in written.items():
        image.save(folder / name, **options)
    return {name: folder / name for name in written}


def test_the_tower_sees_odd_pictures_as_the_student_did(model: Any, folders: tuple[Path, Path], tmp_path: Path) -> None:
    llava, processor = model
    encoder = towers.load(str(folders[0]))
    for name, path in odd_pictures(tmp_path).items():
        pixels = processor.image_processor(images=[open_picture(path)], return_tensors="pt")["pixel_values"][0]
        outside = encoder.preprocess(Image.open(path))
        assert (pixels - outside).abs().max() <= 4 * 2 / 255, name  # a few levels: as test_vlm.py says
        assert len(vlm.answer(llava, processor, [path], [QUESTION], 2)) == 1


def test_sixteen_bits_keep_their_range_and_more_are_counted_as_bad(
    model: Any, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    pixels = np.linspace(0, 65_535, 24 * 24, dtype=np.uint16).reshape(24, 24)
    entries = []
    for number, name in enumerate(("16.png", "16.tiff", "i.tiff", "f.tiff")):
        path = tmp_path / name
        if number < 2:
            Image.fromarray(pixels).save(path)
            assert np.array_equal(np.asarray(open_picture(path)), np.stack([pixels >> 8] * 3, axis=-1)), name
            outside = towers.load(str(folders[0])).preprocess(to_rgb(Image.open(path)))
            inside = pixels_of(model[1].image_processor, [path])[0]
            assert (inside - outside).abs().max() <= 4 * 2 / 255, name  # a few levels: as test_vlm.py says
            assert len(vlm.answer(*model, [path], [QUESTION], 2)) == 1
        else:
            Image.new(name[0].upper(), (8, 8), 40_000).save(path)
            with pytest.raises(DataError, match=r"samples of 32 bits: scale them to 8 bits"):
                open_picture(path)
        turns = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "grey"}]
        entries.append({"id": str(number), "image": path.name, "conversations": turns})
    (tmp_path / "data.json").write_text(json.dumps(entries))
    read = vlm.load_llava(tmp_path / "data.json", tmp_path, max_unusable_fraction=0.5)
    assert (len(read), read.reasons) == (2, {"samples of 32 bits": 2})
    with pytest.raises(DataError, match=r"2 of 4 conversations cannot be used \(2 samples of 32 bits\).*'2'"):
        vlm.load_llava(tmp_path / "data.json", tmp_path)
