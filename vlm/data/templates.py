# SPDX-License-Identifier: Apache-2.0
"""Chat templates from elsewhere are rendered in a process of their own, with bounds on time and memory.

transformers renders them in Jinja's sandbox, which keeps them from files and code but not from endless loops or
`'a' * 10**11`. A check of the template's text cannot find these, since loops may depend on the question. Templates that
this package wrote are rendered in this process.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from aced_sdk.files import printable
from vlm.data.chat import OWN_TEMPLATES

if TYPE_CHECKING:
    from transformers import LlavaProcessor

_SECONDS = 3.0  # of processor time for one conversation
_LONGEST = 2**24  # bytes of a rendered conversation
_OWN_WORDS, _TIMES = 2**16, 4  # characters that a template may add, and how often it may repeat the conversation
# Gives transformers a conversation that is rendered already, in pieces with and without {% generation %} around them.
_PIECES = (
    "{%- for piece in pieces -%}{%- if piece.learned -%}"
    "{%- generation -%}{{- piece.text -}}{%- endgeneration -%}"
    "{%- else -%}{{- piece.text -}}{%- endif -%}{%- endfor -%}"
)


def prompt_text(processor: LlavaProcessor, messages: list[dict[str, Any]]) -> str:
    """A conversation as text that the assistant's answer follows.

    Raises:
        ValueError: if the template fails, or takes too much time or memory.
        jinja2.TemplateError: if a template of this package fails.
    """
    template = _template(processor)
    if template in OWN_TEMPLATES:
        return str(processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    return str(_worker.render(processor, template, messages, add_generation_prompt=True)["text"])


def encoded(processor: LlavaProcessor, messages: list[dict[str, Any]]) -> Any:
    """Token ids of a conversation, and `assistant_masks`, 1 where the assistant speaks.

    Raises:
        ValueError, jinja2.TemplateError: as `prompt_text`.
    """
    template, pieces = _template(processor), None
    if template not in OWN_TEMPLATES:
        out = _worker.render(processor, template, messages, return_assistant_tokens_mask=True)
        pieces, done = [], 0
        for start, end in out["learned"]:
            if start < done:  # inside of one that came before
                continue
            pieces += [{"text": out["text"][done:start]}, {"text": out["text"][start:end], "learned": True}]
            done = end
        pieces.append({"text": out["text"][done:]})
        template = _PIECES
    return processor.tokenizer.apply_chat_template(
        messages,
        chat_template=template,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        **({"pieces": pieces} if pieces else {}),
    )


def _template(processor: LlavaProcessor) -> str:
    chosen: Any = processor.chat_template or processor.tokenizer.chat_template
    chosen = chosen.get("default") if isinstance(chosen, dict) else chosen
    if not isinstance(chosen, str):
        raise ValueError("the processor has no chat template")
    return chosen


class _Worker:
    """The process, started by the first conversation, and again after one that it did not survive."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget the process; a fork of this one starts its own."""
        self._lock = Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None

    def render(self, processor: LlavaProcessor, template: str, messages: Any, **options: Any) -> dict[str, Any]:
        """The text, and under `learned` the spans of characters that the assistant speaks."""
        conversation = [{key: value for key, value in turn.items() if value is not None} for turn in messages]
        request = {"conversations": [conversation], "chat_template": template, **options}
        with self._lock:
            try:
                pipe = self._pipe or self._start()
                pipe.send_bytes(json.dumps(processor.tokenizer.special_tokens_map | request).encode())
                answer: dict[str, Any] = json.loads(pipe.recv_bytes(_LONGEST))
                if len(answer.get("text", "")) > _OWN_WORDS + _TIMES * len(json.dumps(conversation)):
                    answer = {"error": "its text is much longer than the conversation"}
            except (OSError, EOFError):
                self.stop()
                answer = {"error": "it takes too much time or memory, or its text is too long"}
        if "error" in answer:
            raise ValueError(printable(answer["error"], 1000))
        return answer

    def _start(self) -> Connection:
        self._pipe, theirs = Pipe()
        with theirs:
            script = str(Path(__file__).with_name("template_worker.py"))
            self._process = subprocess.Popen(
                [sys.executable, "-P", script, str(theirs.fileno()), str(_SECONDS)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            )
        return self._pipe

    def stop(self) -> None:
        """End the process."""
        if self._pipe is not None:
            self._pipe.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._pipe = self._process = None


_worker = _Worker()
atexit.register(_worker.stop)
os.register_at_fork(after_in_child=_worker.reset)
