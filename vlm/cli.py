# SPDX-License-Identifier: Apache-2.0
"""The `aced caption` and `aced answer` commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from aced_sdk.files import printable

_Model = Annotated[Path, typer.Argument(help="folder that vlm.save wrote, or any LLaVA folder of transformers")]
_Images = Annotated[list[Path], typer.Argument(help="picture files")]
_Length = Annotated[int, typer.Option(min=1, help="longest text, tokens")]


def register(app: typer.Typer) -> None:
    """Add the commands of this package to `app`."""
    app.command("caption")(caption)
    app.command("answer")(answer)


def caption(
    model: _Model,
    images: _Images,
    prompt: Annotated[str | None, typer.Option(help="what to ask")] = None,
    max_new_tokens: _Length = 24,
) -> None:
    """Say what is on each picture; one JSON object a line."""
    import vlm
    from vlm.data.chat import CAPTION_PROMPT

    loaded, processor = vlm.load(model)
    for path, text in zip(
        images, vlm.caption(loaded, processor, images, prompt or CAPTION_PROMPT, max_new_tokens), strict=True
    ):
        typer.echo(_line({"image": str(path), "caption": text}))


def answer(
    model: _Model,
    question: Annotated[str, typer.Argument(help="what to ask about each picture")],
    images: _Images,
    max_new_tokens: _Length = 24,
    stream: Annotated[bool, typer.Option("--stream", help="show the words as they come, as plain text")] = False,
) -> None:
    """Answer a question about each picture; one JSON object a line."""
    import vlm

    loaded, processor = vlm.load(model)
    if stream:
        for path in images:
            for piece in vlm.stream_answer(loaded, processor, path, question, max_new_tokens):
                typer.echo(printable(piece, len(piece)), nl=False)
            typer.echo()
        return
    for path, text in zip(
        images, vlm.answer(loaded, processor, images, [question] * len(images), max_new_tokens), strict=True
    ):
        typer.echo(_line({"image": str(path), "question": question, "answer": text}))


def _line(value: dict[str, str]) -> str:
    """JSON without control characters, which a terminal would obey."""
    text = json.dumps(value, ensure_ascii=False)
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)
