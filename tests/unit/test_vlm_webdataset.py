# SPDX-License-Identifier: Apache-2.0
"""Conversations and captions out of WebDataset tars."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import vlm
from aced_sdk.errors import DataError


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "PNG")
    return buffer.getvalue()


def tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as out:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            out.addfile(info, io.BytesIO(content))
    return path


def conversation(**more: Any) -> bytes:
    turns = [{"from": "human", "value": "<image>\nWhat colour?"}, {"from": "gpt", "value": "blue"}]
    return json.dumps({"conversations": turns, **more}).encode()


def test_captions_and_conversations_stand_side_by_side(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}]
    shard = tar(
        tmp_path / "0.tar",
        {
            "a.png": png("red"),
            "a.txt": b"a red square",
            "a.json": b'{"kind": "square"}',
            "b.png": png("blue"),
            "b.json": conversation(kind="colour", answers=["blue", "navy"]),
            "c.json": json.dumps({"messages": messages}).encode(),
        },
    )
    samples = vlm.load_webdataset([shard], tmp_path / "pictures", prompt="Say what it is.")
    caption, colour, words = samples
    assert (caption.turns, caption.kind) == ((("Say what it is.", "a red square"),), "square")
    assert (colour.turns, colour.kind, colour.answers) == ((("What colour?", "blue"),), "colour", ("blue", "navy"))
    assert (words.turns, words.images) == ((("Hello", "Good day"),), ())
    assert [Image.open(one.images[0]).getpixel((0, 0)) for one in (caption, colour)] == [(255, 0, 0), (0, 0, 255)]


def test_names_in_a_tar_lead_nowhere_and_equal_pictures_are_kept_once(tmp_path: Path) -> None:
    first = tar(tmp_path / "0.tar", {"../../x.png": png("red"), "../../x.txt": b"one"})
    second = tar(tmp_path / "1.tar", {"../../x.png": png("red"), "../../x.txt": b"two"})
    folder = tmp_path / "deep" / "er" / "pictures"
    samples = vlm.load_webdataset([first, second], folder)
    assert [one.turns[0][1] for one in samples] == ["one", "two"]
    assert samples[0].images == samples[1].images
    assert [path.parent for path in tmp_path.rglob("*.png")] == [folder]


def test_bad_samples_are_counted_up_to_the_limit(tmp_path: Path) -> None:
    good = {f"{n}.png": png("red") for n in range(3)} | {f"{n}.txt": b"fine" for n in range(3)}
    bad = {"x.png": png("red"), "y.txt": b"no picture", "z.png": b"no png", "z.txt": b"torn"}
    shard = tar(tmp_path / "0.tar", good | bad)
    samples = vlm.load_webdataset([shard], tmp_path / "pictures", max_unusable_fraction=0.5)
    assert len(samples) == 3
    assert len(samples.skipped) == 3
    assert samples.reasons == {"no caption": 1, "no picture": 1, "unreadable picture": 1}
    with pytest.raises(DataError, match=r"3 of 6 conversations cannot be used \(1 no caption, .*'x'"):
        vlm.load_webdataset([shard], tmp_path / "pictures")


@pytest.mark.parametrize(
    ("content", "words"),
    [(b'{"conversations": [{"from": "hu', "unreadable KEY.json"), (b"[1]", "KEY.json is no object")],
)
def test_a_torn_conversation_does_not_become_a_caption(tmp_path: Path, content: bytes, words: str) -> None:
    shard = tar(tmp_path / "0.tar", {"odd.png": png("red"), "odd.json": content, "odd.txt": b"fine"})
    with pytest.raises(DataError, match=f"'odd': {words}"):
        vlm.load_webdataset([shard], tmp_path / "pictures")


@pytest.mark.parametrize(
    "content", [b'{"messages": 3}', b'{"messages": [{"role": "user"}]}', b'{"conversations": [1]}', b'{"messages": []}']
)
def test_a_malformed_conversation_is_named(tmp_path: Path, content: bytes) -> None:
    shard = tar(tmp_path / "0.tar", {"odd.png": png("red"), "odd.json": content})
    with pytest.raises(DataError, match="conversation 'odd'"):
        vlm.load_webdataset([shard], tmp_path / "pictures")


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    shard = tar(tmp_path / "0.tar", {"a.png": png("red"), "a.txt": b"red"})
    (tmp_path / "pictures").write_text("a file")
    with pytest.raises(DataError, match="cannot be unpacked into"):
        vlm.load_webdataset([shard], tmp_path / "pictures")
