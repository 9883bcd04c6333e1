# SPDX-License-Identifier: Apache-2.0
"""Conversations as people publish them: system turns, later pictures, JSON Lines; bad ones are left out and counted."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import vlm
from aced_sdk.errors import DataError
from vlm.data.conversation import messages, pictures_of_turn
from vlm.data.samples import Samples

Json = dict[str, Any]
PICTURE = Image.new("RGB", (8, 8))
ROLES = {"user": "human", "assistant": "gpt", "system": "system"}


def as_llava(folder: Path, rows: list[Json], **options: Any) -> Samples:
    """Rows of messages in a file of LLaVA's form."""
    PICTURE.save(folder / "a.png")
    entries = []
    for row in rows:
        turns = [{"from": ROLES[turn["role"]], "value": turn["content"]} for turn in row["messages"]]
        entries.append(row | {"image": ["a.png"] * len(row.get("images", [])), "conversations": turns})
    (folder / "data.json").write_text(json.dumps([{k: v for k, v in e.items() if k != "images"} for e in entries]))
    return vlm.load_llava(folder / "data.json", folder, **options)


def as_messages(_: Path, rows: list[Json], **options: Any) -> Samples:
    return vlm.load_messages(rows, **options)


def as_tar(folder: Path, rows: list[Json], **options: Any) -> Samples:
    """Rows of messages in a tar; each sample of a tar has one picture at most."""
    stream = io.BytesIO()
    PICTURE.save(stream, "PNG")
    with tarfile.open(folder / "a.tar", "w") as tar:
        for number, row in enumerate(rows):
            members = {"json": json.dumps({k: v for k, v in row.items() if k != "images"}).encode()}
            members |= {"png": stream.getvalue()} if row.get("images") else {}
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{number}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return vlm.load_webdataset([folder / "a.tar"], folder / "out", **options)


READERS = pytest.mark.parametrize("read", [as_llava, as_messages, as_tar])
Reader = Callable[..., Samples]


def talk(*texts: str, images: int = 0, system: str = "", **more: Any) -> Json:
    """Texts take turns, the user first."""
    turns = [{"role": "system", "content": system}] if system else []
    turns += [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
    return {"messages": turns, "images": [PICTURE] * images, **more}


@READERS
@pytest.mark.parametrize(
    ("row", "turns"),
    [
        (talk("Hello", "hi", "<image>\nWhat?", "red", images=1), (("Hello", "hi"), ("<image>What?", "red"))),
        (talk("Hello", "hi", "What? <image>", "red", images=1), (("Hello", "hi"), ("<image>What?", "red"))),
        (talk("Is <image> red?", "no", images=1), (("Is <image> red?", "no"),)),
        (talk("<image>\nWhat?", "red", "Sure?", "yes", images=1), (("What?", "red"), ("Sure?", "yes"))),
    ],
)
def test_pictures_are_where_they_were_written(tmp_path: Path, read: Reader, row: Json, turns: Any) -> None:
    (sample,) = read(tmp_path, [row])
    assert (sample.turns, len(sample.images)) == (turns, 1)


@pytest.mark.parametrize("read", [as_llava, as_messages])
def test_several_pictures_keep_their_places(tmp_path: Path, read: Reader) -> None:
    row = talk("<image>\nWhat?", "red", "Is it like <image> or <image>?", "no", images=3, system="Be brief.")
    (sample,) = read(tmp_path, [row])
    assert sample.turns == (("<image>What?", "red"), ("Is it like <image> or <image>?", "no"))
    written = messages(sample.turns, 3, sample.system)
    assert [turn["role"] for turn in written] == ["system", "user", "assistant", "user", "assistant"]
    shown = [[part["type"] for part in turn["content"]] for turn in written]
    assert shown == [["text"], ["image", "text"], ["text"], ["text", "image", "text", "image", "text"], ["text"]]
    assert pictures_of_turn(sample.turns, 0) == ("<image>What?", 1)
    assert pictures_of_turn(sample.turns, 1) == ("<image>Is it like <image> or <image>?", 3)
    assert pictures_of_turn((("What?", "red"), ("Sure?", "yes")), 1) == ("Sure?", None)


@READERS
def test_system_turns_are_kept(tmp_path: Path, read: Reader) -> None:
    (sample,) = read(tmp_path, [talk("<image>What?", "red", images=1, system="Be brief.")])
    assert (sample.system, sample.turns) == ("Be brief.", (("What?", "red"),))


def test_a_developer_is_a_system_and_two_are_one() -> None:
    row = talk("What?", "red", system="Be brief.")
    row["messages"].insert(0, {"role": "developer", "content": "Be kind."})
    assert vlm.load_messages([row])[0].system == "Be kind.\nBe brief."


def lines(rows: list[Json]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def entry(number: int) -> Json:
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": f"red\u2028{number}"}]
    return {"id": number, "conversations": turns}


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte-order mark"])
@pytest.mark.parametrize("form", ["list", "lines", "lines of Windows", "lines without the last end", "one line"])
def test_files_of_conversations(tmp_path: Path, mark: bytes, form: str) -> None:
    rows = [entry(number) for number in range(1 if form == "one line" else 3)]
    text = json.dumps(rows, indent=1) if form == "list" else lines(rows)
    text = text.replace("\n", "\r\n") if form == "lines of Windows" else text
    text = text.rstrip("\n") if form == "lines without the last end" else text
    (tmp_path / "data.jsonl").write_bytes(mark + text.encode())
    samples = vlm.load_llava(tmp_path / "data.jsonl", tmp_path)
    assert [sample.turns[0][1] for sample in samples] == [f"red\u2028{number}" for number in range(len(rows))]


def test_raw_separators_do_not_break_a_line(tmp_path: Path) -> None:
    text = "".join(json.dumps(entry(number), ensure_ascii=False) + "\n" for number in range(2))
    (tmp_path / "data.jsonl").write_text(text, encoding="utf-8")
    assert len(vlm.load_llava(tmp_path / "data.jsonl", tmp_path)) == 2


def test_a_byte_order_mark_in_the_other_files(tmp_path: Path) -> None:
    PICTURE.save(tmp_path / "a.png")
    captions = {"images": [{"id": 1, "file_name": "a.png"}], "annotations": [{"image_id": 1, "caption": "red"}]}
    (tmp_path / "c.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(captions).encode())
    assert len(vlm.load_coco_captions(tmp_path / "c.json", tmp_path)) == 1


BAD = {
    "empty answer": talk("What?", " "),
    "empty question": talk(" ", "red"),
    "turns do not alternate": talk("What?"),
    "markers and pictures differ in number": talk("<image>What?", "red"),
    "unpaired surrogate": talk("What?", "red \ud800"),
    "picture outside of a question": talk("What?", "<image>", images=1),
    "too long": talk("What?", "red " * 2**19),
}


@READERS
@pytest.mark.parametrize("reason", BAD)
def test_one_bad_row_is_left_out_and_counted(tmp_path: Path, read: Reader, reason: str) -> None:
    rows = [talk("What?", "red", id=f"r{number}") for number in range(60)]
    rows[30] = BAD[reason] | {"id": "bad"}
    samples = read(tmp_path, rows)
    assert (len(samples), samples.reasons) == (59, {reason: 1})
    assert len(samples.skipped) == 1
    assert "30" in samples.skipped[0] or "'bad'" in samples.skipped[0]
    with pytest.raises(DataError, match=rf"1 of 60 .*\(1 {reason}\); the first: .*field: max_unusable_fraction"):
        read(tmp_path, rows, max_unusable_fraction=0.0)
    with pytest.raises(DataError, match=rf"2 of 12 .*\(2 {reason}\)"):
        read(tmp_path, [*rows[:10], rows[30], rows[30]])


def test_a_broken_line_is_counted(tmp_path: Path) -> None:
    text = lines([entry(number) for number in range(60)]).split("\n")
    text[7] = text[7][:20]
    (tmp_path / "data.jsonl").write_text("\n".join(text))
    samples = vlm.load_llava(tmp_path / "data.jsonl", tmp_path)
    assert (len(samples), samples.reasons) == (59, {"line is not JSON": 1})
    assert "line 8" in samples.skipped[0]


def test_reasons_of_words_and_pictures_are_counted_together(tmp_path: Path) -> None:
    PICTURE.save(tmp_path / "a.png")
    entries = [{"image": "a.png", "conversations": entry(number)["conversations"]} for number in range(48)]
    for one in entries:
        one["conversations"][0]["value"] = "<image>What?"
    entries[3]["image"] = "gone.png"
    entries[4]["conversations"][1]["value"] = ""
    (tmp_path / "data.json").write_text(json.dumps(entries))
    samples = vlm.load_llava(tmp_path / "data.json", tmp_path, max_unusable_fraction=0.05)
    assert samples.reasons == {"empty answer": 1, "unreadable picture": 1}
    with pytest.raises(DataError, match=r"2 of 48 conversations cannot be used"):
        vlm.load_llava(tmp_path / "data.json", tmp_path, max_unusable_fraction=0.03)


def coco(folder: Path, count: int) -> Json:
    PICTURE.save(folder / "a.png")
    images = [{"id": number, "file_name": "a.png"} for number in range(count)]
    return {"images": images, "annotations": [{"image_id": number, "caption": "red"} for number in range(count)]}


@pytest.mark.parametrize("bad", [{"image_id": 3, "caption": " "}, {"image_id": 999, "caption": "red"}, {}, 7])
def test_one_bad_caption_is_left_out_and_counted(tmp_path: Path, bad: Any) -> None:
    content = coco(tmp_path, 60)
    content["annotations"][3] = bad
    (tmp_path / "c.json").write_text(json.dumps(content))
    samples = vlm.load_coco_captions(tmp_path / "c.json", tmp_path)
    assert len(samples) == 59
    assert sum(samples.reasons.values()) == 1


@pytest.mark.parametrize(
    "bad", [{"answers": "x"}, {"image_id": 9}, {"question_id": 999}, {"multiple_choice_answer": ""}]
)
def test_one_bad_question_is_left_out_and_counted(tmp_path: Path, bad: Json) -> None:
    PICTURE.save(tmp_path / "1.png")
    asked = [{"question_id": number, "image_id": 1, "question": "What?"} for number in range(120)]
    facts = {"image_id": 1, "answer_type": "o", "multiple_choice_answer": "red", "answers": [{"answer": "red"}] * 4}
    answered = [{"question_id": number} | facts for number in range(120)]
    answered[5] |= bad
    (tmp_path / "q.json").write_text(json.dumps({"questions": asked}))
    (tmp_path / "a.json").write_text(json.dumps({"annotations": answered}))
    samples = vlm.load_vqav2(tmp_path / "q.json", tmp_path / "a.json", tmp_path, image_name="{image_id}.png")
    assert len(samples) == 119
    assert 1 <= sum(samples.reasons.values()) <= 2  # a question of another number lacks in both files


@pytest.mark.parametrize("rows", ["data.json", Path("data.json"), {"messages": []}, 7])
def test_rows_that_are_no_list(rows: Any) -> None:
    with pytest.raises(DataError, match="field: rows"):
        vlm.load_messages(rows)
