# SPDX-License-Identifier: Apache-2.0
"""Exported folders of an attacker: manifests, links, pipes, preprocessing and tokenizers."""

from __future__ import annotations

import base64
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import export
from tests.security.exports import (
    VISION,
    change_json,
    embed,
    embed_text,
    manifest_of,
    pristine_export,
    put,
    refusals,
    sign,
    write_manifest,
)
from tests.security.sandbox import run

LENGTH = 12  # of the tower's texts


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine_export(tmp_path_factory), tmp_path / "o"))


def both(folder: str) -> None:
    """Load an export and use both towers, then check it where it is."""
    embed(folder)
    embed_text(folder)
    export.verify_folder(folder)
    export.verify(folder)


def kind(folder: str) -> str:
    """What the command line reads first of a folder."""
    from export.runtime.parity import kind_of

    return kind_of(folder)


# -- the manifest ---------------------------------------------------------------------------------------------------


def test_a_manifest_without_its_digest_is_refused(folder: Path) -> None:
    values = {key: value for key, value in manifest_of(folder).items() if key != "digest"}
    (folder / "export.json").write_text(json.dumps(values | {"scale": 1.0}))
    for opens in (export.OnnxEncoder, export.verify_folder):
        with pytest.raises(export.FolderError, match=r"has no digest.*Remedy: export again"):
            opens(folder)
    with pytest.raises(export.ExportError, match="has no digest"):
        export.verify(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"scale": float("nan")},
        {"bias": float("inf")},
        {"scale": "1.0"},
        {"embedding_dim": 10**9},
        {"embedding_dim": -1},
        {"embedding_dim": 8.5},
        {"text": {"cleaning": "lower", "context_length": 10**9, "pad_id": 0}},
        {"text": {"cleaning": "lower", "context_length": -1, "pad_id": 0}},
        {"text": {"cleaning": "shout", "context_length": LENGTH, "pad_id": 0}},
        {"text": None},
        {"pixels": "float64"},
        {"files": {}},
        {"files": {f"{n}": "" for n in range(5000)}},
        {"files": []},
        {"source": {"weights_sha256": 5}},
        {"report": {}},
        {"report": {"min_cosine": -1.0, "graphs": []}},
        {"graphs": [{}]},
        {"graphs": {"a": 1}},
    ],
)
def test_manifests_with_values_that_no_export_writes(folder: Path, changes: dict[str, Any]) -> None:
    write_manifest(folder, **changes)
    with pytest.raises(export.FolderError, match="is no manifest"):
        embed(str(folder))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("file", "../o/onnx/vision_model.onnx"),
        ("file", "/etc/hostname.onnx"),
        ("file", "onnx/vision_model.ort"),
        ("file", "./onnx/vision_model.onnx"),
        ("file", "onnx/vision\0model.onnx"),
        ("data", "../../secret"),
        ("data", "tokenizer.json"),
        ("part", "audio"),
        ("part", ["vision"]),
        ("precision", "\x1b[2Jfp32"),
        ("inputs", ["pixels"]),
        ("outputs", ["image_embeds", "secret"]),
    ],
)
def test_graphs_of_a_manifest_that_no_export_writes(folder: Path, key: str, value: object) -> None:
    vision, text = manifest_of(folder)["graphs"]
    write_manifest(folder, graphs=[vision | {key: value}, text], report=None)
    with pytest.raises(export.FolderError) as caught:
        embed(str(folder))
    assert "\x1b" not in str(caught.value)


def test_a_manifest_that_names_arguments(folder: Path) -> None:
    write_manifest(folder, self=1, values=2)
    with pytest.raises(export.ExportError, match="is no manifest"):
        both(str(folder))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path, _: os.mkfifo(path), "not a regular file"),
        (lambda path, _: path.symlink_to("/dev/zero"), "leads out of the folder"),
        (lambda path, outside: path.symlink_to(outside), "leads out of the folder"),
        (lambda path, _: path.symlink_to(path), "cannot be resolved"),
        (lambda path, _: path.write_bytes(b" " * 5_000_000), "more than"),
        (lambda path, _: path.write_text('{"a":' * 2000 + "1" + "}" * 2000), "nested"),
        (lambda path, _: path.write_bytes(b"\xff\xfe{}"), "not UTF-8"),
        (lambda path, _: path.mkdir(), "not a regular file"),
    ],
)
def test_manifests_that_are_no_plain_files(
    folder: Path, tmp_path: Path, make: Callable[[Path, Path], object], words: str
) -> None:
    path = folder / "export.json"
    shutil.copy(path, tmp_path / "outside.json")
    path.unlink()
    make(path, tmp_path / "outside.json")
    assert run(both, str(folder), seconds=10).refused("FolderError", words)
    assert run(kind, str(folder), seconds=10).kind == "returned"


# -- the files beside it --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [VISION, "tokenizer.json", "preprocessor_config.json", "torch_embeddings.npz"])
def test_links_and_pipes_among_the_files(folder: Path, tmp_path: Path, name: str) -> None:
    shutil.move(folder / name, tmp_path / "outside")
    (folder / name).symlink_to(tmp_path / "outside")
    assert run(both, str(folder)).refused("FolderError", "leads out of the folder")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert run(both, str(folder), seconds=10).refused("FolderError", "not a regular file")


def test_a_snapshot_of_the_hub_cache_may_link_to_its_blobs(folder: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b/snapshots/1", tmp_path / "models--a--b/blobs"
    blobs.mkdir(parents=True)
    for path in sorted(folder.rglob("*")):
        target = snapshot / path.relative_to(folder)
        if path.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, blobs / path.name)
            target.symlink_to(blobs / path.name)
    both(str(snapshot))


@pytest.mark.parametrize("name", [VISION, "tokenizer.json", "preprocessor_config.json"])
def test_files_that_have_no_digest(folder: Path, name: str) -> None:
    files = {key: value for key, value in manifest_of(folder)["files"].items() if key != name}
    write_manifest(folder, files=files)
    for verb in (embed if name != "tokenizer.json" else embed_text, export.verify_folder):
        with pytest.raises(export.FolderError):
            verb(str(folder))


# -- preprocessing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"crop_size": {"height": 10**9, "width": 10**9}},
        {"crop_size": {"height": -16, "width": 16}},
        {"crop_size": {"height": 0, "width": 0}},
        {"crop_size": {"height": float("inf"), "width": 16}},
        {"crop_size": {"height": 4096, "width": 4096}},
        {"image_std": [0.0, 1.0, 1.0]},
        {"image_std": [float("nan")] * 3},
        {"image_std": [1e-300] * 3},
        {"image_mean": [0.5] * 1000},
        {"image_mean": []},
        {"image_mean": [10**400, 0, 0]},
        {"resample": 99},
        {"resample": "nearest"},
        {"fill_color": 10**9},
        {"resize_mode": "explode"},
        {"crop_size": 16},
        {"image_mean": None},
    ],
)
def test_preprocessing_that_no_student_has(folder: Path, changes: dict[str, Any]) -> None:
    change_json(folder, "preprocessor_config.json", lambda values: values.update(changes))
    with pytest.raises(export.FolderError, match=r"preprocessor_config\.json"):
        export.OnnxEncoder(folder)


def test_preprocessing_for_another_size_than_the_graph(folder: Path) -> None:
    size = {"crop_size": {"height": 2048, "width": 2048}}
    change_json(folder, "preprocessor_config.json", lambda values: values.update(size))
    with pytest.raises(export.FolderError, match="not what its folder says"):
        export.OnnxEncoder(folder)


def test_preprocessing_of_no_object(folder: Path) -> None:
    put(folder, "preprocessor_config.json", b"[1, 2]")
    with pytest.raises(export.FolderError, match=r"preprocessor_config\.json"):
        export.OnnxEncoder(folder)


# -- tokenizers -----------------------------------------------------------------------------------------------------


def replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def normalized(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"normalizer": {"type": "Sequence", "normalizers": list(steps)}}


def template(count: int, ids: int, texts: int = 1) -> dict[str, Any]:
    token, text = {"SpecialToken": {"id": "a", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    special = {"a": {"id": "a", "ids": [0] * ids, "tokens": ["a"] * ids}}
    pieces = [token] * count + [text] * texts
    return {
        "post_processor": {"type": "TemplateProcessing", "single": pieces, "pair": pieces, "special_tokens": special}
    }


def padded(length: int, multiple: int | None = None) -> dict[str, Any]:
    fixed = {"strategy": {"Fixed": length}, "direction": "Right", "pad_to_multiple_of": multiple}
    return {"padding": fixed | {"pad_id": 0, "pad_type_id": 0, "pad_token": "a"}}


def cut(length: int, stride: int = 0) -> dict[str, Any]:
    return {"truncation": {"direction": "Right", "max_length": length, "strategy": "LongestFirst", "stride": stride}}


def added(count: int, length: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "special"), False) | {"normalized": True}
    return {"added_tokens": [{"id": n, "content": "a" * length + str(n), **flags} for n in range(count)]}


def split(regex: str) -> dict[str, Any]:
    return {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}}


def wordpiece(prefix: str, longest: int) -> dict[str, Any]:
    sizes = {"continuing_subword_prefix": prefix, "max_input_chars_per_word": longest}
    return {"model": {"type": "WordPiece", **WORDS, **sizes}}


BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": False}
CHARACTER_MAP = base64.b64encode(b"\xff\xff\xff\x7f\0\0\0\0").decode()
LONG_MAP = base64.b64encode((8).to_bytes(4, "little") + bytes(8) + b"a" * 2**20 + b"\0").decode()
WORDS = {"unk_token": "[UNK]", "vocab": {"[UNK]": 0, "a": 1}}
SMALL = {
    "version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": None, "post_processor": None,
    "decoder": None, "model": {"type": "WordLevel", **WORDS}, **padded(LENGTH), **cut(LENGTH),
}  # fmt: skip
TOKENIZERS: dict[str, dict[str, Any]] = {
    "padding": padded(10**9),
    "a multiple": padded(LENGTH, 10**9),
    "no padding": {"padding": None},
    "no truncation": {"truncation": None},
    "truncation": cut(10**9),
    "stride": cut(LENGTH, LENGTH),
    "negative padding": padded(-1),
    "replacements": normalized(*[replace({"String": "a"}, "a" * 100)] * 5),
    "replacements of nothing": normalized(*[replace({"Regex": ""}, "a")] * 60),
    "an empty pattern": normalized(replace({"String": ""}, "aaaa")),
    "nested replacements": normalized(normalized(*[replace({"String": "a"}, "a" * 999)] * 4)["normalizer"]),
    "a prefix": normalized({"type": "Prepend", "prepend": "a" * 10**7}),
    "a character map": normalized({"type": "Precompiled", "precompiled_charsmap": CHARACTER_MAP}),
    "a character map of long texts": normalized({"type": "Precompiled", "precompiled_charsmap": LONG_MAP}),
    "bytes of bytes": {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [BYTES] * 40}},
    "bytes before": normalized(*[{"type": "ByteLevel"}] * 40),
    "many steps": normalized(*[{"type": "NFC"}] * 10_000),
    "a template": template(20_000, 20_000),
    "a template without the text": template(1, 1, texts=0),
    "a template of many texts": template(1, 1, texts=1000),
    "chunks of nothing": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "a regex without end": split(r"(?=(a+a+)+b)\1c"),
    "many added tokens": added(200_000, 1),
    "long added tokens": added(300, 30_000),
    "long words": wordpiece("#", 10**9),
    "a long affix": wordpiece("#" * 10**6, 100),
    "long tokens": {"model": {"type": "Unigram", "unk_id": 0, "vocab": [["a" * n, 0.0] for n in range(1, 5000)]}},
    "no model": {"model": None},
    "a model of nobody": {"model": {"type": "Telepathy", "vocab": {}}},
    "a legacy step": {"normalizer": {"prepend": "a" * 10**7}},
}  # fmt: skip


def test_tokenizers_that_end_the_process(folder: Path, tmp_path: Path) -> None:
    folders = {name: str(shutil.copytree(folder, tmp_path / name)) for name in TOKENIZERS}
    for name, place in folders.items():
        put(Path(place), "tokenizer.json", json.dumps(SMALL | TOKENIZERS[name]).encode())
    outcome = run(refusals, embed_text, folders, "a" * 5000, seconds=60)
    assert outcome.mib < 600
    for name, error in outcome.returned().items():
        assert "Error: " in error, (name, error)
        assert "tokenizer" in error, (name, error)


def test_a_small_tokenizer_is_no_attack(folder: Path) -> None:
    put(
        folder,
        "tokenizer.json",
        json.dumps(SMALL | template(2, 2) | normalized(replace({"String": " "}, "_"))).encode(),
    )
    assert embed_text(str(folder)) == (1, 8)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"3", b"[" * 100_000, b'{"a": "\\ud800"}', b'{"model": {"vocab": {}}}']
)
def test_files_that_are_no_tokenizer(folder: Path, content: bytes) -> None:
    put(folder, "tokenizer.json", content)
    with pytest.raises(export.FolderError, match=r"tokenizer\.json"):
        embed_text(str(folder))


def test_a_second_reading_of_the_same_keys_is_not_offered(folder: Path) -> None:
    """A parser that takes the first of two keys would pad to a million where ours takes the last."""
    text = (folder / "tokenizer.json").read_text()
    bad = json.dumps(padded(10**6)["padding"])
    put(folder, "tokenizer.json", (f'{{"padding": {bad},' + text[1:]).encode())
    assert embed_text(str(folder)) == (1, 8)


def test_ids_beyond_the_vocabulary(folder: Path) -> None:
    change_json(folder, "tokenizer.json", lambda values: values["padding"].update(pad_id=2**31))
    with pytest.raises(export.EncoderError, match="cannot run the text graph"):
        embed_text(str(folder))


def test_names_of_a_folder_are_printed_harmlessly(tmp_path: Path) -> None:
    with pytest.raises(export.FolderError) as caught:
        export.OnnxEncoder(tmp_path / "\x1b]0;owned\x07")
    assert "\x1b" not in str(caught.value)


def test_signed_folders_still_load(folder: Path) -> None:
    """The helpers of these tests change nothing by themselves."""
    sign(folder, VISION, "tokenizer.json")
    both(str(folder))
