# SPDX-License-Identifier: Apache-2.0
"""A model around a student's tower: transformers' numbers and folders, and tuning that can stop and go on."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

import vlm
from aced_sdk import towers
from aced_sdk.config import Engine, Student
from aced_sdk.engine import Event
from aced_sdk.engine.events import StepDone
from aced_sdk.errors import DataError
from aced_sdk.files import home
from aced_sdk.towers.huggingface import clip_vision_model
from vlm.cli import register
from vlm.data.pictures import Features, open_picture
from vlm.data.rows import collate, encode, make_rows, messages
from vlm.model.adapters import base_of, table
from vlm.model.loss import AnswerLoss

WORDS = ["what", "colour", "is", "it", "this", "?", "red", "green", "blue", "yes", "no", "a", "picture", "of"]
ROLES = ["user", "assistant", "system", "USER", "ASSISTANT", ":", "\n"]
COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220)}
Model = tuple[Any, Any]


def student(folder: Path) -> Path:
    architecture = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 24, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16},
        "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    return towers.save(towers.build(Student(architecture=architecture), seed=0), folder)


def language(folder: Path, chatml: bool = True, family: str = "llama", **changes: Any) -> Path:
    """A language model so small that a step takes milliseconds; every word is a token."""
    marks = ["<|im_end|>", "<|im_start|>"] if chatml else ["</s>"]
    vocabulary = {word: index for index, word in enumerate(["<unk>", *marks, *WORDS, *ROLES])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", eos_token=marks[0], additional_special_tokens=marks[1:]
    )
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": None,
    }
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(sizes | changes))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("parts")
    return student(folder / "student"), language(folder / "language")


@pytest.fixture
def model(folders: tuple[Path, Path]) -> Model:
    return vlm.build(vision=folders[0], language=folders[1])


def samples(per_colour: int = 2) -> list[vlm.Sample]:
    """Pictures of one colour, each with two questions."""
    out = []
    for shade in range(per_colour):
        for name, (red, green, blue) in COLOURS.items():
            image = Image.new("RGB", (24, 24), (red - shade, green, blue))
            out.append(vlm.Sample(f"{name}{shade}", (("what colour is it ?", name),), (image,), kind="colour"))
            reply = "yes" if name == "red" else "no"
            out.append(vlm.Sample(f"{name}{shade}?", (("is this red ?", reply),), (image,), kind="yes_no"))
    return out


def config(align: int = 2, adapt: int = 3, engine: Engine | None = None, **values: Any) -> vlm.TuneConfig:
    options: dict[str, Any] = {"batch_size": 4, "learning_rate": 1e-2} | values
    stages = [vlm.Align(steps=align, **options), vlm.Adapt(steps=adapt, lora=vlm.Lora(rank=2, dropout=0.1), **options)]
    return vlm.TuneConfig(stages=stages, engine=engine or Engine(kind="single", checkpoint_every=2))


def inputs(processor: Any, picked: Sequence[vlm.Sample]) -> Any:
    text = [processor.apply_chat_template(messages(sample), tokenize=False) for sample in picked]
    return processor(images=[sample.images[0] for sample in picked], text=text, padding=True, return_tensors="pt")


# -- building -----------------------------------------------------------------------------------------------------


def test_features_inside_equal_the_tower_outside(model: Model, folders: tuple[Path, Path]) -> None:
    llava, processor = model
    encoder = towers.load(str(folders[0]))
    image = Image.effect_noise((40, 30), 90).convert("RGB")
    pixels = processor.image_processor(images=[image], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        tower = clip_vision_model(encoder)
        outside = tower(pixels, output_hidden_states=True).hidden_states[-1]
        expected = llava.model.multi_modal_projector(outside[:, 1:])
        inside = llava.get_image_features(
            pixels, vision_feature_layer=-1, vision_feature_select_strategy="default"
        ).pooler_output
        torch.testing.assert_close(Features(llava, processor, [image], 1).of([0]), outside[:, 1:], atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.stack(list(inside)), expected, atol=1e-5, rtol=0)
    # both resize with antialiased cubics and round to 0..255, in another order: a few levels apart at most
    torch.testing.assert_close(pixels[0], encoder.preprocess(image), atol=4 * 2 / 255, rtol=0)


@pytest.mark.parametrize("size", [(24, 24), (50, 17)])
def test_a_picture_takes_one_token_a_patch(model: Model, size: tuple[int, int]) -> None:
    llava, processor = model
    sample = vlm.Sample("s", (("what is it ?", "red"),), (Image.new("RGB", size),))
    batch = inputs(processor, [sample])
    assert int((batch["input_ids"] == llava.config.image_token_id).sum()) == 9 == llava.config.image_seq_length
    assert llava(**batch).logits.shape[:2] == batch["input_ids"].shape
    ids, targets = encode(sample, processor, 9)
    assert batch["input_ids"][0, : len(ids)].tolist() == ids
    assert [processor.tokenizer.decode(t) for t in targets if t >= 0] == ["red", "<|im_end|>"]


def test_linear_projector_is_linear_and_build_is_repeatable(folders: tuple[Path, Path]) -> None:
    (first, _), (second, _) = (vlm.build(*folders, projector=vlm.Projector(kind="linear"), seed=3) for _ in range(2))
    projector, same = first.model.multi_modal_projector, second.model.multi_modal_projector
    x, y = torch.randn(2, 5, 32)
    bias = projector(torch.zeros(1, 32))
    torch.testing.assert_close(projector(x + y), projector(x) + projector(y) - bias)
    assert torch.equal(projector.linear_1.weight, same.linear_1.weight)


def test_a_tokenizer_without_chatml_gets_a_plain_template(folders: tuple[Path, Path], tmp_path: Path) -> None:
    _, processor = vlm.build(folders[0], language(tmp_path / "plain", chatml=False))
    sample = vlm.Sample("s", (("what is it ?", "red"),), (Image.new("RGB", (24, 24)),))
    text = processor.apply_chat_template(messages(sample), tokenize=False)
    assert text == "USER: <image>what is it ?\nASSISTANT: red</s>"
    _, targets = encode(sample, processor, 9)
    assert [processor.tokenizer.decode(t) for t in targets if t >= 0] == ["red", "</s>"]


def test_smollm2_answers_where_it_is_in_the_cache(folders: tuple[Path, Path]) -> None:
    found = sorted(home().glob("models/*/aced_language.json"))
    if not found:
        pytest.skip("no converted language model in the cache home; vlm.build makes one from a GGUF file")
    llava, processor = vlm.build(folders[0], found[0].parent)
    (text,) = vlm.answer(llava, processor, [Image.new("RGB", (24, 24))], ["What is the capital of France?"], 8)
    assert text
    assert processor.tokenizer.convert_tokens_to_ids("<image>") == llava.config.image_token_id
    assert llava.lm_head.weight is llava.get_input_embeddings().weight


# -- the loss -----------------------------------------------------------------------------------------------------


def test_packed_and_shared_rows_have_transformers_own_loss(model: Model) -> None:
    llava, processor = model
    data = samples(1)
    rows, pictures = make_rows(data, processor, 9, conversations_per_row=2, limit=128)
    longest = max(len(encode(sample, processor, 9)[0]) for sample in data)
    assert list(make_rows(data, processor, 9, conversations_per_row=2, limit=longest)[0]) == list(
        rows
    )  # exactly the limit fits
    with pytest.raises(DataError, match=f"has {longest} tokens, the language model reads {longest - 1}"):
        make_rows(data, processor, 9, conversations_per_row=2, limit=longest - 1)
    assert [row.samples for row in rows] == [2, 2, 2]
    batch = collate(rows, pad=0)
    features = Features(llava, processor, pictures, 1).of(batch.pictures)
    ours = AnswerLoss(llava)(features, batch.ids, batch.targets, batch.positions, batch.segments, batch.owners)
    theirs = torch.zeros(())
    for sample in data:
        alone = inputs(processor, [sample])
        _, targets = encode(sample, processor, 9)
        labels = torch.full_like(alone["input_ids"], -100)
        labels[0, 1 : len(targets) + 1] = torch.tensor(targets)
        theirs = theirs + llava(**alone, labels=labels).loss * sum(target >= 0 for target in targets)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)


def test_micro_batches_do_not_change_the_training(folders: tuple[Path, Path], tmp_path: Path) -> None:
    weights = []
    for micro in (None, 1):
        llava, processor = vlm.build(*folders)
        plan = vlm.TuneConfig(
            stages=[vlm.Align(steps=3, batch_size=5, micro_batch=micro, learning_rate=1e-3)], conversations_per_row=2
        )
        # answers of different lengths: the mean over tokens is not the mean over micro-batches
        data = [*samples(), vlm.Sample("long", (("what is this ?", "a picture of blue"),), samples()[0].images)]
        vlm.tune(llava, processor, data, plan, directory=tmp_path / str(micro))
        weights.append(llava.model.multi_modal_projector.state_dict())
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, atol=1e-5, rtol=1e-4)


# -- tuning -------------------------------------------------------------------------------------------------------


def test_stages_train_what_they_say_and_nothing_else(model: Model, tmp_path: Path) -> None:
    llava, processor = model
    before = {name: value.clone() for name, value in llava.state_dict().items()}
    events: list[Event] = []
    result = vlm.tune(llava, processor, samples(), config(), directory=tmp_path, callbacks=[events.append])
    after = base_of(result.model).state_dict()
    changed = {name for name, value in before.items() if not torch.equal(value, after.get(name, value))}
    assert changed == set()  # frozen weights keep their names and values; trained ones moved into wrappers
    align, adapt = result.parameters
    assert align["projector"]["trained"] > 0
    assert (align["adapter"]["trained"], align["language model"]["trained"], align["vision tower"]["trained"]) == (
        0,
        0,
        0,
    )
    assert adapt["adapter"]["trained"] > 0
    assert (adapt["language model"]["trained"], adapt["vision tower"]["trained"]) == (0, 0)
    assert not any("vision_tower" in name for name, _ in result.model.named_parameters() if "lora_" in name)
    assert all(part["trained"] == 0 for part in table(llava).values())
    assert [len(losses) for losses in result.losses] == [2, 3]
    assert [event.step for event in events if isinstance(event, StepDone)] == [1, 2, 3, 4, 5]
    written = [json.loads(line)["event"] for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert written.count("step_done") == 5
    assert written.count("stage_started") == 2


def test_tuning_learns_what_the_picture_shows(model: Model, tmp_path: Path) -> None:
    llava, processor = model
    plan = vlm.TuneConfig(
        stages=[
            vlm.Align(steps=60, batch_size=6, learning_rate=1e-2),
            vlm.Adapt(steps=100, batch_size=6, learning_rate=1e-2),
        ]
    )
    result = vlm.tune(llava, processor, samples(), plan, directory=tmp_path)
    scores = vlm.evaluate(result.model, processor, samples(), max_new_tokens=3)
    assert scores.accuracy >= 0.9
    assert scores.blind is not None
    assert scores.blind < scores.accuracy - 0.2
    assert scores.kinds["colour"].count == 6
    assert scores.to_dict()["total"]["accuracy"] == scores.accuracy
    assert (scores.total.metrics, scores.total.blind_metrics) == ({}, {})
    captions = vlm.caption(result.model, processor, [samples()[0].images[0]], prompt="what colour is it ?")
    assert captions == ["red"]

    people = [replace(one, answers=(one.turns[0][1],) * 3 + ("a picture",) * 7) for one in samples()]
    vqa = vlm.evaluate(result.model, processor, people, metric="vqa")
    for score, own in ((vqa.total, scores.total), *((vqa.kinds[kind], scores.kinds[kind]) for kind in scores.kinds)):
        assert own.blind is not None
        assert score.blind_metrics is not None
        assert score.metrics["vqa"] == pytest.approx(0.9 * own.accuracy)  # three of ten said so
        assert score.blind_metrics["vqa"] == pytest.approx(0.9 * own.blind)

    told = vlm.evaluate(result.model, processor, samples(), metric="captions", max_new_tokens=3)
    assert told.accuracy == scores.accuracy
    expected = vlm.caption_scores([one.answer for one in told.samples], [one.expected for one in told.samples])
    assert told.total.metrics == expected
    assert told.total.blind_metrics is not None
    assert told.total.blind_metrics["cider"] < expected["cider"] / 2
    assert json.loads(json.dumps(told.to_dict()))["kinds"]["colour"]["metrics"]["rouge_l"] > 0.5


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_a_run_that_was_killed_goes_on_at_the_very_step(folders: tuple[Path, Path], tmp_path: Path, stop: int) -> None:
    class Killed(Exception):
        pass

    def kill(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == stop + 1:
            raise Killed

    plan = config(engine=Engine(kind="single", checkpoint_every=1))
    whole_model, processor = vlm.build(*folders)
    whole = vlm.tune(whole_model, processor, samples(), plan, directory=tmp_path / "whole")
    with pytest.raises(Killed):
        vlm.tune(vlm.build(*folders)[0], processor, samples(), plan, directory=tmp_path / "cut", callbacks=[kill])
    cut_model, _ = vlm.build(*folders)
    rest = vlm.tune(cut_model, processor, samples(), plan, directory=tmp_path / "cut")
    assert sum(len(losses) for losses in rest.losses) == 5 - stop
    events = [json.loads(line) for line in (tmp_path / "cut" / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "step_done"] == [1, 2, 3, 4, 5]
    expected, got = base_of(whole.model).state_dict(), base_of(rest.model).state_dict()
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


def test_deepspeed_takes_the_same_steps(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """In a process of its own: DeepSpeed leaves a process group behind."""
    vlm.save(*vlm.build(*folders), tmp_path / "model")
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import vlm
from aced_sdk.config import Engine
from test_vlm import config, samples
for kind in ("single", "deepspeed"):
    model, processor = vlm.load({str(tmp_path / "model")!r})
    engine = Engine(kind=kind, device="cpu")
    result = vlm.tune(model, processor, samples(), config(engine=engine), directory={str(tmp_path)!r} + "/" + kind)
    vlm.save(result.model, processor, {str(tmp_path)!r} + "/saved-" + kind)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    single, deepspeed = (
        load_file(tmp_path / f"saved-{kind}" / "model.safetensors") for kind in ("single", "deepspeed")
    )
    for name, value in single.items():
        torch.testing.assert_close(deepspeed[name], value, atol=1e-5, rtol=1e-4)


# -- generating ---------------------------------------------------------------------------------------------------


def test_batched_answers_are_those_of_single_questions(model: Model) -> None:
    llava, processor = model
    data = samples(1)
    images, questions = [sample.images[0] for sample in data], [sample.turns[0][0] for sample in data]
    questions[0] = "what is it ? what is it ? what colour ?"
    together = vlm.answer(llava, processor, images, questions, max_new_tokens=5, batch_size=4)
    alone = [
        vlm.answer(llava, processor, [i], [q], max_new_tokens=5)[0] for i, q in zip(images, questions, strict=True)
    ]
    assert together == alone
    assert not llava.training


# -- the command --------------------------------------------------------------------------------------------------


def test_commands_print_one_json_object_a_picture(model: Model, tmp_path: Path) -> None:
    vlm.save(*model, tmp_path / "model")
    Image.new("RGB", (30, 30), COLOURS["red"]).save(tmp_path / "p.png")
    app = typer.Typer()
    register(app)
    for arguments, key in ((["caption"], "caption"), (["answer", "what colour is it ?"], "answer")):
        verb, *question = arguments
        done = CliRunner().invoke(
            app, [verb, str(tmp_path / "model"), *question, str(tmp_path / "p.png"), "--max-new-tokens", "3"]
        )
        assert done.exit_code == 0, done.output
        line = json.loads(done.stdout.splitlines()[-1])
        assert line["image"] == str(tmp_path / "p.png")
        assert isinstance(line[key], str)


def test_pictures_are_decoded_once_while_memory_allows(model: Model, tmp_path: Path) -> None:
    llava, processor = model
    path = tmp_path / "p.png"
    samples(1)[0].images[0].save(path)
    kept, forgetful = Features(llava, processor, [path], 1), Features(llava, processor, [path], 0)
    first = kept.of([0, 0])
    assert torch.equal(first[0], first[1])
    torch.testing.assert_close(forgetful.of([0])[0], first[0], atol=1e-5, rtol=1e-5)
    Image.new("RGB", open_picture(path).size, (0, 0, 0)).save(path)
    assert torch.equal(kept.of([0])[0], first[0])
    assert not torch.allclose(forgetful.of([0])[0], first[0], atol=1e-2)
