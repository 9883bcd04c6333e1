# SPDX-License-Identifier: Apache-2.0
"""Chat templates in which a turn may hold pictures, and in which the assistant's words are marked for the loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aced_sdk.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IMAGE = "<image>"
CAPTION_PROMPT = "What is this?"

_CONTENT = (
    "{%- if message['content'] is string -%}{{- message['content'] -}}"
    "{%- else -%}{%- for part in message['content'] -%}"
    "{{- '<image>' if part['type'] == 'image' else part['text'] -}}"
    "{%- endfor -%}{%- endif -%}"
)

# Turns as families of language models were taught them: what opens one (ROLE is who speaks), what ends it, what is
# between two, what the assistant is called, and whether there are system turns. No default system prompt: it would cost
# more tokens than a short question and its answer.
_TURNS = {
    "ChatML": ("<|im_start|>ROLE\n", "<|im_end|>", "\n", "assistant", True),
    "Llama 3": ("<|start_header_id|>ROLE<|end_header_id|>\n\n", "<|eot_id|>", "", "assistant", True),
    "Gemma": ("<start_of_turn>ROLE\n", "<end_of_turn>", "\n", "model", False),
}

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

    ChatML, Llama 3's turns or Gemma's where the vocabulary has the marks, else `USER: ... ASSISTANT: ...` as LLaVA-1.5
    writes it.

    Raises:
        ModelError: if no token of the tokenizer can end an answer.
    """
    vocabulary = tokenizer.get_vocab()
    for opening, end, after, assistant, systems in _TURNS.values():
        if opening.split("ROLE")[0] in vocabulary and end in vocabulary:
            return _template(opening, end, after, assistant, systems), end
    if tokenizer.eos_token is None:
        raise ModelError(
            "the tokenizer has no token that ends a text, so that answers would never end",
            remedy="set eos_token in its tokenizer_config.json",
            field="language",
        )
    return _PLAIN, str(tokenizer.eos_token)


def _template(opening: str, end: str, after: str, assistant: str, systems: bool = True) -> str:
    """The template of a family; without `systems`, a system prompt becomes the start of the first question."""
    before, behind = opening.split("ROLE")
    other = f"{{{{- '{before}' + message['role'] + '{behind}' -}}}}" + _CONTENT + f"{{{{- '{end}' -}}}}"
    gap = f"{{{{- '{after}' -}}}}"
    if not systems:
        head = f"{{{{- '{before}user{behind}' -}}}}"
        other = "{%- if loop.index0 != 1 or messages[0]['role'] != 'system' -%}" + head + "{%- endif -%}" + _CONTENT
        other += "{%- if message['role'] == 'system' -%}{{- '\n\n' -}}"
        other += f"{{%- else -%}}{{{{- '{end}' -}}}}{{%- endif -%}}"
        gap = "{%- if message['role'] != 'system' -%}" + gap + "{%- endif -%}"
    return (
        "{%- for message in messages -%}"
        "{%- if message['role'] == 'assistant' -%}"
        f"{{{{- '{before}{assistant}{behind}' -}}}}"
        "{%- generation -%}" + _CONTENT + f"{{{{- '{end}' -}}}}" + "{%- endgeneration -%}"
        "{%- else -%}" + other + "{%- endif -%}" + gap + "{%- endfor -%}"
        f"{{%- if add_generation_prompt -%}}{{{{- '{before}{assistant}{behind}' -}}}}{{%- endif -%}}"
    )


OWN_TEMPLATES = frozenset({_PLAIN, *(_template(*turn) for turn in _TURNS.values())})
