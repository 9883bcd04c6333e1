# SPDX-License-Identifier: Apache-2.0
"""List prose that is hard to read: `python -m tools.prose [PATH ...]`.

Looks at docstrings, comments and messages of Python files, and at the text of Markdown files. Lists idioms that readers
of other mother tongues stumble over, and sentences of more than 30 words. The exit status is 1 if there is one.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from aced_sdk.files import ReadError
from aced_sdk.files.reading import read_text

LONGEST = 30  # words of a sentence

# What readers stumble over, and what to write instead.
IDIOMS: dict[str, str] = {
    r"\b(?:is|are|was|were) told\b|\btells? (?:of|what|the|it|how|whether)\b|\btold of\b": "report, log, raise or say",
    r"\bstands?\b(?! for)": "is, contains",
    r"\bgo(?:es)? on\b|\bwent on\b": "continue, resume",
    r"\bbroken off\b": "interrupted",
    r"\broads?\b": "option, way",
    r"\bbears? (?:a|the|its) name\b": "is named",
    r"\beyes\b": "vision encoder",
    r"\bfor good\b": "permanently",
    r"\bfor ever\b": "endlessly, forever",
    r"\bwhat (?:\w+ ){1,5}says of\b": "say directly what it is",
    r"\bnothing to do but\b|\bwith nothing\b": "only",
    r"\bwhich is there already\b|\bis there already\b": "existing",
    r"\bby hand\b": "manually",
    r"\bas it stands\b|\bas they stand\b": "unchanged",
    r"\bof its own accord\b|\bby itself\b": "automatically",
    r"\bin words\b": "as text",
    r"\bin vain\b": "without success",
    r"\bsay what\b|\bsays what\b": "name the thing",
    r"\bcame after\b|\bwent before\b": "later, earlier",
    r"\bways of\b|'s ways\b": "behaviour",
    r"\bmend(?:s|ed|ing)?\b": "fix",
    r"\blies? (?:in|beside|under|at)\b|\blay (?:in|beside)\b": "is in, is next to",
    r"\bhere and there\b|\bthis and that\b": "name them",
    r"\bone's own\b|\btheir own kind\b": "name the owner",
    r"\bpart(?:s)? with\b|\bhand(?:s|ed)? over\b": "pass",
    r"\bhears?\b|\bheard\b": "called with, gets",
    r"\btold\b": "reported, logged, distinguished",
    r"\bwhere to\b": "output folder, output stream",
    r"\bcomes? on top\b|\bgo(?:es)? along\b": "without, besides, are saved",
    r"\bfor want of\b": "for lack of",
    r"\bis no (?:number|factor)\b": "is not a",
    r"\beven draws?\b|\bdrawn (?:evenly|alike)\b|\bevenly drawn\b": "uniform draws",
    r"\b(?:was|were) asked of\b": "cannot draw, needs",
    r"\bat hand\b|\ball the same\b": "available, still",
    r"\bwhatever (?:autocast|the input) says?\b": "is ignored",
    r"(?<!user )(?<!people )\bwho(?:ever)? (?:can|asks|wants|has)\b": "a user who, callers that",
}
_WORDS = {re.compile(pattern, re.IGNORECASE): instead for pattern, instead in IDIOMS.items()}
_SENTENCE = re.compile(r"(?<=[.!?:;])\s+|\n\s*\n|\n\s*(?=[-*|>#]|\d+\.\s|\w+:\s)")
_CODE = re.compile(r"`[^`\n]*`|\[([^\]]*)\]\([^)]*\)|<[^>]*>|https?://\S+")
_FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
_MESSAGES = {"cause", "remedy", "description", "help"}


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """Line number and text of each docstring, comment and message of a Python file, or of a Markdown file."""
    text = read_text(path)
    if path.suffix == ".md":
        blank = _FENCE.sub(lambda found: "\n" * found[0].count("\n"), text)
        at = 1
        for block in re.split(r"(\n\s*\n)", blank):
            if block.strip():
                yield at + len(block) - len(block.lstrip()), block
            at += block.count("\n")
        return
    yield from _comments(text)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield node.body[0].lineno, docstring
        elif isinstance(node, ast.Call):
            for value in [*node.args[:1], *(word.value for word in node.keywords if word.arg in _MESSAGES)]:
                if (message := _message(value)) and " " in message:
                    yield value.lineno, message


def _comments(text: str) -> Iterator[tuple[int, str]]:
    """Comments. Lines of comments that follow one another are one; comments behind code are one each."""
    held, first, last = list[str](), 0, 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type != tokenize.COMMENT:
            continue
        behind = bool(token.line[: token.start[1]].strip())
        if held and (behind or token.start[0] > last + 1):
            yield first, " ".join(held)
            held = []
        if behind:
            yield token.start[0], token.string.lstrip("# ")
            continue
        first, last = (token.start[0] if not held else first), token.start[0]
        held.append(token.string.lstrip("# "))
    if held:
        yield first, " ".join(held)


def _message(node: ast.expr) -> str:
    """The text of a string or an f-string; each value in it is one word."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(_message(part) if isinstance(part, ast.Constant) else "X" for part in parts)
        case ast.BinOp(left=left, right=right):
            return _message(left) + _message(right)
    return ""


def findings(path: Path) -> Iterator[tuple[int, str]]:
    """Line number and fault."""
    for line, text in prose(path):
        plain = _CODE.sub(lambda found: found[1] or "X", text)
        for pattern, instead in _WORDS.items():
            for found in pattern.finditer(plain):
                yield line + plain[: found.start()].count("\n"), f"'{found[0]}': write {instead}"
        for sentence in _SENTENCE.split(plain):
            if sentence.lstrip().startswith("|"):
                continue  # a table
            words = len(re.findall(r"[A-Za-z][\w'-]*", sentence))
            if words > LONGEST:
                start = line + plain[: max(plain.find(sentence), 0)].count("\n")
                yield start, f"{words} words: {' '.join(sentence.split())[:60]}..."


def main() -> int:
    """Print all findings, and how many there are by package."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("paths", nargs="*", type=Path, default=[Path("aced_sdk")])
    parser.add_argument("--count", action="store_true", help="print counts only")
    asked = parser.parse_args()
    counts = Counter[str]()
    for given in asked.paths:
        files = [given] if given.is_file() else sorted([*given.rglob("*.py"), *given.rglob("*.md")])
        for path in files:
            try:
                found = list(findings(path))
            except (ReadError, SyntaxError, tokenize.TokenError) as error:
                parser.error(f"{path}: {error}")
            for line, fault in found:
                counts[path.parts[0]] += 1
                if not asked.count:
                    print(f"{path}:{line}: {fault}")
    print(", ".join(f"{name} {count}" for name, count in counts.items()) or "no findings", file=sys.stderr)
    return int(bool(counts))


if __name__ == "__main__":
    sys.exit(main())
