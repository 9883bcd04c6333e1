# SPDX-License-Identifier: Apache-2.0
"""Small vision-language models, and ways to spoil a copy of their folders."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

import vlm
from aced_sdk.errors import AcedError
from tests.security.sandbox import run

sys.path.insert(0, str(Path(__file__).parents[1] / "contract"))
from test_vlm import config, language, samples, student

MANIFEST = "aced_vlm.json"
HUGE = 10**9


def clip(folder: Path) -> Path:
    """A tower of transformers."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=16, patch_size=8)).save_pretrained(folder)
    square = {"height": 16, "width": 16}
    CLIPImageProcessor(size=square, crop_size=square).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders: a tower, a language model, a model in one folder, and one with its adapter apart."""
    folder = tmp_path_factory.mktemp("vlm")
    model, processor = vlm.build(student(folder / "student"), language(folder / "language"))
    tuned = vlm.tune(model, processor, samples(1), config(align=1, adapt=1), directory=folder / "run")
    return {
        "vision": clip(folder / "clip"),
        "language": folder / "language",
        "merged": vlm.save(tuned.model, processor, folder / "merged"),
        "apart": vlm.save(tuned.model, processor, folder / "apart", merge=False),
    }


def foreign(source: Path, target: Path) -> Path:
    """A copy as another program would have written it: without digests."""
    shutil.copytree(source, target)
    (target / MANIFEST).unlink(missing_ok=True)
    return target


def edit(path: Path, where: str, value: Any) -> None:
    """Set a value in a JSON file; `where` are its keys, with dots."""
    content = json.loads(path.read_text()) if path.is_file() else {}
    *above, last = where.split(".")
    part = content
    for key in above:
        part = part.setdefault(key, {})
    part[last] = value
    path.write_text(json.dumps(content))


def open_part(kind: str, folder: Path, parts: dict[str, Path]) -> None:
    """Open a folder as what it is, with a user who answers every question with yes."""
    sys.stdin = io.StringIO("y\n" * 20)
    if kind in ("merged", "apart"):
        model, processor = vlm.load(folder)
        vlm.answer(model, processor, [samples(1)[0].images[0]], ["what colour is it ?"], 2)
    else:
        vlm.build(**({name: parts[name] for name in ("vision", "language")} | {kind: folder}))


def open_all(folders: list[tuple[str, Path]], parts: dict[str, Path]) -> list[str]:
    """The texts of the errors that opening each folder raises; empty where it opens. Other errors than this project's
    are raised."""
    texts = []
    for kind, folder in folders:
        try:
            open_part(kind, folder, parts)
            texts.append("")
        except AcedError as error:
            texts.append(str(error))
        except Exception as error:
            raise RuntimeError(f"{folder} raises {type(error).__name__}") from error
    return texts


def refused(folders: list[tuple[str, Path]], parts: dict[str, Path], *words: str, mib: float = 600) -> None:
    """Open folders in one child process: each must be refused with these words, within so much memory."""
    outcome = run(open_all, folders, parts, seconds=40, mib=1024)
    for (_, folder), text in zip(folders, outcome.returned(), strict=True):
        assert text, f"{folder.name} opens"
        assert all(word in text for word in words), f"{words} not in: {text}"
    assert outcome.mib < mib, f"{outcome.mib} MiB"
