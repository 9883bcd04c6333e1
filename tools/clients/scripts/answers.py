# SPDX-License-Identifier: Apache-2.0
"""What plain transformers code does with a vision-language model, shared by the scripts of transformers and peft."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from tools.clients.inside import Check


def answer_checks(folder: Path, artefact: str, how: str, load: Callable[[], tuple[Any, Any]]) -> Iterator[Check]:
    """Answers and logits, one question at a time and all in a batch.

    Args:
        folder: the artefacts.
        artefact: the model's folder.
        how: the classes that `load` uses.
        load: gives the model and its processor.
    """
    for compared, compute in (("answers", _answers), ("logits of the first token", _logits)):
        for together in (False, True):
            way = f"{how}, {'batch' if together else 'one by one'}"
            yield Check(artefact, compared, way, partial(compute, folder, load, together))


def _inputs(folder: Path, processor: Any, together: bool) -> Iterator[Any]:
    questions = json.loads((folder / "questions.json").read_text())["questions"]
    images = [Image.open(folder / f"pictures/colour{number}.png") for number in range(len(questions))]
    texts = []
    for question in questions:
        turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        texts.append(processor.apply_chat_template(turn, add_generation_prompt=True))
    if together:
        yield processor(images=images, text=texts, padding=True, return_tensors="pt")
    else:
        for image, text in zip(images, texts, strict=True):
            yield processor(images=[image], text=[text], return_tensors="pt")


def _answers(folder: Path, load: Callable[[], tuple[Any, Any]], together: bool) -> list[str]:
    model, processor = load()
    longest = json.loads((folder / "questions.json").read_text())["max_new_tokens"]
    answers: list[str] = []
    for inputs in _inputs(folder, processor, together):
        ids = model.generate(**inputs, max_new_tokens=longest, do_sample=False)
        texts = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        answers += [text.strip() for text in texts]
    return answers


@torch.no_grad()
def _logits(folder: Path, load: Callable[[], tuple[Any, Any]], together: bool) -> list[Any]:
    model, processor = load()
    logits: list[Any] = []
    for inputs in _inputs(folder, processor, together):
        options = {"max_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True, "do_sample": False}
        logits += model.generate(**inputs, **options).logits[0].tolist()
    return logits
