# SPDX-License-Identifier: Apache-2.0
"""Pools, caches, prepared pictures and tasks that were swapped, replaced, or written by somebody else."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import aced_sdk as aced
from aced_sdk import towers
from aced_sdk.cache import open_cache
from aced_sdk.data import Pool, Prepared, prepare
from aced_sdk.errors import AcedError, CacheError, DataError, EvaluationError
from aced_sdk.evaluation import Task, evaluate, load_task, metrics, run_task
from aced_sdk.evaluation.metrics import zero_shot
from aced_sdk.files import ReadError, read_lines, read_text, sha256
from aced_sdk.files.reading import _Regular
from aced_sdk.towers.words import Words
from tests import tiny
from tests.security.sandbox import run

# Pools


def one_pair(path: Path, caption: bytes, *, text_first: bool = False) -> Path:
    """A tar of one pair, its time of change set back as by a tool that copies or unpacks."""
    members = {"png": tiny.picture(1), "txt": caption}
    tiny.write_tar(path, [dict(reversed(members.items())) if text_first else members])
    os.utime(path, (1, 1))
    return path


def test_a_shard_of_equal_size_and_time_is_indexed_anew(tmp_path: Path) -> None:
    first = one_pair(tmp_path / "a.tar", b"first")
    assert Pool([first]).text(0) == "first"
    os.replace(one_pair(tmp_path / "b.tar", b"again", text_first=True), first)
    assert Pool([first]).text(0) == "again"


def test_a_pool_stays_where_it_was_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one_pair(tmp_path / "x/p.tar", b"first")
    one_pair(tmp_path / "y/p.tar", b"again", text_first=True)
    monkeypatch.chdir(tmp_path / "x")
    pool = Pool(["p.tar"])
    monkeypatch.chdir(tmp_path / "y")
    assert pool.text(0) == "first"
    assert Pool(["p.tar"]).text(0) == "again"


def test_a_line_break_in_a_name_begins_no_line_of_a_message(tmp_path: Path) -> None:
    folder = tmp_path / "a\nError: all is well. Remedy: run this"
    folder.mkdir()
    (folder / "x.tar").write_bytes(b"x" * 2000)
    with pytest.raises(DataError) as caught:
        Pool([folder])
    assert "\n" not in str(caught.value)


def test_a_file_that_would_be_waited_for_is_named() -> None:
    ours, theirs = os.pipe2(os.O_NONBLOCK)
    stream = io.BufferedReader(_Regular(ours, "x"))
    for read in (lambda: stream.read(4), stream.read, stream.readline, lambda: hashlib.file_digest(stream, "sha256")):
        with pytest.raises(ReadError, match="cannot read x: it would have to be waited for"):
            read()
    os.close(theirs)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_file_that_breaks_off_is_named() -> None:
    for read in (read_text, sha256, lambda path: list(read_lines(path)), lambda path: Pool([path])):
        with pytest.raises(AcedError, match="cannot read /proc/self/mem: Input/output error"):
            read(Path("/proc/self/mem"))


# Long words


def test_words_become_the_tokens_of_open_clip() -> None:
    theirs = towers.build(aced.Student(architecture=tiny.ARCHITECTURE), 0).tokenizer
    ours, chance = theirs.bpe, random.Random(0)
    assert isinstance(ours, Words)
    letters = ["abcdefghijklmnopqrstuvwxyz", "ab", "aeo", "".join(theirs.byte_encoder.values())]
    tokens = [token.removesuffix("</w>") for token in theirs.encoder]
    words = ["".join(chance.choices(chance.choice(letters), k=chance.choice([1, 2, 5, 20, 80]))) for _ in range(300)]
    words += ["".join(chance.choices(tokens, k=chance.choice([1, 3, 12]))) for _ in range(300)]
    words += ["a" * length for length in range(1, 40)] + ["<start_of_text>", "<end_of_text>"]
    assert [ours(word) for word in words] == [type(theirs).bpe(theirs, word) for word in words]


def test_captions_of_one_long_word_take_no_time() -> None:
    assert run(tokenise_long_words, seconds=60).returned() < 8


def tokenise_long_words() -> float:
    encoder, chance = tiny.encoder(), np.random.default_rng(0)
    texts = [bytes(chance.integers(97, 123, 4096, dtype=np.uint8)).decode() for _ in range(40)]
    start = time.process_time()
    encoder.tokenize(texts)
    return time.process_time() - start


def test_words_do_not_pile_up_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aced_sdk.towers.words._KEPT_WORDS", 10)
    words = Words({("a", "b"): 0}, {})
    assert [words(f"ab{number}") for number in range(25)][24] == "ab 2 4</w>"
    assert len(words._known) <= 10
    words("a" * 65)
    assert "a" * 65 not in words._known


# Caches


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    tiny.write_pool(folder / "pool", 16, 2)
    towers.save(tiny.encoder(), folder / "reference")
    made(folder, folder / "cache")
    return folder


def made(world: Path, directory: Path) -> aced.EmbeddingCache:
    return aced.cache_embeddings(world / "reference", world / "pool", directory)


@pytest.mark.parametrize("part", ["rows", "shards", "half a row"])
def test_rows_cannot_change_places(world: Path, tmp_path: Path, part: str) -> None:
    shutil.copytree(world / "cache", tmp_path / "c")
    path = tmp_path / "c" / "rows.bin"
    content = path.read_bytes()
    stride = len(content) // 16
    size = {"rows": stride, "shards": 8 * stride, "half a row": 32}[part]
    path.write_bytes(
        content[8 * stride :][:size] + content[size : 8 * stride] + content[:size] + content[8 * stride + size :]
    )
    pool = Pool([world / "pool"])
    with pytest.raises(CacheError, match=r"row [01] of .*rows\.bin.* checksum"):
        open_cache(tmp_path / "c", pool).rows(torch.tensor([1, 0]), torch.device("cpu"))
    made(world, tmp_path / "c")
    assert path.read_bytes() == content


def test_rows_of_another_pool_or_model_are_not_those_of_this_cache(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "cache", tmp_path / "c")
    tiny.write_tar(tmp_path / "pool" / "0.tar", [tiny.pair(row) for row in range(16)])
    made_of_pool = aced.cache_embeddings(world / "reference", tmp_path / "pool", tmp_path / "d")
    made_of_model = aced.cache_embeddings(tiny.encoder(5), world / "pool", tmp_path / "e")
    for other in (made_of_pool.directory, made_of_model.directory):
        shutil.copy(other / "rows.bin", tmp_path / "c" / "rows.bin")
        with pytest.raises(CacheError, match="checksum"):
            open_cache(tmp_path / "c", Pool([world / "pool"])).rows(torch.arange(16), torch.device("cpu"))
        shutil.copy(other / "usable.bin", tmp_path / "c" / "usable.bin")
        with pytest.raises(CacheError, match=r"usable\.bin.*checksum"):
            open_cache(tmp_path / "c", Pool([world / "pool"]))
        shutil.copy(world / "cache" / "usable.bin", tmp_path / "c" / "usable.bin")


def test_a_cache_removes_only_its_own_leftovers(world: Path, tmp_path: Path) -> None:
    kept = [tmp_path / name for name in (".thesis.tmp", ".usable.bin.mine.tmp", "usable.tmp")]
    own = [tmp_path / f".{name}.{'0a' * 8}.tmp" for name in ("cache.json", "usable.bin", ".usable-00003")]
    own.append(tmp_path / ".usable-00003")
    for path in (*kept, *own):
        path.write_text("x")
    made(world, tmp_path)
    assert [path.exists() for path in (*kept, *own)] == [True] * 3 + [False] * 4


def test_a_cache_that_is_refused_loses_nothing(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "cache", tmp_path / "c")
    leftover = tmp_path / "c" / f".cache.json.{'0a' * 8}.tmp"
    leftover.write_text("x")
    with pytest.raises(CacheError):
        aced.cache_embeddings(tiny.encoder(5), world / "pool", tmp_path / "c")
    assert leftover.exists()


@pytest.mark.parametrize("name", ["\ud800", "x\0y"])
def test_a_path_that_no_file_can_have_is_named(world: Path, tmp_path: Path, name: str) -> None:
    assert run(made, world, tmp_path / name).refused("no path can have")


# Prepared pictures


def prepared(world: Path, root: Path) -> Prepared:
    data = aced.Data(shards=(str(world / "pool"),))
    return prepare(Pool(data.shards), tiny.encoder().processor, data, root)


def test_pictures_that_changed_places_are_named_when_they_are_read(world: Path, tmp_path: Path) -> None:
    folder = prepared(world, tmp_path).folder
    rows = np.arange(16, dtype=np.int64)
    assert len(prepared(world, tmp_path).fetch(rows)) == 16
    images = np.load(folder / "images.npy")
    np.save(folder / "images.npy", images[::-1].copy())
    with pytest.raises(DataError, match=r"picture 3 in .* is not what was written"):
        prepared(world, tmp_path).fetch(rows[3:])


def test_a_folder_of_an_older_version_has_no_sums(world: Path, tmp_path: Path) -> None:
    folder = prepared(world, tmp_path).folder
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["sha256"]["sums.npy"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "sums.npy").unlink()
    assert len(prepared(world, tmp_path).fetch(np.arange(16, dtype=np.int64))) == 16


@pytest.mark.parametrize("moment", ["before", "between"])
def test_another_process_may_finish_the_same_folder_first(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    real: Callable[..., None] = os.replace
    done: list[Path] = []

    def late(source: Any, target: Any) -> None:
        folder = str(source).endswith(".tmp") and os.path.isdir(source)
        if folder and not done:
            done.append(Path(target))
            shutil.copytree(source, target)
            if moment == "between":  # it is there, and is moved away by a third process as this one moves it away
                real(target, tmp_path / "third")
        real(source, target)

    monkeypatch.setattr(os, "replace", late)
    assert prepared(world, tmp_path / "p").usable(slice(0, 16)).sum() == 16
    assert done
    assert [path.name for path in (tmp_path / "p").iterdir()] == [done[0].name]


# Tasks


def task(root: Path, samples: list[dict[str, bytes]], kind: str = "", classes: str = "cat\ndog\nboat\ntree\n") -> str:
    folder = root / "t"
    tiny.write_tar(folder / "test/0.tar", samples)
    (folder / "classnames.txt").write_bytes(classes.encode())
    (folder / "zeroshot_classification_templates.txt").write_text("a {c}\n")
    if kind:
        (folder / "dataset_type.txt").write_text(kind)
    return "t"


ENDS = ["\u2028", "\u2029", "\x0b", "\x0c", "\x1c", "\x85"]


@pytest.mark.parametrize("name", [f"cat{end}{rest}" for end in ENDS for rest in ("", "fish")] + ["cat\rfish"])
def test_a_class_name_that_may_be_two_lines_is_refused(tmp_path: Path, name: str) -> None:
    samples = [{"png": tiny.picture(0), "cls": b"1"}]
    task(tmp_path, samples, classes=f"bird\n{name}\ndog\n")
    with pytest.raises(EvaluationError, match=r"line 2 of .* may end a line"):
        load_task("t", tmp_path, tiny.encoder())


def test_lines_may_end_as_on_windows(tmp_path: Path) -> None:
    name = task(tmp_path, [{"png": tiny.picture(0), "cls": b"1\r\n"}], classes="bird\r\ndog\r\n")
    assert load_task(name, tmp_path, tiny.encoder()).texts == ["bird", "dog"]


def test_a_caption_is_a_line_whatever_is_in_it(tmp_path: Path) -> None:
    samples = [{"png": tiny.picture(0), "txt": "one\u2028caption\r\nanother\n".encode()}]
    found = load_task(task(tmp_path, samples, "retrieval"), tmp_path, tiny.encoder())
    assert found.texts == ["one\u2028caption", "another"]


@pytest.mark.parametrize("label", ["1_0", "１", "٣", "+3", "0x1", "1.0", ""])
def test_a_label_is_a_plain_number(tmp_path: Path, label: str) -> None:
    samples = [{"png": tiny.picture(number), "cls": b"0"} for number in range(60)]
    samples.append({"png": tiny.picture(60), "cls": label.encode()})
    found = load_task(task(tmp_path, samples, classes="x\n" * 20), tmp_path, tiny.encoder())
    assert found.skipped == {"class is not a number" if label else "no class": 1}


def array(values: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, values)
    return stream.getvalue()


def header(descr: Any, body: bytes) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": descr, "fortran_order": False, "shape": (4,)})
    return stream.getvalue() + body


ODD_LABELS = {
    "arrays in an array": header(("<f4", (2,)), bytes(32)),
    "records": header([("a", "<f4")], bytes(16)),
    "cut off": header("<f4", bytes(4)),
    "complex": array(np.array([1j, 0, 1, 0])),
    "dates": array(np.array([1, 2, 3, 4], "M8[s]")),
    "durations": array(np.array([1, 2, 3, 4], "m8[s]")),
    "texts": array(np.array(["1", "0", "1", "0"])),
    "raw bytes": header("|V4", bytes(16)),
    "not a number": array(np.array([np.nan, 1, 0, 0])),
    "infinite": array(np.array([np.inf, 1, 0, 0])),
}


@pytest.mark.parametrize("name", ODD_LABELS)
def test_labels_are_finite_numbers_one_for_each_class(tmp_path: Path, name: str) -> None:
    good = array(np.array([1, 0, 0, 1], np.float32))
    samples = [{"png": tiny.picture(number), "npy": good} for number in range(60)]
    samples[3]["npy"] = ODD_LABELS[name]
    report = evaluate(tiny.encoder(), [task(tmp_path, samples, "multilabel")], tmp_path)
    assert report.skipped == {"t": {"no classes": 1}}


def of_kind(kind: str) -> list[dict[str, bytes]]:
    label = {"retrieval": {"txt": b"a cat"}, "multilabel": {"npy": array(np.ones(4))}}.get(kind, {"cls": b"1"})
    return [{"png": tiny.picture(number)} | label for number in range(6)]


@pytest.mark.parametrize("kind", ["classification", "retrieval", "multilabel"])
def test_a_model_without_finite_embeddings_has_no_figures(tmp_path: Path, kind: str) -> None:
    encoder = tiny.encoder()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.fill_(float("nan"))
    with pytest.raises(EvaluationError, match="not finite"):
        evaluate(encoder, [task(tmp_path, of_kind(kind), kind)], tmp_path)


def test_many_classes_and_pictures_are_compared_in_pieces() -> None:
    assert run(compare_many, seconds=120).returned()["acc5"] <= 1


def compare_many() -> dict[str, float]:
    images, classes = torch.nn.functional.normalize(torch.randn(2, 200_000, 8), dim=-1)
    return zero_shot(images[:2000], classes, torch.zeros(2000, dtype=torch.int64))


def test_pieces_of_pictures_give_the_same_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    images, classes = torch.nn.functional.normalize(torch.randn(2, 60, 8), dim=-1)
    labels = torch.arange(60) % 11
    whole = zero_shot(images, classes, labels)
    monkeypatch.setattr(metrics, "_SCORES", 100)
    assert zero_shot(images, classes, labels) == whole


def test_the_name_of_a_task_stays_on_its_line() -> None:
    encoder = tiny.encoder()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.fill_(float("nan"))
    pictures = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    labels = torch.zeros(2, dtype=torch.int64)
    odd = Task("a\nb", "classification", pictures, labels, ["x"], torch.empty(0), ["{c}"], {})
    with pytest.raises(EvaluationError, match=r"a\\nb"):
        run_task(encoder, odd)
