# SPDX-License-Identifier: Apache-2.0
"""Attacks on what reads and writes exports: searches, graphs for transformers.js, cards, planted links."""

from __future__ import annotations

import ast
import io
import json
import os
import shutil
import stat
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import yaml
from numpy.lib import format as npy

import export
from aced_sdk import towers
from aced_sdk.errors import AcedError
from export import writing as cards
from export.folders.transformers_js import lay_beside
from export.runtime.parity import TORCH
from export.student import load_student
from tests.security.exports import VISION, command, manifest_of, model_of, pristine_export, put, sign, write_manifest
from tests.security.sandbox import run


@pytest.fixture
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pristine_export(tmp_path_factory)


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "o"))


# -- searches and other arrays --------------------------------------------------------------------------------------


def member(shape: tuple[int, ...], dtype: Any, content: bytes) -> bytes:
    """A member of an npz file whose head may lie."""
    stream = io.BytesIO()
    npy.write_array_header_1_0(stream, {"shape": shape, "fortran_order": False, "descr": dtype})
    return stream.getvalue() + content


def npz(path: Path, compression: int = zipfile.ZIP_STORED, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return path


def facts(source: str, keys: object) -> bytes:
    content = json.dumps({"source": source, "keys": keys}).encode()
    return member((len(content),), "|u1", content)


def open_search(path: str, folder: str) -> int:
    return len(export.Search.load(path, export.OnnxEncoder(folder, threads=1, parts=("text",))))


def bomb(path: Path, source: str) -> Path:
    rows = member((2**23, 8), "<f4", bytes(2**28))
    return npz(path, zipfile.ZIP_DEFLATED, facts=facts(source, ["a"]), embeddings=rows)


def deep(path: Path, source: str) -> Path:
    content = b"[" * 10**6
    return npz(path, facts=member((len(content),), "|u1", content), embeddings=member((0, 8), "<f4", b""))


def one(path: Path, source: str, keys: object = ("a",), **changes: Any) -> Path:
    head = {"shape": (1, 8), "dtype": "<f4", "content": bytes(32)} | changes
    return npz(path, facts=facts(source, keys), embeddings=member(**head))


def fifo(path: Path, source: str) -> Path:
    os.mkfifo(path)
    return path


SEARCHES: dict[str, Callable[[Path, str], Path]] = {
    "a bomb": bomb,
    "deep facts": deep,
    "a terabyte": lambda path, source: one(path, source, shape=(2**35, 8)),
    "more bytes than rows": lambda path, source: one(path, source, content=bytes(64)),
    "negative": lambda path, source: one(path, source, shape=(-1, 8), content=bytes(64)),
    "overflow": lambda path, source: one(path, source, shape=(2**62, 2**62), content=b""),
    "doubles": lambda path, source: one(path, source, dtype="<f8", content=bytes(64)),
    "strings": lambda path, source: one(path, source, dtype="<U8", content=bytes(256)),
    "not finite": lambda path, source: one(path, source, content=np.full(8, np.nan, np.float32).tobytes()),
    "numbers for keys": lambda path, source: one(path, source, [1]),
    "no keys": lambda path, source: one(path, source, 7),
    "control characters": lambda path, source: one(path, source, ["\x1b[2J"] * 2, shape=(2, 8), content=bytes(64)),
    "a pipe": fifo,
    "a device": lambda path, _: (path.symlink_to("/dev/zero"), path)[1],
}  # fmt: skip


@pytest.mark.parametrize("name", SEARCHES)
def test_searches(pristine: Path, tmp_path: Path, name: str) -> None:
    source = manifest_of(pristine)["source"]["weights_sha256"]
    path = SEARCHES[name](tmp_path / "index.npz", source)
    outcome = run(open_search, str(path), str(pristine), seconds=20, mib=800)
    assert outcome.refused("FolderError", "is no saved search")
    assert outcome.mib < 200
    assert "\x1b" not in outcome.value


def test_a_link_planted_for_a_search_is_not_followed(pristine: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    planted = tmp_path / f".index.npz.{os.getpid()}.{threading.get_ident()}.tmp"
    planted.symlink_to(victim)
    encoder = export.OnnxEncoder(pristine, threads=1)
    search = export.Search(encoder)
    search.add_texts(["a"], ["a"])
    search.save(tmp_path / "index.npz")
    assert victim.read_text() == "precious"
    assert len(export.Search.load(tmp_path / "index.npz", encoder)) == 1


@pytest.mark.parametrize(
    "content",
    [
        {"vision": np.zeros((8, 9), np.float32), "text": np.zeros((11, 8), np.float32)},
        {"vision": np.zeros(3, np.float32)},
        {"text": np.zeros((11, 8), np.float32)},
        {"vision": np.array(["a"])},
        {},
    ],
)
def test_torch_embeddings_that_fit_nothing(folder: Path, content: dict[str, Any]) -> None:
    stream = io.BytesIO()
    np.savez(stream, **content)
    put(folder, TORCH, stream.getvalue())
    with pytest.raises(export.FolderError):
        export.verify_folder(folder)


def test_torch_embeddings_that_are_a_bomb(folder: Path) -> None:
    npz(folder / TORCH, zipfile.ZIP_DEFLATED, vision=member((2**23, 8), "<f4", bytes(2**28)))
    sign(folder, TORCH)
    outcome = run(export.verify_folder, str(folder), mib=800)
    assert outcome.refused("FolderError", "torch_embeddings.npz")
    assert outcome.mib < 200


# -- graphs laid beside a transformers model ------------------------------------------------------------------------


def beside(folder: str, student: str, target: str) -> list[str]:
    Path(target).mkdir()
    lay_beside(Path(folder), load_student(student)[1], Path(target))
    return sorted(path.name for path in Path(target, "onnx").iterdir())


def test_only_what_the_manifest_names_is_laid_beside(folder: Path, pristine: Path, tmp_path: Path) -> None:
    (tmp_path / "id_rsa").write_text("a private key")
    (folder / "onnx/id_rsa").symlink_to(tmp_path / "id_rsa")
    (folder / "onnx/more.onnx").write_bytes(b"more")
    os.mkfifo(folder / "onnx/pipe")
    names = run(beside, str(folder), str(pristine.parent / "s"), str(tmp_path / "t")).returned()
    assert names == ["text_model.onnx", "vision_model.onnx"]


def test_graphs_of_another_make_are_not_laid_beside(folder: Path, pristine: Path, tmp_path: Path) -> None:
    student = str(pristine.parent / "s")
    model = model_of([], [])
    model.graph.input[0].name = "input_ids"
    del model.graph.input[0].type.tensor_type.shape.dim[1:]
    for number, content in enumerate((model.SerializeToString(), b"garbage")):
        put(folder, VISION, content)
        outcome = run(beside, str(folder), student, str(tmp_path / str(number)))
        assert outcome.refused("ExportError", "holds a graph that no export writes")
    (tmp_path / "key").write_text("a private key")
    (folder / VISION).unlink()
    (folder / VISION).symlink_to(tmp_path / "key")
    sign(folder, VISION)
    assert run(beside, str(folder), student, str(tmp_path / "t")).refused("ExportError", "leads out of the folder")


# -- what is written ------------------------------------------------------------------------------------------------

HOSTILE = "mit\npipeline_tag: evil\n---\n# <script>alert(1)</script> `code` \x1b[2J"


def front(card: str) -> Any:
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("---\n")[1])


def test_a_licence_adds_nothing_to_a_card() -> None:
    head = cards.front_matter(license=HOSTILE, pipeline_tag="mine")
    assert front(head).keys() == {"license", "pipeline_tag"}
    assert front(head)["pipeline_tag"] == "mine"
    assert "\x1b" not in head
    assert head.count("\n---") == 1
    span = cards.code_span("a`b\n# c | d")
    assert span == "`a'b # c | d`"


def test_cards_of_a_student_with_a_hostile_licence(tmp_path: Path) -> None:
    hostile = HOSTILE.replace("\n", " ").replace("\x1b", "")  # lines and control characters are refused on load
    towers.save(tiny.encoder(), tmp_path / "s", license=hostile)
    previous = os.umask(0o027)
    try:
        export.to_onnx(tmp_path / "s", tmp_path / "o", parts=("vision",), precisions=("fp32",), measure=False)
        export.to_timm(tmp_path / "s", tmp_path / "t")
        export.to_transformers(tmp_path / "s", tmp_path / "f")
    finally:
        os.umask(previous)
    for name, keys in (("o", set()), ("t", {"library_name"}), ("f", {"library_name"})):
        card = (tmp_path / name / "README.md").read_text()
        assert front(card).keys() == {"license", "pipeline_tag"} | keys
        assert front(card)["pipeline_tag"] != "evil"
        assert "\n# <script>" not in card
        for path in (tmp_path / name).rglob("*"):
            mode = stat.S_IMODE(path.stat().st_mode)
            assert mode == (0o750 if path.is_dir() else 0o640), path


@pytest.mark.parametrize("verb", [export.to_onnx, export.to_timm, export.to_transformers])
def test_a_target_that_is_a_link_or_holds_pipes(pristine: Path, tmp_path: Path, verb: Any) -> None:
    (tmp_path / "o").mkdir()
    os.mkfifo(tmp_path / "o/config.json")
    (tmp_path / "o/diary.txt").write_text("mine")
    assert run(verb, str(pristine.parent / "s"), str(tmp_path / "o"), seconds=30).refused("something else")
    assert (tmp_path / "o/diary.txt").read_text() == "mine"


def test_texts_of_the_command_line(pristine: Path, tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes("é".encode("latin-1"))
    error = command(str(pristine.parent / "s"), str(tmp_path / "o"), "--texts", str(tmp_path / "latin"))
    assert isinstance(error, AcedError)


def test_every_loader_says_that_no_code_is_trusted(root: Path) -> None:
    calls = []
    for path in sorted((root / "export").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "from_pretrained":
                keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                calls.append(f"{path.name}:{node.lineno}")
                assert keywords.get("trust_remote_code") == "False", calls[-1]
                assert keywords.get("local_files_only") == "True", calls[-1]
    assert len(calls) >= 5


def test_a_manifest_with_its_digest_is_what_an_export_writes(folder: Path) -> None:
    write_manifest(folder)
    assert export.verify(folder).graphs
