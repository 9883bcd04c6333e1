# SPDX-License-Identifier: Apache-2.0
"""Names from files reach the terminal without control characters and without markup."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from aced_sdk import cli
from tests.security.sandbox import run


def _command(*words: str) -> tuple[str, int]:
    import contextlib
    import io
    import sys

    sys.argv, heard = ["aced", *words], io.StringIO()
    with contextlib.redirect_stderr(heard):
        try:
            cli.main()
        except SystemExit as end:
            return heard.getvalue(), int(end.code or 0)
    return heard.getvalue(), 0


@pytest.mark.parametrize(
    "words", [("plan", "NAME.yaml"), ("report", "NAME"), ("resume", "NAME"), ("cache", "m", "NAME")]
)
def test_no_control_characters_reach_the_terminal(words: tuple[str, ...]) -> None:
    name = "\x1b]0;owned\x07\x1b[2J\u202e\udcff"
    text, code = run(_command, *(word.replace("NAME", name) for word in words)).returned()
    assert code == 1
    assert "Remedy:" in text
    assert all(c.isprintable() or c == "\n" for c in text)


@pytest.mark.parametrize("field", ["\x1b[2J", "[red]x[/]"])
def test_names_of_fields_are_shown_as_they_are_written(tmp_path: Path, field: str) -> None:
    values = {"student": {"architecture": "a"}, "data": {"shards": ["a"]}, "directory": "a", "schedule": {"steps": 3}}
    (tmp_path / "config.yaml").write_text(json.dumps(values | {field: 1}))
    text, _ = run(_command, "plan", str(tmp_path / "config.yaml")).returned()
    assert ascii(field)[1:-1] in text


def test_the_title_of_a_bar_is_no_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    from aced_sdk.reporting import Progress

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.delenv("RANK", raising=False)
    stream = Terminal()
    with Progress("distil [red]run[/] [/x]\x1b[2J\nnext", 4, stream=stream) as bar:
        bar.advance(1, pair="[bold]\x1b]0;x\x07")
    shown = stream.getvalue()
    assert "distil [red]run[/] [/x]\\x1b[2J\\nnext" in shown
    assert "pair [bold]\\x1b]0;x\\x07" in shown
