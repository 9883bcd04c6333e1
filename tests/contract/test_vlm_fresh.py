# SPDX-License-Identifier: Apache-2.0
"""Saved models give in plain transformers, in a fresh process, what `vlm.answer` gives, alone and in batches."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

import vlm
from aced_sdk import towers
from aced_sdk.config import Student
from aced_sdk.errors import ModelError, UnsupportedError
from vlm.data.rows import encode

sys.path.insert(0, str(Path(__file__).parent))
from test_vlm import config, language, samples, student
from test_vlm_adapt import CONVOLUTIONS

SHORT, LONG = "what ?", "what colour is it ? is this a picture of red ? what is it ?"
COLOURS = [sample.images[0] for sample in samples(1)[::2]]
FRESH = """
import sys, json, torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
found = {}
for base in sys.argv[2:]:
    base, _, adapter = base.partition("+")
    model, processor = AutoModelForImageTextToText.from_pretrained(base), AutoProcessor.from_pretrained(base)
    if adapter:
        from peft import PeftModel
        model = PeftModel.from_pretrained(model, adapter)
    def ask(pictures, questions):
        turns = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": q}]}] for q in questions]
        texts = [processor.apply_chat_template(turn, add_generation_prompt=True) for turn in turns]
        inputs = processor(images=pictures, text=texts, padding=True, return_tensors="pt").to(model.dtype)
        out = model.generate(**inputs, max_new_tokens=4, output_logits=True, return_dict_in_generate=True)
        words = out.sequences[:, inputs["input_ids"].shape[1]:]
        return [processor.decode(ids, skip_special_tokens=True).strip() for ids in words], out.logits[0].float()
    pictures = [Image.open(f"{sys.argv[1]}/{n}.png") for n in range(2)]
    questions = QUESTIONS
    both, logits = ask(pictures, questions)
    alone = [ask([p], [q]) for p, q in zip(pictures, questions)]
    found[base] = [both, [text[0] for text, _ in alone], logits.tolist(), torch.cat([x for _, x in alone]).tolist()]
assert not {"aced_sdk", "vlm"} & set(sys.modules)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def eyes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return student(tmp_path_factory.mktemp("eyes") / "student")


def right(folder: Path) -> Path:
    """Let a language model's tokenizer say that it pads on the right; one that says nothing does so too."""
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"padding_side": "right"}))
    return folder


def in_a_fresh_process(folder: Path, places: list[str]) -> dict[str, Any]:
    for number, picture in enumerate(COLOURS[:2]):
        picture.save(folder / f"{number}.png")
    code = FRESH.replace("QUESTIONS", repr([SHORT, LONG]))
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), *places], capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def same(found: list[Any], expected: list[str], tolerance: float = 1e-4) -> None:
    both, alone, logits, single = found
    assert both == alone == expected
    torch.testing.assert_close(torch.tensor(logits), torch.tensor(single), atol=tolerance, rtol=tolerance)


def test_every_saved_form_answers_alone_and_in_batches_as_it_did(tmp_path: Path) -> None:
    expected, places = {}, []
    for name, chatml in (("marks", True), ("plain", False)):
        words = language(tmp_path / name, chatml=chatml)
        assert AutoTokenizer.from_pretrained(words if chatml else right(words)).padding_side == "right"
        model, processor = vlm.build(student(tmp_path / f"student-{name}"), words)
        plan = config(align=20, adapt=20, learning_rate=3e-2)
        tuned = vlm.tune(model, processor, samples(1), plan, directory=tmp_path / f"run-{name}").model
        merged = vlm.save(tuned, processor, tmp_path / f"{name}-merged")
        apart = vlm.save(tuned, processor, tmp_path / f"{name}-apart", merge=False)
        places += [str(merged), f"{apart / 'base'}+{apart / 'adapter'}"]
        answers = vlm.answer(tuned, processor, COLOURS[:2], [SHORT, LONG], 4)
        expected |= {str(merged): answers, str(apart / "base"): answers}
        again = [vlm.load(folder) for folder in (merged, apart)]
        assert [vlm.answer(*one, COLOURS[:2], [SHORT, LONG], 4) for one in again] == [answers] * 2
    found = in_a_fresh_process(tmp_path, places)
    assert found.keys() == expected.keys()
    for place, one in found.items():
        same(one, expected[place])


def test_other_kinds_and_half_precision_answer_as_they_did(tmp_path: Path) -> None:
    words = language(tmp_path / "words")
    text = {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    architecture = {"embed_dim": 16, "vision_cfg": CONVOLUTIONS, "text_cfg": text}
    convolutional = towers.build(Student(architecture=architecture), seed=0).eval()
    made = {
        "fast": vlm.build(convolutional, words),
        "aya": vlm.build(student(tmp_path / "s"), words, projector=vlm.Projector(kind="pixel_shuffle", factor=3)),
        "half": vlm.build(tmp_path / "s", words),
        "gpt2": vlm.build(tmp_path / "s", right(language(tmp_path / "gpt2", family="gpt2"))),
    }
    made["half"][0].to(torch.bfloat16)
    expected = {}
    for name, (model, processor) in made.items():
        folder = vlm.save(model, processor, tmp_path / f"saved-{name}")
        expected[str(folder)] = vlm.answer(model, processor, COLOURS[:2], [SHORT, LONG], 4)
        assert vlm.load(folder)[0].dtype == model.dtype
    for place, one in in_a_fresh_process(tmp_path, list(expected)).items():
        same(one, expected[place], 5e-2 if "half" in place else 1e-4)


def test_what_a_call_sets_is_not_saved(tmp_path: Path) -> None:
    """Answers, and a processor whose user has changed it, leave no trace in the files."""
    model, processor = vlm.build(student(tmp_path / "student"), language(tmp_path / "words"))
    first = vlm.save(model, processor, tmp_path / "first")
    vlm.answer(model, processor, COLOURS, [SHORT] * 3, 2)
    processor(text=[SHORT], padding="max_length", max_length=40, truncation=True)
    processor.tokenizer.padding_side = "right"
    model.generation_config.num_beams = 4
    with pytest.warns(UserWarning, match="num_beams=4 are left out"):
        second = vlm.save(model, processor, tmp_path / "second")
    assert (processor.tokenizer.padding_side, model.generation_config.num_beams) == ("right", 4)
    names = sorted(path.name for path in first.iterdir() if path.suffix in (".json", ".jinja", ".safetensors"))
    for name in names:
        if name != "aced_vlm.json":  # holds the digest of the card, which holds the folder's name
            assert (first / name).read_bytes() == (second / name).read_bytes(), name
    tokenizer = json.loads((first / "tokenizer.json").read_text())
    assert (tokenizer["padding"], tokenizer["truncation"]) == (None, None)


# -- tokenizers of language models ------------------------------------------------------------------------------------


@pytest.mark.parametrize("begins", [True, False])
def test_tokenizers_with_settings_of_their_own_are_settled(tmp_path: Path, begins: bool) -> None:
    """A token behind every text, token types, cutting and fixed padding, another chat template."""
    words = right(language(tmp_path / "words", chatml=False))
    raw = Tokenizer.from_file(str(words / "tokenizer.json"))
    special = [("<unk>", 0), ("</s>", raw.token_to_id("</s>"))]
    raw.post_processor = TemplateProcessing(single="<unk> $A </s>" if begins else "$A </s>", special_tokens=special)
    raw.enable_truncation(6)
    raw.enable_padding(length=16)
    raw.save(str(words / "tokenizer.json"))
    path = words / "tokenizer_config.json"
    settings = {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"], "chat_template": "{{ 'own' }}"}
    settings |= {"bos_token": "<unk>"} if begins else {}
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    model, processor = vlm.build(student(tmp_path / "student"), words)
    folder = vlm.save(model, processor, tmp_path / "saved")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer(LONG).keys() == {"input_ids", "attention_mask"}
    assert tokenizer(LONG)["input_ids"] == [0] * begins + tokenizer(LONG, add_special_tokens=False)["input_ids"]
    assert len(tokenizer([SHORT, LONG], padding=True)["input_ids"][0]) < 20
    assert tokenizer.chat_template == AutoProcessor.from_pretrained(folder).chat_template == processor.chat_template
    answers = vlm.answer(model, processor, COLOURS[:2], [SHORT, LONG], 4)
    assert answers == [
        vlm.answer(model, processor, [p], [q], 4)[0] for p, q in zip(COLOURS, (SHORT, LONG), strict=False)
    ]
    same(in_a_fresh_process(tmp_path, [str(folder)])[str(folder)], answers)
    ids, _ = encode(samples(1)[0], processor, 9)
    assert ids[:1] == [0] or not begins


def test_a_tokenizer_that_is_read_back_otherwise_is_refused_before_training(tmp_path: Path) -> None:
    model, processor = vlm.build(student(tmp_path / "student"), language(tmp_path / "words"))

    class Lossy(type(processor.tokenizer)):  # type: ignore[misc]
        def save_pretrained(self, folder: Any, **options: Any) -> Any:
            done = super().save_pretrained(folder, **options)
            path = Path(folder) / "tokenizer.json"
            path.write_text(path.read_text().replace('"what"', '"whit"'))
            return done

    Lossy.__name__ = type(processor.tokenizer).__name__
    processor.tokenizer.__class__ = Lossy
    with pytest.raises(ModelError, match="cannot save the model: its vocabulary, read back, is another"):
        vlm.tune(model, processor, [vlm.Sample("s", (("it ?", "red"),))], config(), directory=tmp_path / "run")
    assert not list((tmp_path / "run").rglob("*.safetensors"))


# -- generation settings ----------------------------------------------------------------------------------------------

ODD = [
    {"temperature": 0.9, "top_p": 0.6},  # Vicuna's
    {"early_stopping": True},
    {"early_stopping": "sometimes"},
    {"num_beams": 4, "early_stopping": True, "length_penalty": 2.0},
    {"return_dict_in_generate": True, "output_scores": True},
    {"stop_strings": ["."]},
    {"penalty_alpha": 0.6, "top_k": 4},
    {"prompt_lookup_num_tokens": 3},
    {"guidance_scale": 3.0},
    {"dola_layers": "low"},
    {"cache_implementation": "none of them"},
    {"use_cache": False, "cache_implementation": "static"},
    {"max_new_tokens": -5},
    {"min_length": 300, "max_time": 1e-9},
    {"bad_words_ids": [], "eos_token_id": "</s>", "pad_token_id": -1},
    {"token_healing": True, "watermarking_config": {"bias": 1}, "compile_config": {"mode": "x"}},
]


WHERE = [("generation_config.json", number) for number in range(len(ODD))]
WHERE += [("config.json", number) for number in (0, 3, 5, 7, 9)]


@pytest.mark.parametrize(("where", "number"), WHERE, ids=lambda value: str(value))
def test_generation_settings_are_repaired_with_a_warning(eyes: Path, tmp_path: Path, where: str, number: int) -> None:
    given = ODD[number]
    words = language(tmp_path / "words")
    (words / "generation_config.json").unlink()
    path = words / where
    path.write_text(json.dumps((json.loads(path.read_text()) if path.is_file() else {}) | given))
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        model, processor = vlm.build(eyes, words)
    told = [str(one.message) for one in heard if "are left out: answers are decoded greedily" in str(one.message)]
    silent = {"use_cache", "cache_implementation", "max_new_tokens", "bad_words_ids"}
    assert bool(told) is bool(given.keys() - silent)
    assert all(name in told[0] for name in given.keys() - silent)
    answers = vlm.answer(model, processor, COLOURS[:2], [SHORT, LONG], 3)
    assert "".join(vlm.stream_answer(model, processor, COLOURS[0], SHORT, 3)) == answers[0]
    folder = vlm.save(model, processor, tmp_path / "saved")
    saved = GenerationConfig.from_pretrained(folder)
    saved.validate(strict=True)
    assert saved.to_diff_dict().keys() - {"transformers_version", "do_sample"} == {
        "eos_token_id",
        "pad_token_id",
        "suppress_tokens",
    }
    assert vlm.answer(*vlm.load(folder), COLOURS[:2], [SHORT, LONG], 3) == answers


def test_settings_that_shape_greedy_answers_are_kept(tmp_path: Path) -> None:
    """Qwen's: what it samples with is expected, and nothing is said of it."""
    words = language(tmp_path / "words")
    given = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "eos_token_id": [1, 2]}
    kept = {"repetition_penalty": 1.05, "no_repeat_ngram_size": 3, "suppress_tokens": [7], "bad_words_ids": [[8]]}
    (words / "generation_config.json").write_text(json.dumps(given | kept))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*left out.*")
        model, processor = vlm.build(student(tmp_path / "student"), words)
    found = GenerationConfig.from_pretrained(vlm.save(model, processor, tmp_path / "saved"))
    assert {name: getattr(found, name) for name in kept} == kept | {"suppress_tokens": [7, model.config.image_token_id]}
    assert (found.do_sample, found.temperature, found.eos_token_id) == (False, None, 1)


def test_folders_of_others_with_odd_settings_are_loaded_tuned_and_saved(tmp_path: Path) -> None:
    """In both files, as old versions of transformers and LLaVA-1.5 wrote them."""
    model, processor = vlm.build(student(tmp_path / "student"), language(tmp_path / "words"))
    folder = vlm.save(model, processor, tmp_path / "theirs")
    (folder / "aced_vlm.json").unlink()
    for name in ("generation_config.json", "config.json"):
        content = json.loads((folder / name).read_text()) | {"temperature": 0.2, "do_sample": False, "top_p": 0.5}
        (folder / name).write_text(json.dumps(content))
    with pytest.warns(UserWarning, match="temperature=0.2, top_p=0.5 are left out"):
        model, processor = vlm.load(folder)
    plan = vlm.TuneConfig(stages=[vlm.Align(steps=1)])
    tuned = vlm.tune(model, processor, samples(1), plan, directory=tmp_path / "run").model
    saved = vlm.save(tuned, processor, tmp_path / "saved")
    for name in ("generation_config.json", "config.json"):
        assert not {"temperature", "top_p"} & json.loads((saved / name).read_text()).keys()
    AutoModelForImageTextToText.from_pretrained(saved)
    # opened by transformers alone, settings and all
    plain = AutoModelForImageTextToText.from_pretrained(folder)
    assert vlm.answer(plain, processor, COLOURS[:1], [SHORT], 3)
    plain.generation_config.num_beams = 3
    with pytest.warns(UserWarning, match="left out"):
        vlm.save(plain, processor, tmp_path / "again")


# -- before training --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["config", "processor", "template"])
def test_a_model_that_cannot_be_saved_is_not_trained(tmp_path: Path, fault: str) -> None:
    model, processor = vlm.build(student(tmp_path / "student"), language(tmp_path / "words"))
    if fault == "config":
        model.config.odd = object()
    elif fault == "processor":
        processor.image_processor.odd = object()
    else:
        processor.chat_template = {"default": processor.chat_template, "../../odd": "x"}
    plan = vlm.TuneConfig(stages=[vlm.Align(steps=1)])
    heard: list[Any] = []
    with pytest.raises(ModelError, match=r"transformers cannot save the model.*field: model"):
        vlm.tune(model, processor, samples(1), plan, directory=tmp_path / "run", callbacks=[heard.append])
    assert heard == []
    with pytest.raises(ModelError, match="transformers cannot save the model"):
        vlm.save(model, processor, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    assert not (tmp_path / "odd.jinja").exists()


def test_adapters_that_have_no_place_are_refused_before_the_projector_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = vlm.build(student(tmp_path / "student"), language(tmp_path / "words", family="gpt2"))
    heard: list[Any] = []
    plan = config()
    with pytest.raises(UnsupportedError, match="a 'gpt2', has no layers of the names"):
        vlm.tune(model, processor, samples(1), plan, directory=tmp_path / "run", callbacks=[heard.append])
    assert heard == []
    model, processor = vlm.build(tmp_path / "student", language(tmp_path / "llama"))
    monkeypatch.setattr("peft.PeftModel.save_pretrained", lambda *_, **__: 1 / 0)
    with pytest.raises(ModelError, match="peft cannot save the adapter: division by zero"):
        vlm.tune(model, processor, samples(1), plan, directory=tmp_path / "run", callbacks=[heard.append])
    assert {event.stage for event in heard if event.name == "stage_started"} == {0}


def test_a_slow_tokenizer_without_a_padding_token_pads(tmp_path: Path) -> None:
    folder = language(tmp_path / "words", chatml=False)
    raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>").save_pretrained(folder)
    _, processor = vlm.build(student(tmp_path / "student"), folder)
    assert processor.tokenizer.pad_token == "</s>"
