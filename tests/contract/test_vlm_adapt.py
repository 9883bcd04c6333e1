# SPDX-License-Identifier: Apache-2.0
"""How a language model is adapted, and what may stand in one batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from test_vlm import Model, config, inputs, language, samples, student
from tokenizers import processors
from transformers import AutoModelForImageTextToText, AutoTokenizer

import vlm
from aced_sdk import towers
from aced_sdk.config import Student
from aced_sdk.engine import Event
from vlm.data.pictures import Features
from vlm.data.rows import collate, encode, make_rows, messages
from vlm.model.adapters import base_of
from vlm.model.loss import AnswerLoss
from vlm.tuning import StageStarted


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("parts")
    return student(folder / "student"), language(folder / "language")


@pytest.fixture
def model(folders: tuple[Path, Path]) -> Model:
    return vlm.build(vision=folders[0], language=folders[1])


def mixed() -> list[vlm.Sample]:
    """No picture, one, two and three of them; the last two conversations share theirs."""
    red, green, blue = (sample.images[0] for sample in samples(1)[::2])
    return [
        vlm.Sample("text", (("what is red ?", "a colour"),)),
        vlm.Sample("talk", (("what is it ?", "blue"), ("is it red ?", "no"))),
        vlm.Sample("one", (("what colour is it ?", "red"),), (red,)),
        vlm.Sample("two", (("what is this ?", "green blue"),), (green, blue)),
        vlm.Sample("three", (("what is this ?", "red green blue"), ("is it red ?", "yes")), (red, green, blue)),
        vlm.Sample("again", (("is this a picture ?", "yes"),), (red, green, blue)),
    ]


def own_loss(llava: Any, processor: Any, data: list[vlm.Sample]) -> torch.Tensor:
    """transformers' summed loss, one conversation at a time."""
    total = torch.zeros(())
    for sample in data:
        text = processor.apply_chat_template(messages(sample), tokenize=False)
        alone = processor(images=list(sample.images) or None, text=[text], return_tensors="pt")
        ids, targets = encode(sample, processor, llava.config.image_seq_length)
        assert alone["input_ids"][0, : len(ids)].tolist() == ids
        labels = torch.full_like(alone["input_ids"], -100)
        labels[0, 1 : len(targets) + 1] = torch.tensor(targets)
        total = total + llava(**alone, labels=labels).loss * sum(target >= 0 for target in targets)
    return total


def packed_loss(llava: Any, processor: Any, data: list[vlm.Sample]) -> torch.Tensor:
    rows, pictures = make_rows(data, processor, llava.config.image_seq_length, conversations_per_row=4, limit=128)
    batch = collate(rows, pad=0)
    features = Features(llava, processor, pictures, 1).of(batch.pictures)
    loss: torch.Tensor = AnswerLoss(llava)(
        features, batch.ids, batch.targets, batch.positions, batch.segments, batch.owners
    )
    return loss


# -- what stands in a batch -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma", "gemma3_text", "qwen3"])
@pytest.mark.parametrize("kind", ["mlp", "pixel_shuffle"])
def test_mixed_batches_have_transformers_own_loss(
    folders: tuple[Path, Path], tmp_path: Path, family: str, kind: Any
) -> None:
    lm = language(tmp_path / family, family=family, **({"head_dim": 16} if family != "llama" else {}))
    llava, processor = vlm.build(folders[0], lm, projector=vlm.Projector(kind=kind, factor=3))
    with torch.no_grad():
        for part in (mixed(), mixed()[:2], mixed()[3:]):
            ours, theirs = packed_loss(llava, processor, part), own_loss(llava, processor, part)
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)


def test_short_conversations_without_pictures_are_packed(model: Model) -> None:
    _, processor = model
    short = [vlm.Sample(str(n), (("what is it ?", "red"),)) for n in range(12)]
    long = vlm.Sample("long", (("what is it ? " * 12, "blue"),))
    rows, _ = make_rows([*short, long], processor, 9, conversations_per_row=4, limit=128)
    ids = collate(rows, pad=0).ids
    used = sum(len(row.ids) for row in rows)
    assert len(rows) == 13
    assert ids.shape[0] < 6
    assert used / ids.numel() > 0.8


@pytest.mark.parametrize("kind", ["mlp", "pixel_shuffle"])
def test_batches_without_any_picture_train_and_resume(folders: tuple[Path, Path], tmp_path: Path, kind: Any) -> None:
    llava, processor = vlm.build(*folders, projector=vlm.Projector(kind=kind, factor=3))
    plan = config(batch_size=1, align=6, adapt=4)
    result = vlm.tune(llava, processor, mixed(), plan, directory=tmp_path)
    assert [len(losses) for losses in result.losses] == [6, 4]
    texts = vlm.answer(result.model, processor, [sample.images for sample in mixed()], ["what is it ?"] * 6, 3)
    assert len(texts) == 6


def test_a_first_token_of_the_tokenizer_is_learned_as_processors_write_it(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    lm = language(tmp_path / "bos")
    tokenizer = AutoTokenizer.from_pretrained(lm)
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<unk> $A", special_tokens=[("<unk>", 0)]
    )
    tokenizer.bos_token = "<unk>"
    tokenizer.save_pretrained(lm)
    llava, processor = vlm.build(folders[0], lm)
    with torch.no_grad():
        torch.testing.assert_close(packed_loss(llava, processor, mixed()), own_loss(llava, processor, mixed()))
    assert encode(mixed()[0], processor, 9)[0][0] == 0


# -- how it is adapted ------------------------------------------------------------------------------------------------


def logits_of(llava: Any, processor: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = llava(**inputs(processor, samples(1)[:1])).logits[0, -1]
    return logits


CONVOLUTIONS = {"timm_model_name": "resnet10t", "timm_pool": "avg", "timm_proj": "linear", "image_size": 96}


@pytest.mark.parametrize("kind", ["fast_vlm", "aya_vision"])
def test_the_other_kinds_of_models_are_tuned_and_saved_alike(
    folders: tuple[Path, Path], tmp_path: Path, kind: str
) -> None:
    text = {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    architecture = {"embed_dim": 16, "vision_cfg": CONVOLUTIONS, "text_cfg": text}
    vision: Any = towers.build(Student(architecture=architecture), seed=0).eval() if kind == "fast_vlm" else folders[0]
    projector = vlm.Projector(kind="mlp" if kind == "fast_vlm" else "pixel_shuffle", factor=3)
    llava, processor = vlm.build(vision, folders[1], projector=projector)
    assert llava.config.model_type == kind
    tower = {name: value.clone() for name, value in llava.model.vision_tower.state_dict().items()}
    result = vlm.tune(llava, processor, [*samples(), *mixed()], config(align=3, adapt=4), directory=tmp_path / "run")
    assert all(torch.equal(value, tower[name]) for name, value in llava.model.vision_tower.state_dict().items())
    expected = logits_of(llava, processor)
    for merge in (True, False):
        again, _ = vlm.load(vlm.save(result.model, processor, tmp_path / str(merge), merge=merge))
        torch.testing.assert_close(logits_of(again, processor), expected, atol=1e-4, rtol=1e-4)
    fresh, _ = vlm.build(vision, folders[1], projector=projector)
    vlm.tune(fresh, processor, [*samples(), *mixed()], config(align=3, adapt=4), directory=tmp_path / "run")
    torch.testing.assert_close(logits_of(fresh, processor), expected, atol=1e-5, rtol=1e-5)


def test_dora_saves_merged_and_apart(model: Model, tmp_path: Path) -> None:
    llava, processor = model
    plan = vlm.TuneConfig(stages=[vlm.Adapt(steps=4, batch_size=4, learning_rate=1e-2, lora=vlm.Lora(dora=True))])
    result = vlm.tune(llava, processor, samples(), plan, directory=tmp_path / "run")
    magnitudes = [value for name, value in llava.named_parameters() if "lora_magnitude_vector" in name]
    assert magnitudes
    expected = logits_of(llava, processor)
    for merge in (True, False):
        again, _ = vlm.load(vlm.save(result.model, processor, tmp_path / str(merge), merge=merge))
        torch.testing.assert_close(logits_of(again, processor), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits_of(llava, processor), expected)


@pytest.mark.parametrize("tied", [True, False])
def test_the_whole_language_model_is_trained_and_saved(
    folders: tuple[Path, Path], tmp_path: Path, tied: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    lm = folders[1] if tied else language(tmp_path / "untied", tie_word_embeddings=False)
    llava, processor = vlm.build(folders[0], lm)
    before = {name: value.clone() for name, value in llava.state_dict().items()}
    heard: list[Event] = []
    stage = vlm.Adapt(steps=3, batch_size=4, learning_rate=1e-3, lora=None)
    result = vlm.tune(
        llava,
        processor,
        samples(),
        vlm.TuneConfig(stages=[stage]),
        directory=tmp_path / "run",
        callbacks=[heard.append],
    )
    (started,) = (event for event in heard if isinstance(event, StageStarted))
    assert started.parameters["vision tower"]["trained"] == 0 == started.parameters["language model"]["frozen"]
    counted = started.parameters["language model"]["trained"]
    assert counted == sum(
        p.numel() for name, p in llava.named_parameters() if "language_model" in name or "lm_head" in name
    )
    assert f"language model  {counted:>15,}{0:>15,}" in capsys.readouterr().err
    after = llava.state_dict()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if "vision_tower" in name}
    assert result.model is base_of(result.model)
    again = AutoModelForImageTextToText.from_pretrained(vlm.save(result.model, processor, tmp_path / "saved"))
    torch.testing.assert_close(logits_of(again.eval(), processor), logits_of(llava, processor), atol=1e-5, rtol=1e-5)
    assert (again.lm_head.weight is again.get_input_embeddings().weight) is tied

    # called again it is done, and gives the very weights back
    fresh, _ = vlm.build(folders[0], lm)
    rest = vlm.tune(fresh, processor, samples(), vlm.TuneConfig(stages=[stage]), directory=tmp_path / "run")
    assert rest.losses == ((),)
    assert all(torch.equal(value, after[name]) for name, value in fresh.state_dict().items())


def test_qlora_holds_the_adapted_layers_in_four_bits(folders: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    llava, processor = vlm.build(*folders)
    plan = vlm.TuneConfig(stages=[vlm.Adapt(steps=4, batch_size=4, learning_rate=1e-2, lora=vlm.Lora(qlora=True))])
    result = vlm.tune(llava, processor, samples(), plan, directory=tmp_path / "run")
    held = {name: value.dtype for name, value in llava.named_parameters() if name.endswith("base_layer.weight")}
    assert set(held.values()) == {torch.uint8}
    assert len(held) == 14
    expected = logits_of(llava, processor)
    for merge in (True, False):
        again, _ = vlm.load(vlm.save(result.model, processor, tmp_path / str(merge), merge=merge))
        torch.testing.assert_close(logits_of(again, processor), expected, atol=1e-3, rtol=1e-3)
    fresh, _ = vlm.build(*folders)
    rest = vlm.tune(fresh, processor, samples(), plan, directory=tmp_path / "run")
    assert rest.losses == ((),)
    torch.testing.assert_close(logits_of(fresh, processor), expected)


def test_pictures_of_several_sizes_stand_in_one_question(model: Model) -> None:
    llava, processor = model
    pictures = [Image.new("RGB", size, (9, 90, 200)) for size in ((5, 50), (24, 24), (80, 9))]
    sample = vlm.Sample("s", (("what is this ?", "blue"),), tuple(pictures))
    with torch.no_grad():
        torch.testing.assert_close(packed_loss(llava, processor, [sample]), own_loss(llava, processor, [sample]))
