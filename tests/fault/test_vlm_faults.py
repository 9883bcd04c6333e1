# SPDX-License-Identifier: Apache-2.0
"""What goes wrong around a vision-language model says what it is and what to do."""

from __future__ import annotations

import json
import sys
from collections.abc import Container
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    ConvNextConfig,
    PreTrainedTokenizerFast,
    Siglip2VisionConfig,
    Siglip2VisionModel,
)

import vlm
from aced_sdk import towers
from aced_sdk.config import Engine, Student
from aced_sdk.errors import (
    ConfigError,
    DataError,
    EngineError,
    EvaluationError,
    MissingPackageError,
    ModelError,
    UnsupportedError,
)
from vlm.model.adapters import check_saved, snapshot
from vlm.model.loss import AnswerLoss

sys.path.insert(0, str(Path(__file__).parents[1] / "contract"))
from test_vlm import config, language, samples, student


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("parts")
    return student(folder / "student"), language(folder / "language")


@pytest.fixture
def model(folders: tuple[Path, Path]) -> Any:
    return vlm.build(vision=folders[0], language=folders[1])


def encoder_of(vision: dict[str, Any]) -> towers.DualEncoder:
    text = {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    return towers.build(Student(architecture={"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}), seed=0)


ROADS = r"CLIP ViT, a SigLIP ViT.*DINOv2 through LlavaFor.*FastViT.*through FastVlmFor.*field: vision"


@pytest.mark.parametrize(
    ("vision", "words"),
    [
        ({"layers": [1, 1, 1, 1], "width": 16, "head_width": 16, "image_size": 32}, "a tower of open_clip's own"),
        ({"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "token", "image_size": 224}, "vit_tiny_patch16_224"),
    ],
)
def test_a_tower_that_no_model_holds_names_the_roads(
    folders: tuple[Path, Path], vision: dict[str, Any], words: str
) -> None:
    with pytest.raises(UnsupportedError, match=f"{words}.*{ROADS}"):
        vlm.build(vision=encoder_of(vision), language=folders[1])


def test_a_convolutional_tower_counts_whole_strides(folders: tuple[Path, Path]) -> None:
    vision = {"timm_model_name": "resnet10t", "timm_pool": "avg", "timm_proj": "linear", "image_size": (64, 80)}
    with pytest.raises(ModelError, match=r"2 x 3 tokens of 64 x 80.*multiples of its stride"):
        vlm.build(vision=encoder_of(vision), language=folders[1])
    encoder = encoder_of(vision | {"image_size": 64})
    with pytest.raises(UnsupportedError, match=r"no pixel shuffle for a convolutional tower.*field: projector\.kind"):
        vlm.build(encoder, folders[1], projector=vlm.Projector(kind="pixel_shuffle"))
    with pytest.raises(ModelError, match="its last map alone"):
        vlm.build(encoder, folders[1], feature_layer=-2)


TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
SQUARE = {"height": 16, "width": 16}


def clip_folder(folder: Path, **processor: Any) -> Path:
    CLIPVisionModel(CLIPVisionConfig(**TINY, image_size=16, patch_size=8)).save_pretrained(folder)
    CLIPImageProcessor(**({"size": SQUARE, "crop_size": SQUARE} | processor)).save_pretrained(folder)
    return folder


def test_encoders_of_transformers_that_cannot_be_held(folders: tuple[Path, Path], tmp_path: Path) -> None:
    naflex = Siglip2VisionModel(Siglip2VisionConfig(**TINY, num_patches=16, patch_size=8))
    naflex.save_pretrained(tmp_path / "naflex")
    with pytest.raises(UnsupportedError, match=r"NaFlex.*SigLIP 2 of a fixed resolution"):
        vlm.build(tmp_path / "naflex", folders[1])
    ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1]).save_pretrained(tmp_path / "convnext")
    with pytest.raises(UnsupportedError, match=f"'convnext'.*{ROADS}"):
        vlm.build(tmp_path / "convnext", folders[1])
    with pytest.raises(ModelError, match=r"(?s)nobody/nothing' cannot be loaded.*field: vision"):
        vlm.build("nobody/nothing", folders[1])
    with pytest.raises(ModelError, match="is no model folder"):
        vlm.build(tmp_path, folders[1])


def test_encoder_folders_that_are_not_whole(folders: tuple[Path, Path], tmp_path: Path) -> None:
    bare = clip_folder(tmp_path / "bare")
    (bare / "preprocessor_config.json").unlink()
    with pytest.raises(ModelError, match=r"cannot be loaded.*preprocessor_config\.json"):
        vlm.build(bare, folders[1])
    short = clip_folder(tmp_path / "short")
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.raises(ModelError, match=r"lacks 16 of the tower's tensors, encoder\.layers\.1"):
        vlm.build(short, folders[1])


@pytest.mark.parametrize(
    ("processor", "kind", "words"),
    [
        (
            {"size": {"height": 24, "width": 24}, "do_center_crop": False},
            ModelError,
            r"not take the pictures of 24 x 24",
        ),
        ({"size": {"shortest_edge": 16}, "do_center_crop": False}, UnsupportedError, "pictures different shapes"),
    ],
)
def test_pictures_that_do_not_fit_the_tower(
    folders: tuple[Path, Path], tmp_path: Path, processor: dict[str, Any], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=rf"{words}.*preprocessor_config\.json.*field: vision"):
        vlm.build(clip_folder(tmp_path / "clip", **processor), folders[1])


def test_a_grid_that_does_not_fold(folders: tuple[Path, Path]) -> None:
    with pytest.raises(UnsupportedError, match=r"grid of 3 x 3 patches cannot be folded 2 x 2.*projector\.factor"):
        vlm.build(*folders, projector=vlm.Projector(kind="pixel_shuffle", factor=2))


# -- language models --------------------------------------------------------------------------------------------------


def test_a_language_model_that_llava_would_change_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"a 'granite', and LLaVA has no place for what it does to its logits"):
        vlm.build(folders[0], language(tmp_path / "granite", family="granite", logits_scaling=4.0))
    with pytest.raises(UnsupportedError, match=r"a 'phi', and LLaVA has no place for its body or its head"):
        vlm.build(folders[0], language(tmp_path / "phi", family="phi", tie_word_embeddings=False))
    vlm.save(*vlm.build(*folders), tmp_path / "vlm")
    with pytest.raises((ModelError, UnsupportedError), match="field: language"):
        vlm.build(folders[0], tmp_path / "vlm")


def test_a_language_model_without_the_layers_that_adapters_go_to(folders: tuple[Path, Path], tmp_path: Path) -> None:
    llava, processor = vlm.build(folders[0], language(tmp_path / "gpt2", family="phi3"))
    plan = vlm.TuneConfig(stages=[vlm.Adapt(steps=1, lora=vlm.Lora(layers=("q", "v")))])
    with pytest.raises(UnsupportedError, match=r"a 'phi3', has no layers of the names q_proj, v_proj.*lora=None"):
        vlm.tune(llava, processor, samples(), plan, directory=tmp_path / "run")


def test_a_tokenizer_without_a_free_image_token(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PreTrainedTokenizerFast, "add_tokens", lambda *_, **__: 0)
    with pytest.raises(ModelError, match=r"no free token for pictures.*'<image>'.*field: language"):
        vlm.build(*folders)


def test_qlora_without_its_package(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    plan = vlm.TuneConfig(stages=[vlm.Adapt(steps=1, lora=vlm.Lora(qlora=True))])
    with pytest.raises(MissingPackageError, match=r"QLoRA needs bitsandbytes.*field: lora\.qlora"):
        vlm.tune(*model, samples(), plan, directory=tmp_path)


@pytest.mark.parametrize("files", [(), ("one.gguf", "two.gguf"), ("notes.txt",)])
def test_a_folder_that_is_no_language_model(folders: tuple[Path, Path], tmp_path: Path, files: tuple[str, ...]) -> None:
    for name in files:
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="GGUF files"):
        vlm.build(folders[0], tmp_path)


def test_a_torn_gguf_file(folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACED_HOME", str(tmp_path / "home"))
    (tmp_path / "torn.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    with pytest.raises(ModelError, match=r"cannot read torn\.gguf"):
        vlm.build(folders[0], tmp_path / "torn.gguf")
    assert not list((tmp_path / "home").rglob("aced_language.json"))


def test_a_layer_that_is_not_there(folders: tuple[Path, Path]) -> None:
    with pytest.raises(ModelError, match="2 layers, and none is number -7"):
        vlm.build(*folders, feature_layer=-7)


def test_unreadable_pictures_are_counted_up_to_the_bound(tmp_path: Path) -> None:
    entries = []
    for number in range(10):
        path = tmp_path / f"{number}.png"
        Image.effect_noise((60, 60), 50).save(path)
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "noise"}]
        entries.append({"id": str(number), "image": path.name, "conversations": turns})
    whole = (tmp_path / "3.png").read_bytes()
    (tmp_path / "3.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "data.json").write_text(json.dumps(entries))
    read = vlm.load_llava(tmp_path / "data.json", tmp_path, max_unusable_fraction=0.1)
    assert (len(read), len(read.skipped)) == (9, 1)
    assert "conversation '3'" in read.skipped[0]
    (tmp_path / "4.png").unlink()
    with pytest.raises(DataError, match=r"2 of 10 conversations cannot be used.*conversation '3'"):
        vlm.load_llava(tmp_path / "data.json", tmp_path, max_unusable_fraction=0.1)


def test_a_conversation_longer_than_the_model_reads(model: Any, tmp_path: Path) -> None:
    long = vlm.Sample("long one", (("what is it ? " * 60, "red"),), samples()[0].images)
    with pytest.raises(DataError, match=r"'long one' has \d+ tokens, the language model reads 128"):
        vlm.tune(*model, [long], config(), directory=tmp_path)


def test_a_conversation_longer_than_a_window_of_attention(folders: tuple[Path, Path], tmp_path: Path) -> None:
    lm = language(tmp_path / "lm", family="gemma3_text", head_dim=16, sliding_window=32)
    long = vlm.Sample("long one", (("what is it ? " * 8, "red"),), samples()[0].images)
    with pytest.raises(DataError, match=r"'long one' has \d+ tokens, the language model reads 32"):
        vlm.tune(*vlm.build(folders[0], lm), [long], config(), directory=tmp_path / "run")


def test_conversations_that_teach_nothing_are_named(model: Any, tmp_path: Path) -> None:
    image = samples()[0].images
    for bad, words in (
        (vlm.Sample("bad", (("what is it ?", "  "),), image), "nothing can be learned from conversation 'bad'.*empty"),
        (vlm.Sample("bad", (), image), "nothing can be learned from conversation 'bad'.*empty answer, or none"),
        (vlm.Sample("bad", (("<image> what is it ?", "red"),)), "'bad' has 1 <image> markers in its words and 0 pict"),
        (vlm.Sample("bad", (("what is it ?", "red <image>"),)), "'bad' has an <image> marker in its words"),
    ):
        with pytest.raises(DataError, match=words):
            vlm.tune(*model, [*samples(), bad], config(), directory=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (
            "{%- for m in messages -%}{%- for p in m['content'] -%}"
            "{{- '<image>' if p['type'] == 'image' else p['text'] -}}{%- endfor -%}{%- endfor -%}",
            "template marks none of the assistant's words",
        ),
        (
            "{%- for m in messages -%}{%- generation -%}{{- m['content'][-1]['text'] -}}{%- endgeneration -%}"
            "{%- endfor -%}",
            "has 1 pictures, and the processor's chat template writes 0",
        ),
        ("{{ raise_exception('no roles') }}", "cannot be written by the processor's chat template: no roles"),
    ],
)
def test_chat_templates_that_cannot_be_learned_from(model: Any, tmp_path: Path, template: str, words: str) -> None:
    llava, processor = model
    processor.chat_template = template
    with pytest.raises(DataError, match=rf"'red0'.*{words}.*generation.*field: processor"):
        vlm.tune(llava, processor, samples(), config(), directory=tmp_path)


def test_a_config_that_miscounts_its_pictures_tokens(model: Any, tmp_path: Path) -> None:
    llava, processor = model
    llava.config.image_seq_length = 4
    with pytest.raises(ModelError, match=r"makes 9 tokens of a picture, and the model's config counts 4"):
        vlm.tune(llava, processor, samples(), config(), directory=tmp_path)


def test_another_config_or_other_data_do_not_go_on(model: Any, folders: tuple[Path, Path], tmp_path: Path) -> None:
    vlm.tune(*model, samples(), vlm.TuneConfig(stages=[vlm.Align(steps=1)]), directory=tmp_path)
    other = vlm.TuneConfig(stages=[vlm.Align(steps=2)])
    with pytest.raises(ConfigError, match="a tuning run with other stages"):
        vlm.tune(*model, samples(), other, directory=tmp_path)
    with pytest.raises(ConfigError, match="a tuning run with other data"):
        vlm.tune(*model, samples(1), vlm.TuneConfig(stages=[vlm.Align(steps=1)]), directory=tmp_path)


def test_known_limits_are_told_before_the_start(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantised = vlm.Adapt(steps=1, lora=vlm.Lora(qlora=True))
    sharded = vlm.TuneConfig(stages=[quantised], engine=Engine(kind="deepspeed", zero_stage=3))
    with pytest.raises(UnsupportedError, match=r"QLoRA does not run .*field: engine\.zero_stage"):
        vlm.tune(*model, samples(), sharded, directory=tmp_path / "a")
    with monkeypatch.context() as launched:
        place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
        for name, value in place.items():
            launched.setenv(name, value)
        with pytest.raises(UnsupportedError, match="2 were launched"):
            vlm.tune(*model, samples(), config(), directory=tmp_path / "a")
    result = vlm.tune(*model, samples(), config(), directory=tmp_path / "b")
    with pytest.raises(UnsupportedError, match="has adapters already"):
        vlm.tune(result.model, model[1], samples(), config(), directory=tmp_path / "c")
    with pytest.raises(UnsupportedError, match=r"no metric 'meteor'.*METEOR is left out.*accuracy, vqa, captions"):
        vlm.evaluate(*model, samples(), metric="meteor")
    assert not (tmp_path / "a").exists()


def test_losses_that_stay_non_finite_stop_the_run_and_leave_the_weights(model: Any, tmp_path: Path) -> None:
    llava, _ = model
    with torch.no_grad():
        llava.lm_head.weight[5] = float("inf")
    before = llava.model.multi_modal_projector.linear_1.weight.clone()
    with pytest.raises(EngineError, match=r"nothing was trained: all 4 steps of stage 0 .*non-finite"):
        vlm.tune(*model, samples(), config(align=9), directory=tmp_path)
    assert torch.equal(llava.model.multi_modal_projector.linear_1.weight, before)


def added(monkeypatch: pytest.MonkeyPatch, steps: Container[int], value: float) -> None:
    """Add a constant to the loss of some forward passes (from 1), so that its gradient stays finite."""
    forward, count = AnswerLoss.forward, iter(range(1, 1000))
    monkeypatch.setattr(
        AnswerLoss, "forward", lambda self, *inputs: forward(self, *inputs) + (value if next(count) in steps else 0.0)
    )


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_non_finite_loss_with_a_finite_gradient_is_skipped(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    added(monkeypatch, {3}, value)
    heard: list[Any] = []
    result = vlm.tune(*model, samples(), config(), directory=tmp_path, callbacks=[heard.append])
    assert [(event.name, event.step) for event in heard if event.name in ("step_done", "step_skipped")] == [
        ("step_done", 1), ("step_done", 2), ("step_skipped", 3), ("step_done", 4), ("step_done", 5),
    ]  # fmt: skip
    assert [len(losses) for losses in result.losses] == [2, 2]


def test_a_stage_without_a_step_is_not_done(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        added(patch, range(1000), float("nan"))
        for _ in range(2):  # fewer steps than may be skipped in a row
            with pytest.raises(
                EngineError, match=r"nothing was trained: all 2 steps of stage 0 .*non-finite"
            ) as caught:
                vlm.tune(*model, samples(), config(), directory=tmp_path)
            assert "learning rate" not in caught.value.remedy
            assert not list(tmp_path.glob("stage-*/checkpoints/*"))
    result = vlm.tune(*model, samples(), config(), directory=tmp_path)
    assert [len(losses) for losses in result.losses] == [2, 3]


def test_an_artefact_that_lost_its_training_is_refused(model: Any, tmp_path: Path) -> None:
    llava, _ = model
    llava.requires_grad_(False)
    llava.model.multi_modal_projector.requires_grad_(True)
    start = snapshot(llava)
    weights = tmp_path / "weights.safetensors"

    def save() -> None:
        save_file({name: p.detach().clone() for name, p in llava.named_parameters() if p.requires_grad}, weights)

    save()
    with pytest.raises(EngineError, match="the projector is as it was before training"):
        check_saved(weights, dict(llava.named_parameters()), start)
    with torch.no_grad():
        llava.model.multi_modal_projector.linear_1.bias += 1
    with pytest.raises(EngineError, match="not the trained one"):
        check_saved(weights, dict(llava.named_parameters()), start)
    save()
    check_saved(weights, dict(llava.named_parameters()), start)
    emptied = load_file(weights)
    emptied["model.multi_modal_projector.linear_2.weight"] = torch.empty(0)
    save_file(emptied, weights)
    with pytest.raises(EngineError, match=r"linear_2\.weight' is not the trained one"):
        check_saved(weights, dict(llava.named_parameters()), start)


def test_a_torn_checkpoint_is_named(folders: tuple[Path, Path], tmp_path: Path) -> None:
    plan = vlm.TuneConfig(stages=[vlm.Align(steps=2)])
    vlm.tune(*vlm.build(*folders), samples(), plan, directory=tmp_path)
    (weights,) = tmp_path.rglob("weights.safetensors")
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(EngineError, match="cannot be read"):
        vlm.tune(*vlm.build(*folders), samples(), plan, directory=tmp_path)


def test_questions_without_pictures_cannot_be_scored(model: Any) -> None:
    with pytest.raises(EvaluationError, match="nothing to ask"):
        vlm.evaluate(*model, [])
    with pytest.raises(EvaluationError, match="one picture alone"):
        vlm.evaluate(*model, samples()[:2])
    with pytest.raises(EvaluationError, match=r"four annotators, 'red0' has 1 and 0.*field: metric"):
        vlm.evaluate(*model, samples(), metric="vqa")
    with pytest.raises(DataError, match="1 pictures and 2 questions"):
        vlm.answer(*model, samples()[0].images, ["a", "b"])


def test_saving_apart_needs_an_adapter_and_loading_a_model(model: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no adapter to keep apart"):
        vlm.save(*model, tmp_path / "m", merge=False)
    assert not (tmp_path / "m").exists()
    with pytest.raises(ModelError, match="holds no model"):
        vlm.load(tmp_path)
