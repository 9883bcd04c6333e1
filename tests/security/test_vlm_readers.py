# SPDX-License-Identifier: Apache-2.0
"""Conversations and pictures that lead out of their folder, hang a reader, or fill memory."""

from __future__ import annotations

import io
import json
import os
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import vlm
from aced_sdk.errors import AcedError, ConfigError, DataError
from tests.security.sandbox import run
from tests.tiny import picture, write_tar
from vlm.binding import claim
from vlm.cli import _line
from vlm.data.pictures import check_shapes, open_picture

Json = dict[str, Any]


def entry(key: Any, image: Any) -> Json:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "noise"}]
    return {"id": key, "image": image, "conversations": turns}


def rooted(folder: Path) -> Path:
    """A folder of pictures with a good one, beside a secret one that links lead to."""
    root = folder / "pictures"
    root.mkdir()
    for path in (root / "good.png", folder / "secret.png"):
        path.write_bytes(picture(1))
    (root / "link.png").symlink_to(folder / "secret.png")
    (root / "folder").symlink_to(folder)
    (root / "loop.png").symlink_to("loop.png")
    os.mkfifo(root / "pipe.png")
    (root / "device.png").symlink_to("/dev/zero")
    return root


OUTSIDE = ["../secret.png", "./../secret.png", "a/../../secret.png", "link.png", "folder/secret.png", "device.png"]
ODD = ["loop.png", "pipe.png", "", "a\0.png", "x" * 5000, "folder", "/dev/zero", "/dev/stdin"]


def read_all(folder: Path, names: list[str], form: str) -> tuple[list[str], list[str]]:
    """Names of pictures that are read, and the messages of those that are skipped."""
    root = folder / "pictures"
    if form == "llava":
        (folder / "data.json").write_text(json.dumps([entry(n, name) for n, name in enumerate(names)]))
        read = vlm.load_llava(folder / "data.json", root, max_unusable_fraction=1)
    elif form == "coco":
        images = [{"id": n, "file_name": name} for n, name in enumerate(names)]
        captions = [{"image_id": n, "caption": "noise"} for n in range(len(names))]
        (folder / "data.json").write_text(json.dumps({"images": images, "annotations": captions}))
        read = vlm.load_coco_captions(folder / "data.json", root, max_unusable_fraction=1)
    else:
        asked = [{"question_id": n, "image_id": name, "question": "What?"} for n, name in enumerate(names)]
        facts = {"answer_type": "other", "multiple_choice_answer": "noise", "answers": [{"answer": "noise"}] * 4}
        answered = [{"question_id": n, "image_id": name} | facts for n, name in enumerate(names)]
        (folder / "questions.json").write_text(json.dumps({"questions": asked}))
        (folder / "answers.json").write_text(json.dumps({"annotations": answered}))
        read = vlm.load_vqav2(
            folder / "questions.json", folder / "answers.json", root, image_name="{image_id}", max_unusable_fraction=1
        )
    return [Path(str(sample.images[0])).name for sample in read], list(read.skipped)


@pytest.mark.parametrize("form", ["llava", "coco", "vqa"])
def test_pictures_outside_of_their_folder_are_skipped(tmp_path: Path, form: str) -> None:
    rooted(tmp_path)
    names = ["good.png", str(tmp_path / "secret.png"), *OUTSIDE, *(name for name in ODD if form == "coco" or name)]
    if form == "vqa":
        names = [name for name in names if name.isprintable()]
    kept, skipped = run(read_all, tmp_path, names, form, seconds=20, mib=300).returned()
    assert kept == ["good.png"]
    assert len(skipped) == len(names) - 1


def test_a_folder_of_pictures_may_itself_be_a_link(tmp_path: Path) -> None:
    rooted(tmp_path)
    (tmp_path / "linked").symlink_to("pictures")
    (tmp_path / "data.json").write_text(json.dumps([entry(1, "good.png")]))
    assert len(vlm.load_llava(tmp_path / "data.json", tmp_path / "linked")) == 1


# -- files of conversations -------------------------------------------------------------------------------------------


def _readers(path: Path, root: Path) -> list[str]:
    """The errors of every reader of JSON for one file."""
    texts = []
    calls: list[Callable[[], Any]] = [
        lambda: vlm.load_llava(path, root),
        lambda: vlm.load_coco_captions(path, root),
        lambda: vlm.load_vqav2(path, path, root),
    ]
    for call in calls:
        try:
            call()
            texts.append("")
        except AcedError as error:
            texts.append(str(error))
    return texts


@pytest.mark.parametrize("what", ["pipe", "device", "deep", "not text", "torn", "folder", "digits", "surrogate"])
def test_files_that_are_no_conversations(tmp_path: Path, what: str) -> None:
    path = tmp_path / "data.json"
    contents = {
        "deep": b"[" * 10**6,
        "not text": b"\xff\xfe\x00",
        "torn": b'[{"id": 1',
        "digits": b"[" + b"9" * 10**6 + b"]",
        "surrogate": b'["\\ud800"]',
    }
    if what == "pipe":
        os.mkfifo(path)
    elif what == "device":
        path = Path("/dev/zero")
    elif what == "folder":
        path.mkdir()
    else:
        path.write_bytes(contents[what])
    texts = run(_readers, path, tmp_path, seconds=20, mib=300).returned()
    assert all(texts)


def test_odd_entries_are_named(tmp_path: Path) -> None:
    rooted(tmp_path)
    good = entry(1, "good.png")
    turn = good["conversations"][0]
    odd: list[Any] = [
        None,
        [],
        "text",
        {},
        good | {"image": 7},
        good | {"image": [["good.png"]]},
        good | {"image": {"a": 1}},
        good | {"conversations": "text"},
        good | {"conversations": [turn, []]},
        good | {"conversations": [turn, {"from": "gpt", "value": {"a": [1] * 10**5}}]},
        good | {"answers": [[["a"]]]},
        good | {"id": {"a": 1}, "image": "none.png"},
        good | {"kind": ["a"], "image": "none.png"},
    ]
    for one in odd:
        (tmp_path / "data.json").write_text(json.dumps([one]))
        with pytest.raises(AcedError, match="conversation") as raised:
            vlm.load_llava(tmp_path / "data.json", tmp_path / "pictures")
        assert len(str(raised.value)) < 2000


def test_names_do_not_command_a_terminal(tmp_path: Path) -> None:
    rooted(tmp_path)
    evil = "\x1b[2J\x1b]0;owned\x07\x9b31m\u202e"
    for one in (entry(evil, "none.png"), entry(1, evil), entry(evil, 7)):
        (tmp_path / "data.json").write_text(json.dumps([one]))
        with pytest.raises(DataError) as raised:
            vlm.load_llava(tmp_path / "data.json", tmp_path / "pictures")
        assert str(raised.value).isprintable()
    (tmp_path / "coco.json").write_text(json.dumps({"images": [{"id": evil, "file_name": "a"}], "annotations": []}))
    with pytest.raises(DataError) as raised:
        vlm.load_coco_captions(tmp_path / "coco.json", tmp_path)
    assert str(raised.value).isprintable()
    assert _line({"caption": evil}).isprintable()
    assert json.loads(_line({"caption": evil + "é"})) == {"caption": evil + "é"}


@pytest.mark.parametrize("subtype", ["{image_id:999999999999}", "{image_id.__class__}", "../../etc", "{", [1], "a\n"])
def test_the_subtype_of_vqa_is_no_format(tmp_path: Path, subtype: Any) -> None:
    asked = {"data_subtype": subtype, "questions": [{"question_id": 1, "image_id": 1, "question": "What?"}]}
    facts = {"answer_type": "other", "multiple_choice_answer": "a", "answers": [{"answer": "a"}]}
    (tmp_path / "q.json").write_text(json.dumps(asked))
    (tmp_path / "a.json").write_text(json.dumps({"annotations": [{"question_id": 1, "image_id": 1} | facts]}))
    outcome = run(_load_vqa, tmp_path, mib=300)
    assert outcome.refused("data_subtype")


def _load_vqa(folder: Path) -> None:
    vlm.load_vqav2(folder / "q.json", folder / "a.json", folder)


# -- tars -------------------------------------------------------------------------------------------------------------


def test_concurrent_readers_of_the_same_tars(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", [{"png": picture(n), "txt": b"noise"} for n in range(20)])
    with ThreadPoolExecutor(8) as pool:
        sets = list(pool.map(lambda _: vlm.load_webdataset([tar], tmp_path / "out"), range(8)))
    assert all(one.samples == sets[0].samples and len(one) == 20 for one in sets)
    assert not [path for path in (tmp_path / "out").iterdir() if path.suffix == ".tmp"]


def test_planted_links_are_replaced_and_not_followed(tmp_path: Path) -> None:
    """A picture's name follows from its contents: somebody could put a link there before it is unpacked."""
    tar = write_tar(tmp_path / "a.tar", [{"png": picture(1), "txt": b"noise"}])
    (name,) = (Path(str(sample.images[0])).name for sample in vlm.load_webdataset([tar], tmp_path / "first"))
    (tmp_path / "secret.png").write_bytes(picture(2))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).symlink_to(tmp_path / "secret.png")
    for guess in range(3):
        (tmp_path / "out" / f".{name}.{os.getpid() + guess}.tmp").symlink_to(tmp_path / "target")
    (sample,) = vlm.load_webdataset([tar], tmp_path / "out")
    assert Path(str(sample.images[0])).read_bytes() == picture(1)
    assert not (tmp_path / "out" / name).is_symlink()
    assert (tmp_path / "secret.png").read_bytes() == picture(2)
    assert not (tmp_path / "target").exists()


def _load_tar(folder: Path) -> list[str]:
    return list(vlm.load_webdataset([folder / "a.tar"], folder / "out", max_unusable_fraction=1).skipped)


def test_bad_samples_are_counted(tmp_path: Path) -> None:
    good, turns = picture(1), entry(1, "../secret.png")
    deep = b'{"conversations":' + b"[" * 10**5 + b"]" * 10**5 + b"}"
    samples = [
        {"png": good, "txt": b"noise"},
        {"png": good, "json": deep},
        {"png": good, "json": b'{"a":' * 10**5},
        {"png": good, "json": b" " * (2**24 + 1)},
        {"png": good, "txt": b"a" * (2**24 + 1)},
        {"png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "txt": b"noise"},
        {"png": _bomb(), "txt": b"noise"},
        {"png": good, "json": json.dumps(turns).encode()},  # the name in it is not used
    ]
    write_tar(tmp_path / "a.tar", samples)
    skipped = run(_load_tar, tmp_path, seconds=20, mib=300).returned()
    assert len(skipped) == 6
    assert not [message for message in skipped if not message.isprintable()]


# -- pictures ---------------------------------------------------------------------------------------------------------


def _bomb() -> bytes:
    """A PNG of 60,000 x 60,000 pixels in its header."""
    content = bytearray(picture(1))
    content[16:24] = struct.pack(">II", 60_000, 60_000)
    return bytes(content)


def _saved(kind: str, size: tuple[int, int] = (64, 64)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, (9, 99, 9)).save(stream, kind)
    return stream.getvalue()


def _open(path: Path) -> str:
    try:
        open_picture(path)
    except DataError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kind", ["EPS", "ICO", "ICNS", "DDS", "TGA", "PPM", "PDF"])
def test_other_formats_are_refused_whatever_their_name(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a.png").write_bytes(_saved(kind))
    assert "cannot be read" in run(_open, tmp_path / "a.png", mib=200).returned()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_usual_formats_are_read(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a.png").write_bytes(_saved(kind))
    assert _open(tmp_path / "a.png") == ""


def test_bombs_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    (tmp_path / "bomb.png").write_bytes(_bomb())
    Image.new("1", (20_000, 1)).save(tmp_path / "strip.png")
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("bomb.png", "strip.png", "pipe.png"):
        outcome = run(_open, tmp_path / name, seconds=10, mib=300)
        assert "cannot be read" in outcome.returned()
        assert outcome.mib < 50
    assert "cannot be read" in run(_open, Path("/dev/zero"), seconds=10, mib=600).returned()


def test_strips_are_not_blown_up(tmp_path: Path) -> None:
    class Processor:
        size = {"shortest_edge": 336}  # noqa: RUF012

    check_shapes(Processor(), [Image.new("RGB", (400, 2))])
    with pytest.raises(DataError, match="too long and thin"):
        check_shapes(Processor(), [Image.new("RGB", (9000, 2))])


# -- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"[" * 10**5, b"{", b"7", b"\xff"])
def test_a_run_file_that_is_no_json(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tune.json").write_bytes(content)
    with pytest.raises(ConfigError, match="cannot be read"):
        claim(tmp_path, {"format": 1})
