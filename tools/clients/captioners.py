# SPDX-License-Identifier: Apache-2.0
"""Vision-language models as `vlm.save` writes them, tuned for seconds, and their answers.

| path | what |
|---|---|
| vlm/llava, llava-apart | LLaVA, merged into one folder and with the adapter apart |
| vlm/right, right-apart | the same with a language model whose tokenizer pads right |
| vlm/aya, fastvlm | pixel shuffle, and a convolutional tower; merged |
| lmms | a task of lmms-eval |
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import vlm
from tools.clients.expected import Expectations

COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220)}
QUESTIONS = ("what colour is it ?", "is this red ?", "what is this ? is it red ? what colour ? what colour is it ?")
MAX_NEW_TOKENS = 4
_WORDS = "what colour is it this ? red green blue yes no a picture of user assistant system USER ASSISTANT :"
_TASK = """
task: colours
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.pictures
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  max_new_tokens: {tokens}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
metadata:
  - version: 0.0
"""
_UTILS = """from PIL import Image


def pictures(doc):
    return [Image.open(doc["image"]).convert("RGB")]
"""


def make(folder: Path, expected: Expectations) -> None:
    """Write the models and the task, and answer the questions."""
    for number, name in enumerate(COLOURS):
        _picture(name).save(folder / "pictures" / f"colour{number}.png")
    asked = {"questions": QUESTIONS, "max_new_tokens": MAX_NEW_TOKENS}
    (folder / "questions.json").write_text(json.dumps(asked), encoding="utf-8")
    students = folder / "students"
    for name, side in (("llava", None), ("right", "right")):
        model, processor = vlm.build(students / "clip", _language(folder / "language" / name, side))
        tuned = vlm.tune(model, processor, _samples(), _plan(), directory=folder / "runs" / name).model
        for where, merge in ((name, True), (f"{name}-apart", False)):
            vlm.save(tuned, processor, folder / "vlm" / where, merge=merge)
            _answers(expected, f"vlm/{where}", tuned, processor)
        if name == "llava":
            _lmms(folder / "lmms", expected, tuned, processor)
    language = folder / "language" / "llava"
    for name, student, kind in (("aya", "clip", "pixel_shuffle"), ("fastvlm", "timm", "mlp")):
        model, processor = vlm.build(students / student, language, vlm.Projector(kind=kind))
        vlm.save(model, processor, folder / "vlm" / name)
        _answers(expected, f"vlm/{name}", model, processor)


def _language(folder: Path, padding_side: str | None) -> Path:
    """A language model whose tokens are words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    marks = ["<|im_end|>", "<|im_start|>"]
    words = {word: index for index, word in enumerate(["<unk>", *marks, *_WORDS.split(), "\n"])}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    options: dict[str, Any] = {"unk_token": "<unk>", "eos_token": marks[0], "additional_special_tokens": marks[1:]}
    options |= {"padding_side": padding_side} if padding_side else {}
    PreTrainedTokenizerFast(tokenizer_object=raw, **options).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def _picture(colour: str, shade: int = 0) -> Image.Image:
    red, green, blue = COLOURS[colour]
    return Image.new("RGB", (32, 32), (red - shade, green, blue))


def _samples() -> list[vlm.Sample]:
    """Pictures of one colour, each with two questions."""
    out = []
    for name in COLOURS:
        for shade in range(2):
            images = (_picture(name, shade),)
            out.append(vlm.Sample(f"{name}{shade}", ((QUESTIONS[0], name),), images, kind="colour"))
            reply = "yes" if name == "red" else "no"
            out.append(vlm.Sample(f"{name}{shade}?", ((QUESTIONS[1], reply),), images, kind="yes_no"))
    return out


def _plan() -> vlm.TuneConfig:
    options: dict[str, Any] = {"batch_size": 6, "learning_rate": 1e-2}
    return vlm.TuneConfig(
        stages=[vlm.Align(steps=40, **options), vlm.Adapt(steps=60, lora=vlm.Lora(rank=4), **options)]
    )


def _answers(expected: Expectations, artefact: str, model: Any, processor: Any) -> None:
    """Answers and the logits of their first token, one question at a time: a batch must give the same."""
    images = [_picture(name) for name in COLOURS]
    answers = [
        vlm.answer(model, processor, [i], [q], MAX_NEW_TOKENS)[0] for i, q in zip(images, QUESTIONS, strict=True)
    ]
    logits = []
    for image, question in zip(images, QUESTIONS, strict=True):
        turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        text = processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        with torch.no_grad():
            logits.append(model(**processor(images=[image], text=[text], return_tensors="pt")).logits[0, -1].tolist())
    expected.add(artefact, "answers", answers, 0)
    expected.add(artefact, "logits of the first token", logits, 1e-4)


def _lmms(folder: Path, expected: Expectations, model: Any, processor: Any) -> None:
    """The samples as a task, some with a wrong answer, or equality would say little."""
    samples = _samples()
    samples += [replace(one, turns=((one.turns[0][0], "a picture"),)) for one in samples[:5]]
    folder.mkdir()
    rows = []
    for number, sample in enumerate(samples):
        path = folder / f"{number}.png"
        sample.images[0].save(path)  # type: ignore[union-attr]
        rows.append({"image": str(path), "question": sample.turns[0][0], "answer": sample.turns[0][1]})
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = _TASK.format(data=folder / "data.jsonl", tokens=MAX_NEW_TOKENS)
    (folder / "colours.yaml").write_text(task, encoding="utf-8")
    (folder / "utils.py").write_text(_UTILS, encoding="utf-8")
    scores = vlm.evaluate(model, processor, samples, blind=False, max_new_tokens=MAX_NEW_TOKENS)
    expected.add("vlm/llava", "exact match", scores.total.exact, 1e-6)
