# SPDX-License-Identifier: Apache-2.0
"""Chat templates in which a turn may hold pictures, and in which the assistant's words are marked for the loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IMAGE = "<image>"

_CONTENT = (
    "{%- if message['content'] is string -%}{{- message['content'] -}}"
    "{%- else -%}{%- for part in message['content'] -%}"
    "{{- '<image>' if part['type'] == 'image' else part['text'] -}}"
    "{%- endfor -%}{%- endif -%}"
)

# ChatML without the default system prompt: it would cost more tokens than a short question and its answer.
_CHATML = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\n' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}" + _CONTENT + "{{- '<|im_end|>' -}}{%- endgeneration -%}"
    "{%- else -%}" + _CONTENT + "{{- '<|im_end|>' -}}{%- endif -%}"
    "{{- '\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)

_PLAIN = (
    "{%- for message in messages -%}"
    "{{- message['role'] | upper + ': ' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}" + _CONTENT + "{{- eos_token -}}{%- endgeneration -%}"
    "{%- else -%}" + _CONTENT + "{{- '\n' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'ASSISTANT: ' -}}{%- endif -%}"
)


def chat_template(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """The Jinja template for this tokenizer, and the token that ends an answer.

    ChatML where the vocabulary has its two marks, else `USER: ... ASSISTANT: ...` as LLaVA-1.5 writes it.
    """
    vocabulary = tokenizer.get_vocab()
    if "<|im_start|>" in vocabulary and "<|im_end|>" in vocabulary:
        return _CHATML, "<|im_end|>"
    return _PLAIN, str(tokenizer.eos_token)
