# SPDX-License-Identifier: Apache-2.0
"""Zero-shot classes and the search: what they find, against numpy written out, and what they refuse."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import exported

import export
from export.runtime.parity import TEXTS, Parity, _allowed, pictures


def loaded(base: Path, seed: int) -> export.OnnxEncoder:
    return export.OnnxEncoder(exported(base, seed), threads=1)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> export.OnnxEncoder:
    return loaded(tmp_path_factory.mktemp("search"), 0)


@pytest.fixture
def search(encoder: export.OnnxEncoder) -> export.Search:
    made = export.Search(encoder)
    made.add_images([f"picture {n}" for n in range(len(pictures()))], pictures())
    made.add_texts([f"text {n}" for n in range(len(TEXTS))], TEXTS)
    return made


def unit_rows(n: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((n, 8)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_zero_shot_classes(encoder: export.OnnxEncoder) -> None:
    classes, templates = ["cat", "red apple", "steam engine"], ["a photo of a {}.", "a drawing of a {}"]
    zero_shot = export.ZeroShot(encoder, classes, templates)
    logits = encoder.zero_shot(pictures(), classes, templates)
    np.testing.assert_allclose(zero_shot.logits(encoder.encode_image(pictures())), logits, atol=1e-5)
    guesses = zero_shot.classify(pictures(), top=3)
    assert len(guesses) == len(pictures())
    for row, logit in zip(guesses, logits, strict=True):
        assert [guess.name for guess in row] == [classes[c] for c in np.argsort(-logit)]
        want = np.sort(np.exp(logit - np.logaddexp.reduce(logit)))[::-1]
        np.testing.assert_allclose([guess.probability for guess in row], want, rtol=1e-4)
    assert [row[:1] for row in guesses] == zero_shot.classify(pictures())  # one guess unless more are asked for
    assert len(zero_shot.classify(pictures(), top=9)[0]) == 3
    assert zero_shot.classify([]) == []


def test_templates_of_evaluation_tasks(encoder: export.OnnxEncoder) -> None:
    """The files of a task write {c} where code writes {}."""
    classes = ["cat", "a {} of {c}"]
    plain = encoder.encode_classes(classes, ["a photo of a {}.", "{}, {}"])
    np.testing.assert_array_equal(encoder.encode_classes(classes, ["a photo of a {c}.", "{c}, {}"]), plain)
    prompts = encoder.encode_text(["a photo of a cat.", "cat, cat"]).mean(axis=0)
    np.testing.assert_allclose(plain[0], prompts / np.linalg.norm(prompts), atol=1e-5)


def test_bad_classes(encoder: export.OnnxEncoder) -> None:
    with pytest.raises(export.InputError, match="no class"):
        export.ZeroShot(encoder, [])
    for templates in (["a photo"], ["a photo of a {}", "a {name}"]):
        with pytest.raises(export.InputError, match=r"has neither \{\} nor \{c\}"):
            export.ZeroShot(encoder, ["cat"], templates)
    with pytest.raises(export.InputError, match="top is 0"):
        export.ZeroShot(encoder, ["cat"]).classify(pictures(), top=0)


def test_search_finds_what_was_added(search: export.Search, encoder: export.OnnxEncoder) -> None:
    assert len(search) == len(pictures()) + len(TEXTS)
    hit = search.query_image(pictures()[4], k=1)[0]
    assert hit.key == "picture 4"
    assert hit.cosine == pytest.approx(1, abs=1e-5)
    assert search.query_text(TEXTS[3], k=1)[0].key == "text 3"
    embeddings = np.concatenate([encoder.encode_image(pictures()), encoder.encode_text(TEXTS)])
    cosines = embeddings @ encoder.encode_text(["a cat"])[0]
    found = search.query_text("a cat", k=100)
    assert len(found) == len(search)
    np.testing.assert_allclose([hit.cosine for hit in found], np.sort(cosines)[::-1], atol=1e-6)


@pytest.mark.parametrize("k", [1, 7, 500, 1000])
def test_the_nearest_come_first_and_the_older_of_equals(encoder: export.OnnxEncoder, k: int) -> None:
    rows = unit_rows(500)
    search = export.Search(encoder)
    for start in range(0, 500, 100):
        search.add([f"a{n}" for n in range(start, start + 100)], rows[start : start + 100])
    search.add([f"b{n}" for n in range(500)], rows)
    query = unit_rows(1, seed=1)[0]
    cosines = np.concatenate([rows, rows]) @ query
    order = np.argsort(-cosines, kind="stable")[:k]
    assert [hit.key for hit in search.query(query, k)] == [f"{'ab'[n // 500]}{n % 500}" for n in order]


def test_bad_entries_change_nothing(search: export.Search, encoder: export.OnnxEncoder) -> None:
    before = len(search), search.query_text("a", k=50)
    rows = unit_rows(2)
    for keys, embeddings, message in (
        (["new", "text 0"], rows, "'text 0' is taken"),
        (["new", "new"], rows, "'new' is taken"),
        (["new"], rows, "1 keys came with"),
        (["new", "newer"], rows[:, :4], "2 keys came with"),
        (["new", "newer"], rows * np.nan, "finite"),
    ):
        with pytest.raises(export.InputError, match=message):
            search.add(keys, embeddings)
    with pytest.raises(export.InputError, match=r"images\[1\]"):
        search.add_images(["new", "newer"], [Image.new("RGB", (4, 4)), b"broken"])
    with pytest.raises(export.InputError, match="k is 0"):
        search.query_text("a", k=0)
    with pytest.raises(export.InputError, match="give one row"):
        search.query(rows)
    assert (len(search), search.query_text("a", k=50)) == before
    assert export.Search(encoder).query_text("a") == []


def test_saved_and_loaded(search: export.Search, encoder: export.OnnxEncoder, tmp_path: Path) -> None:
    search.add(["naïve \x00 猫"], unit_rows(1))
    search.save(tmp_path / "index.npz")
    loaded = export.Search.load(tmp_path / "index.npz", encoder)
    assert loaded.query_text("a cat", k=50) == search.query_text("a cat", k=50)
    export.Search(encoder).save(tmp_path / "empty.npz")
    assert len(export.Search.load(tmp_path / "empty.npz", encoder)) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.npz", "index.npz"]


def test_a_failed_save_leaves_the_older_file(
    search: export.Search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search.save(tmp_path / "index.npz")
    before = (tmp_path / "index.npz").read_bytes()

    def full(_: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        search.save(tmp_path / "index.npz")
    assert (tmp_path / "index.npz").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["index.npz"]


def test_bad_files(search: export.Search, encoder: export.OnnxEncoder, tmp_path: Path) -> None:
    path = tmp_path / "index.npz"
    search.save(path)
    whole = path.read_bytes()
    facts = json.dumps({"source": encoder.source, "keys": ["a"]}).encode()
    hostile = np.array([{"a": 1}], dtype=object)
    with (tmp_path / "pickled.npz").open("wb") as stream:
        np.savez(stream, facts=hostile, embeddings=hostile)
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "noise.npz").write_bytes(b"noise")
    (tmp_path / "nothing.npz").write_bytes(b"")
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    for name in ("pickled.npz", "cut.npz", "noise.npz", "nothing.npz", "other.npz", "absent.npz"):
        with pytest.raises(export.FolderError, match=f"{name} is no saved search"):
            export.Search.load(tmp_path / name, encoder)
    np.savez(tmp_path / "words.npz", facts=np.frombuffer(facts, np.uint8), embeddings=np.array(["a"]))
    np.savez(tmp_path / "short.npz", facts=np.frombuffer(facts, np.uint8), embeddings=np.zeros((9, 3), np.float32))
    for name in ("words.npz", "short.npz"):
        with pytest.raises(export.FolderError, match=f"{name} is no saved search"):
            export.Search.load(tmp_path / name, encoder)
    with pytest.raises(export.InputError, match="finite numbers"):
        search.query(np.full(encoder.embedding_dim, np.nan, np.float32))
    with pytest.raises(export.FolderError, match="another student"):
        export.Search.load(path, loaded(tmp_path / "other", 1))


def test_adding_and_asking_from_threads(encoder: export.OnnxEncoder) -> None:
    search, rows = export.Search(encoder), unit_rows(400)

    def work(n: int) -> None:
        search.add([str(n)], rows[n : n + 1])
        assert search.query(rows[n], k=1)[0].key == str(n)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(400)))
    assert len(search) == 400


@pytest.mark.parametrize(
    ("precision", "max_abs", "cosine", "good"),
    [
        ("fp32", 1e-4, 1.0, True),
        ("fp32", 1.01e-4, 1.0, False),
        ("fp32", float("nan"), 1.0, False),
        ("fp16", 0.5, 0.99, True),
        ("fp16", 0.0, 0.9899, False),
        ("int8", 0.0, float("nan"), False),
    ],
)
def test_parity_has_its_bound(precision: str, max_abs: float, cosine: float, good: bool, tmp_path: Path) -> None:
    parity = Parity("vision", precision, max_abs, cosine, 0.0, 1.0)
    if good:
        _allowed(tmp_path, parity, 0.99)
    else:
        with pytest.raises(export.FolderError, match="does not agree with torch"):
            _allowed(tmp_path, parity, 0.99)
