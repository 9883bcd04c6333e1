# SPDX-License-Identifier: Apache-2.0
"""The card of a saved model, folders that are saved over or uploaded, and calls of libraries that can run code."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import yaml

import vlm
from aced_sdk.errors import ModelError
from tests.security.sandbox import run
from tests.security.vlm_parts import edit, foreign, open_all, parts
from vlm.model.card import card
from vlm.model.hub import downloaded
from vlm.scores import KindScore, Scores

__all__ = ["parts"]
Parts = dict[str, Path]
EVIL = "mit\n---\n\n# Owned\n| a | b |\n|---|---|\n```\n<script>alert(1)</script>\n`x`"


@pytest.fixture(scope="module")
def model(parts: Parts) -> Any:
    return vlm.load(parts["merged"])


def scores(kind: str, metric: str) -> Scores:
    one = KindScore(1, 0.5, 0.5, 0.5, {metric: 0.5}, {metric: 0.5})
    return Scores(one, {kind: one}, [])


def test_texts_add_no_front_matter_headings_or_rows(model: Any) -> None:
    plain = card(model[0], "name", True, scores("colour", "vqa"), "mit", "Words.")
    evil = card(model[0], EVIL, True, scores(EVIL, EVIL), EVIL, EVIL)
    for mark in (r"^---$", r"^#", r"^\|", r"^```", r"(?m)^ *<"):
        assert len(re.findall(mark, evil, re.MULTILINE)) == len(re.findall(mark, plain, re.MULTILINE)), mark
    assert list(yaml.safe_load(evil.split("---\n")[1])) == ["library_name", "pipeline_tag", "license"]
    for row in re.findall(r"^\|.*$", evil, re.MULTILINE):
        assert len(re.split(r"(?<!\\)\|", row)) in (4, 6)  # two or four cells
    (code,) = re.findall(r"```python\n(.*?)```", evil, re.DOTALL)
    body = evil.split("---\n", 2)[2]
    assert "<script" not in body.replace(code, "").replace(r"\<script", "")
    names = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
    assert EVIL in names


def test_texts_of_a_foreign_config_are_escaped(model: Any) -> None:
    base = model[0]
    tower = SimpleNamespace(architecture=EVIL, model_type=EVIL)
    text = SimpleNamespace(model_type=EVIL, num_hidden_layers=1, hidden_size=1)
    other = SimpleNamespace(
        config=SimpleNamespace(vision_config=tower, text_config=text, image_seq_length=1), model=base.model
    )
    assert len(re.findall(r"^\|", card(other, "n", True, None, None, None), re.MULTILINE)) == 5


def test_honest_markdown_stays(model: Any) -> None:
    about = "Tuned on **six** colours.\n\n- [data](https://a.b)\n- <https://c.d>\n\nTwo `lines` | of text."
    assert about in card(model[0], "n", True, None, None, about)


# -- folders ----------------------------------------------------------------------------------------------------------


def test_saving_follows_no_planted_links(model: Any, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "config.json").write_text("mine")
    (tmp_path / "model").symlink_to("elsewhere")
    vlm.save(*model, tmp_path / "model")
    assert (tmp_path / "elsewhere" / "config.json").read_text() == "mine"
    assert not (tmp_path / "model").is_symlink()
    (tmp_path / "secret").write_text("key")
    (tmp_path / "model" / "notes.txt").symlink_to(tmp_path / "secret")
    (tmp_path / "model" / "config.json").unlink()
    (tmp_path / "model" / "config.json").symlink_to(tmp_path / "secret")
    vlm.save(*model, tmp_path / "model")
    assert (tmp_path / "secret").read_text() == "key"
    assert not [path for path in (tmp_path / "model").rglob("*") if path.is_symlink()]
    vlm.load(tmp_path / "model")


def test_files_have_the_permissions_of_the_umask(parts: Parts) -> None:
    modes = {path.stat().st_mode & 0o777 for path in parts["merged"].rglob("*") if path.is_file()}
    assert len(modes) == 1


def test_an_upload_follows_no_links(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []
    hub = SimpleNamespace(create_repo=lambda *_, **__: sent.append(1), upload_folder=lambda **_: sent.append(1))
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    folder = vlm.save(*model, tmp_path / "model")
    (tmp_path / "id_rsa").write_text("key")
    (folder / "notes.json").symlink_to(tmp_path / "id_rsa")
    with pytest.raises(ModelError, match="leads out of the folder"):
        vlm.push_to_hub(folder, "me/small")
    assert not sent


def test_a_repository_of_the_hub_is_checked_like_a_folder(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--me--model"
    snapshot = foreign(parts["language"], repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    assert downloaded("me/model") == snapshot
    vlm.build(parts["vision"], "me/model")
    (snapshot / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"a": "../../x.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="outside"):
        vlm.build(parts["vision"], "me/model")
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index | {"weight_map": []}))
    with pytest.raises(ModelError, match="'me/model' cannot be loaded"):
        vlm.build(parts["vision"], "me/model")


def test_names_that_are_no_folder(parts: Parts, tmp_path: Path) -> None:
    names = ["~nosuchuser/model", "a\0b", "../" * 50 + "etc/passwd", "me/model; rm -rf", "", "x" * 5000]
    for kind in ("merged", "language", "vision"):
        texts = run(open_all, [(kind, Path(name)) for name in names], parts).returned()
        assert all(texts), texts


def test_what_is_saved_names_no_code(parts: Parts, tmp_path: Path) -> None:
    """llama.cpp's converter would download and run it."""
    folder = foreign(parts["language"], tmp_path / "language")
    edit(folder / "tokenizer_config.json", "auto_map", {"AutoTokenizer": ["somebody/code--own.C", None]})
    edit(folder / "config.json", "auto_map", {"AutoConfig": "somebody/code--own.A"})
    saved = vlm.save(*vlm.build(parts["vision"], folder), tmp_path / "saved")
    assert not [path for path in saved.glob("*.json") if "somebody/code" in path.read_text()]
    vlm.load(saved)


# -- calls ------------------------------------------------------------------------------------------------------------

_LOADERS = {"from_pretrained", "from_config"}


def test_every_call_that_could_run_code_says_no() -> None:
    calls = 0
    for path in Path(vlm.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in _LOADERS:
                assert isinstance(node.func, ast.Attribute)
                options = {one.arg: ast.unparse(one.value) for one in node.keywords}
                assert options.get("trust_remote_code") == "False", f"{path.name}:{node.lineno}"
                model = re.search("Model|MODEL", ast.unparse(node.func.value))
                if model and None not in options:  # GGUF's arguments come as a mapping
                    assert options.get("use_safetensors") == "True", f"{path.name}:{node.lineno}"
                calls += 1
    assert calls >= 10
