# SPDX-License-Identifier: Apache-2.0
"""Small model folders for attacks: a student with a tokenizer and a text tower of transformers inside."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tiny import ARCHITECTURE

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "boat", "picture"]
BERT = {
    "model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 16, "vocab_size": len(WORDS), "max_position_embeddings": 16,
}  # fmt: skip


def tokenizer(folder: Path, **settings: Any) -> Path:
    """A tokenizer of eight words, with the settings in its tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    model = {"type": "WordLevel", "vocab": {word: row for row, word in enumerate(WORDS)}, "unk_token": "[UNK]"}
    definition = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None, "model": model,
    }  # fmt: skip
    write(folder / "tokenizer.json", definition)
    plain = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    write(folder / "tokenizer_config.json", plain | settings)
    return folder


def text_tower(folder: Path, **settings: Any) -> Path:
    """A BERT of one layer: its config.json, and a tokenizer."""
    tokenizer(folder)
    write(folder / "config.json", BERT | settings)
    return folder


def with_text(folder: Path) -> dict[str, Any]:
    """An architecture whose text tower is a BERT in `folder`."""
    names = dict.fromkeys(("hf_model_name", "hf_tokenizer_name"), str(text_tower(folder)))
    return ARCHITECTURE | {"text_cfg": names | {"context_length": 8}}


def write(path: Path, value: Any) -> None:
    """JSON at `path`."""
    path.write_text(json.dumps(value), encoding="utf-8")


def change(path: Path, **changes: Any) -> None:
    """Set fields of a JSON file; `a__b=1` sets b in a. The folder's manifest is removed, as an attacker does it."""
    value = json.loads(path.read_text(encoding="utf-8"))
    for name, new in changes.items():
        *outer, last = name.split("__")
        inner = value
        for key in outer:
            inner = inner.setdefault(key, {})
        inner[last] = new
    write(path, value)
    manifest = path.parent / "aced.json"
    manifest.unlink(missing_ok=True)


def files(folder: Path) -> dict[str, bytes | str]:
    """Every file and link below a folder, by relative name."""
    found: dict[str, bytes | str] = {}
    for directory, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = Path(directory, name)
            if path.is_symlink():
                found[str(path.relative_to(folder))] = f"-> {path.readlink()}"
            elif path.is_file():
                found[str(path.relative_to(folder))] = path.read_bytes()
    return found
