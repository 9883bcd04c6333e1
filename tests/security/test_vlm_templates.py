# SPDX-License-Identifier: Apache-2.0
"""Chat templates of a folder: rendered apart, within bounds on time and memory, whatever the question is."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest

import vlm
from aced_sdk.errors import AcedError
from tests.security.sandbox import run
from tests.security.vlm_parts import foreign, parts, refused, samples
from vlm.data import templates
from vlm.data.chat import OWN_TEMPLATES
from vlm.data.rows import encode, messages
from vlm.data.templates import _worker, prompt_text

__all__ = ["parts"]
Parts = dict[str, Path]
PICTURE = samples(1)[0].images[0]
HONEST = (
    "{%- for message in messages -%}{{- '<|im_start|>' + message.role + '\n' -}}"
    "{%- if message.role == 'assistant' -%}{%- generation -%}{{- message.content[0].text -}}{{- '<|im_end|>' -}}"
    "{%- endgeneration -%}{%- else -%}{%- for part in message.content -%}"
    "{{- '<image>' if part.type == 'image' else part.text -}}{%- endfor -%}{{- '<|im_end|>' -}}{%- endif -%}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
HOSTILE = {
    "loops for one question": "{% if 'zebra' in messages[0].content[1].text %}" + LOOPS + "{% endif %}" + HONEST,
    "macro": "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "repetition": "{{ 'a' * 10**11 }}",
    "repetition by parts": "{% set ns = namespace(x='a' * 10**4) %}{% for i in range(30) %}{% set ns.x = ns.x ~ ns.x %}"
    "{% endfor %}{{ ns.x }}",
    "lists of lists": "{% set ns = namespace(x=['a']) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}"
    "{% endfor %}{{ ns.x }}",
    "numbers": "{{ 7 ** (7 ** 9) }}",
    "format": "{{ '%999999999999d' % 1 }}",
    "center": "{{ 'a' | center(10**11) }}",
    "long text": "{{ 'a' * (20 * 2**20) }}",
    "deep": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "files": "{% include '/etc/passwd' %}",
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "no template": "{% for %}",
}


def _ask_all(folder: Path, seconds: float) -> dict[str, str]:
    """The text of each template's error, in a question and in tuning."""
    templates._SECONDS = seconds
    model, processor = vlm.load(folder)
    texts = {}
    for name, template in HOSTILE.items():
        processor.chat_template = template
        try:
            vlm.answer(model, processor, [PICTURE], ["is a zebra in it ?"], 2)
            texts[name] = ""
        except AcedError as error:
            texts[name] = str(error)
    processor.chat_template = "{% generation %}{% endgeneration %}" + LOOPS
    try:
        encode(samples(1)[0], processor, 9)
    except AcedError as error:
        texts["tuning"] = str(error)
    return texts


def test_hostile_templates_end(parts: Parts) -> None:
    outcome = run(_ask_all, parts["merged"], 0.5, seconds=60)
    texts = outcome.returned()
    assert "cannot be written by the processor's chat template: it takes too much time" in texts.pop("tuning")
    assert texts.keys() == HOSTILE.keys()
    for name, text in texts.items():
        assert "what the processor prepares does not fit the model" in text, name
    assert outcome.mib < 300


def test_a_template_of_a_folder_is_rendered_apart(parts: Parts, tmp_path: Path) -> None:
    folder = foreign(parts["merged"], tmp_path / "evil")
    (folder / "chat_template.jinja").write_text("{{ 'a' * 10**11 }}")
    refused([("merged", folder)], parts, "what the processor prepares does not fit the model")
    (folder / "chat_template.jinja").write_text("a" * 2**21)
    refused([("merged", folder)], parts, "holds no model that is whole")


@pytest.fixture(scope="module")
def loaded(parts: Parts) -> Any:
    return vlm.load(parts["merged"])


def test_an_honest_template_is_rendered_as_transformers_does(loaded: Any) -> None:
    _, processor = loaded
    sample = vlm.Sample("k", (("what is  it ?\n", "red"), ("<b> {{ 1 }} is it ?", "no no")), (PICTURE,))
    own = processor.chat_template
    assert own in OWN_TEMPLATES
    try:
        processor.chat_template = HONEST
        expected = processor.apply_chat_template(messages(sample), add_generation_prompt=True, tokenize=False)
        assert prompt_text(processor, messages(sample)) == expected
        apart = encode(sample, processor, 9)
        plain = processor.tokenizer.apply_chat_template(
            messages(sample), chat_template=HONEST, return_dict=True, return_assistant_tokens_mask=True
        )
    finally:
        processor.chat_template = own
    assert sum(target != -100 for target in apart[1]) == sum(plain["assistant_masks"])
    assert apart[0] == [i for token in plain["input_ids"] for i in [token] * (9 if token == 24 else 1)][: len(apart[0])]


def test_threads_and_forks_share_no_answers(loaded: Any) -> None:
    _, processor = loaded
    own, wrong = processor.chat_template, []

    def ask(number: int) -> None:
        for step in range(20):
            text = f"{number} {step}"
            if prompt_text(processor, [{"role": "user", "content": text}]) != f"said {text}":
                wrong.append(text)

    try:
        processor.chat_template = "said {{ messages[0].content }}"
        ask(0)
        threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if child := os.fork():
            ask(5)
            assert os.waitpid(child, 0)[1] == 0
        else:
            ask(6)
            os._exit(len(wrong))
    finally:
        processor.chat_template = own
    assert not wrong


def test_the_process_that_renders_ends_with_this_one(loaded: Any) -> None:
    _, processor = loaded
    own = processor.chat_template
    try:
        processor.chat_template = "said {{ messages[0].content }}"
        prompt_text(processor, [{"role": "user", "content": "a"}])
    finally:
        processor.chat_template = own
    assert _worker._process is not None
    process = _worker._process
    _worker.stop()
    assert process.poll() is not None
