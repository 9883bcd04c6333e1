# SPDX-License-Identifier: Apache-2.0
"""Pictures, arrays, logs, caches, configs and the demo's files that cost far more than their size."""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from aced_sdk import config, presets
from aced_sdk.cache import stored
from aced_sdk.cache.manifest import read_manifest
from aced_sdk.data import Pool, UnusablePair
from aced_sdk.engine import deepspeed_engine
from aced_sdk.engine.deepspeed_engine import deepspeed_json
from aced_sdk.errors import CacheError, ConfigError, DataError
from aced_sdk.files import whole_folder
from aced_sdk.files.writing import _processes
from aced_sdk.processing.plain import PictureError, open_picture
from aced_sdk.reporting.rows import mistake
from benchmarks.ordering import evidence
from examples.quickstart import onnx_zero_shot, pictures
from examples.quickstart.settings import Settings
from tests import tiny
from tests.security.sandbox import run
from tools import prose

# -- pictures ---------------------------------------------------------------------------------------------------------


def segment(kind: int, content: bytes) -> bytes:
    return b"\xff" + bytes([kind]) + struct.pack(">H", len(content) + 2) + content


def jpeg(scans: int, marker: int | None) -> bytes:
    """A progressive JPEG; its scans are plain, or in a segment of a marker below SOF0."""
    tables = b"".join(segment(0xC4, bytes([kind << 4, 1]) + bytes(16)) for kind in (0, 1))
    head = segment(0xDB, b"\0" + b"\1" * 64) + segment(0xC2, struct.pack(">BHHBBBB", 8, 64, 64, 1, 1, 0x11, 0))
    first = segment(0xDA, b"\1\1\0\0\0\0") + b"\0"
    more = (segment(0xDA, b"\1\1\0\1\x3f\0") + b"\0") * scans
    hidden = more if marker is None else segment(marker, more)
    return b"\xff\xd8" + head + tables + segment(0xDD, b"\0\1") + first + hidden + b"\xff\xd9"


@pytest.mark.parametrize("marker", [None, 0x01, 0x02, 0xBF])
def test_scans_are_counted_in_segments_that_libjpeg_does_not_skip(marker: int | None) -> None:
    with pytest.raises(PictureError, match="too many scans"):
        open_picture(jpeg(200, marker))


def test_a_few_scans_are_decoded() -> None:
    assert open_picture(jpeg(10, None)).size == (64, 64)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@pytest.mark.parametrize("late", [False, True])
def test_a_png_has_few_colour_profiles(late: bool) -> None:
    plain, profile = tiny.picture(1), chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(2**20 - 1), 9))
    place = len(plain) - 12 if late else 33  # before the end, or behind the header
    assert open_picture(plain[:place] + profile + plain[place:]).size == (20, 18)
    with pytest.raises(PictureError, match="too many chunks"):
        open_picture(plain[:place] + profile * 500 + plain[place:])


def tiff(changes: dict[int, tuple[int, int, int]], extra: bytes = b"", order: str = "<", size: int = 16) -> bytes:
    """A grey TIFF; `changes` are type, count and value by tag, `extra` is at byte 400, and the pixels behind it."""
    tags = {256: (4, 1, size), 257: (4, 1, size), 258: (3, 1, 8), 259: (3, 1, 1), 262: (3, 1, 1), 277: (3, 1, 1),
            278: (4, 1, size), 273: (4, 1, 400 + len(extra)), 279: (4, 1, size * size)} | changes  # fmt: skip
    mark = b"II" if order == "<" else b"MM"
    entries = b"".join(entry(tag, *tags[tag], order=order) for tag in sorted(tags))
    head = struct.pack(f"{order}2sHIH", mark, 42, 8, len(tags)) + entries + bytes(4)
    return head.ljust(400, b"\0") + extra + bytes(size * size)


def entry(tag: int, kind: int, count: int, value: int, order: str = "<") -> bytes:
    short = struct.pack(f"{order}HH", value, 0) if kind == 3 and count == 1 else struct.pack(f"{order}I", value)
    return struct.pack(f"{order}HHI", tag, kind, count) + short


def directory(*tags: tuple[int, int, int, int], order: str = "<") -> bytes:
    entries = b"".join(entry(*tag, order=order) for tag in tags)
    return struct.pack(f"{order}H", len(tags)) + entries + bytes(4)


MANY = 3_000_000
TIFFS = {
    "EXIF": lambda: tiff({34665: (4, 1, 400)}, directory((40000, 3, MANY, 500)).ljust(100, b"\0") + bytes(2 * MANY)),
    "GPS, large end first": lambda: tiff(
        {34853: (4, 1, 400)},
        directory((40000, 3, MANY, 500), order=">").ljust(100, b"\0") + bytes(2 * MANY),
        order=">",
    ),
    "EXIF as a short": lambda: tiff(
        {34665: (3, 1, 400)}, directory((40000, 3, MANY, 500)).ljust(100, b"\0") + bytes(2 * MANY)
    ),
    "a directory in a directory": lambda: tiff(
        {34665: (13, 1, 400)},
        directory((40965, 4, 1, 500)).ljust(100, b"\0")
        + directory((1, 3, MANY, 600)).ljust(100, b"\0")
        + bytes(2 * MANY),
    ),
    "many tags": lambda: tiff(
        {34665: (4, 1, 400)},
        directory(*((40000 + k, 3, 100_000, 1000) for k in range(30))).ljust(600, b"\0") + bytes(2 * MANY),
    ),
    "strips that share bytes": lambda: tiff(
        {273: (4, 20_000, 400), 279: (4, 20_000, 80_400)},
        struct.pack("<I", 400) * 20_000 + struct.pack("<I", 100_000) * 20_000,
    ),
}


@pytest.mark.parametrize("attack", TIFFS)
def test_every_directory_of_a_tiff_has_bounds(attack: str) -> None:
    content = TIFFS[attack]()
    with pytest.raises(PictureError, match=r"values in its tags|strips of"):
        open_picture(content)


def test_usual_tiffs_are_read() -> None:
    exif = directory((36864, 7, 4, 0), (37500, 7, 40, 0))
    assert open_picture(tiff({34665: (4, 1, 400)}, exif)).size == (16, 16)
    assert open_picture(tiff({34665: (4, 1, 8)})).size == (16, 16)  # a directory that names itself
    assert open_picture(tiff({279: (4, 1, 2**32 - 1)})).size == (16, 16)  # a length that nobody knew
    for compression in ("raw", "tiff_lzw", "tiff_deflate", "packbits"):
        stream = io.BytesIO()
        Image.new("RGB", (700, 900), "red").save(stream, "TIFF", compression=compression, tiffinfo={278: 1})
        assert open_picture(stream.getvalue()).getpixel((699, 899)) == (255, 0, 0)


def test_orientation_is_applied_to_tiff_alone() -> None:
    """As Pillow does when it loads a picture, and so open_clip."""
    sizes = {}
    for kind in ("tiff", "jpeg", "png", "webp"):
        stream, exif = io.BytesIO(), Image.Exif()
        exif[274] = 6
        Image.new("L", (30, 10)).save(stream, kind, exif=exif)
        sizes[kind] = open_picture(stream.getvalue()).size
    assert sizes == {"tiff": (10, 30), "jpeg": (30, 10), "png": (30, 10), "webp": (30, 10)}


# -- pools, caches and logs -------------------------------------------------------------------------------------------


def npz(entries: int) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name in ("image_emb", "text_emb", *(f"x{k}" for k in range(entries))):
            with archive.open(f"{name}.npy", "w") as file:
                np.save(file, np.ones((1, 8), np.float32))
    return stream.getvalue()


def test_an_npz_has_few_entries(tmp_path: Path) -> None:
    pair = tiny.pair(0)
    pool = Pool([tiny.write_tar(tmp_path / "0.tar", [pair | {"npz": npz(20)}, pair | {"npz": npz(300)}])])
    settings = config.Stored(scale=1.0)
    assert stored._arrays(settings, pool, 0)[0].shape == (1, 8)
    with pytest.raises(UnusablePair, match="unreadable npz"):
        stored._arrays(settings, pool, 1)


STEP = {"event": "step_done", "step": 1, "loss": 1.0, "learning_rate": 1.0, "gradient_norm": 1.0, "trained": 1,
        "seconds": 1.0, "data_seconds": 1.0}  # fmt: skip
ROWS: dict[str, Any] = {
    "picked": lambda: {"event": "selected", "step": 1, "statistics": {}, "picked": [-1] * MANY},
    "candidates": lambda: {"event": "selected", "step": 1, "statistics": {}, "candidates": [""] * MANY},
    "parts": lambda: STEP | {"parts": dict.fromkeys(map(str, range(MANY // 3)), "")},
    "metrics": lambda: {"event": "evaluated", "step": 1, "trained": 1, "scored": 1,
                        "metrics": {"t": dict.fromkeys(map(str, range(MANY // 3)), "")}},
    "scores": lambda: {"event": "selected", "step": 1, "statistics": {},
                       "scores": dict.fromkeys(map(str, range(MANY // 3)), "")},
}  # fmt: skip


def _mistake(name: str) -> str | None:
    return mistake(ROWS[name]())


@pytest.mark.parametrize("name", ROWS)
def test_a_row_with_many_mistakes_costs_as_much_as_one(name: str) -> None:
    outcome = run(_mistake, name, seconds=10, mib=700)
    assert name in outcome.returned()
    assert outcome.mib < 400


CACHES = {
    "numbers": b'"shards":[' + b"0," * 5_000_000 + b"0]",
    "fields": b",".join(b'"%d":0' % number for number in range(200_000)),
    "size": b'"model":"' + b"x" * 2**25 + b'"',
}


def _read(folder: Path) -> Any:
    return read_manifest(folder)


@pytest.mark.parametrize("name", CACHES)
def test_a_manifest_of_a_cache_has_bounds(tmp_path: Path, name: str) -> None:
    start = b"" if name == "size" else b'"model":"x","dim":1,"scale":1,"bias":0,'
    (tmp_path / "cache.json").write_bytes(b"{" + start + CACHES[name] + b"}")
    outcome = run(_read, tmp_path, seconds=10, mib=1500)
    assert outcome.refused(CacheError.__name__, "is no embedding cache")
    assert outcome.mib < 1000


# -- configs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"zero_optimization": {"stage": 1}}, "engine.zero_stage is 0"),
        ({"zero_optimization": True}, "write an object"),
        ({"zero_optimization": []}, "write an object"),
        ({"steps_per_print": 0}, "write a number above 0"),
        ({"steps_per_print": "x"}, "write a number above 0"),
        ({"wall_clock_breakdown": 3}, "write true or false"),
    ],
)
def test_deepspeed_json_sets_no_stage_and_no_odd_types(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        deepspeed_json(config.Engine(deepspeed=given), config.Optimizer(), 7)


def test_deepspeed_json_may_repeat_the_stage() -> None:
    given = {"zero_optimization": {"stage": 2}, "steps_per_print": 5}
    values = deepspeed_json(config.Engine(zero_stage=2, deepspeed=given), config.Optimizer(), 7)
    assert (values["zero_optimization"], values["steps_per_print"]) == ({"stage": 2}, 5)


@pytest.mark.parametrize("name", ["nonsense", "cuda"])
def test_another_accelerator_than_the_engines_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", name)
    with pytest.raises(ConfigError, match="DS_ACCELERATOR"):
        deepspeed_engine._import(torch.device("cpu"))


def test_architectures_are_finite_trees() -> None:
    itself: dict[str, Any] = {}
    itself |= {"a": itself, "b": itself}
    for wrong in (itself, {"a": 10**5000}, {"a": [{"b": -(10**5000)}]}):
        with pytest.raises(ConfigError, match="architecture"):
            config.Student(architecture=wrong)
    deep: dict[str, Any] = {"a": 1}
    for _ in range(50):
        deep = {"a": deep}
    assert len(config.Student(architecture=deep).hash()) == 12


def test_an_objective_has_few_terms() -> None:
    term = config.Distillation(weight=1.0)
    assert len(config.Objective(distillation=(term,) * 64).distillation) == 64
    with pytest.raises(ConfigError, match="at most 64"):
        config.Objective(distillation=(term,) * 65)


@pytest.mark.parametrize("field", ["sub_batch", "examples"])
def test_sizes_of_presets_are_numbers(field: str) -> None:
    for value in (None, "x", 0, -1, float("nan"), float("inf"), 10**5000, True, [8]):
        with pytest.raises(ConfigError, match="is not a number above 0"):
            presets.aced(**{field: value})  # type: ignore[arg-type]
    assert presets.aced(examples=64_000, sub_batch=64).schedule.steps == 1000


def test_a_backend_that_matplotlib_does_not_know_is_named(tmp_path: Path) -> None:
    code = "from aced_sdk.reporting.page import line_chart; line_chart({'a': [(0, 1)]}, label='', x='', y='')"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"MPLBACKEND": "nonsense"}, capture_output=True, text=True
    )
    assert "ConfigError: matplotlib cannot be imported" in done.stderr


# -- files of the demo, the benchmarks and the tools ------------------------------------------------------------------


def test_a_folder_of_another_container_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    monkeypatch.setattr("os.getpid", lambda: dead.pid)  # as this process's number is unknown elsewhere
    with whole_folder(tmp_path / "out") as temporary:
        (temporary / "file").write_text("mine")
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr("aced_sdk.files.writing._processes", lambda: "1-")
            with whole_folder(tmp_path / "out"):
                pass
        assert (temporary / "file").is_file()
    assert (tmp_path / "out" / "file").is_file()
    assert _processes() == "" or _processes()[:-1].isdigit()


def test_answers_show_pictures_of_the_box_alone(tmp_path: Path) -> None:
    (tmp_path / "box").mkdir()
    for place in ("secret.png", "box/own.png"):
        (tmp_path / place).write_bytes(tiny.picture(5))
    (tmp_path / "box" / "link.png").symlink_to(tmp_path / "secret.png")
    assert pictures._open(str(tmp_path / "box" / "own.png"), tmp_path / "box").size == (20, 18)
    for wrong in ("secret.png", "box/../secret.png", "box/link.png", "box/none.png"):
        with pytest.raises(DataError, match="demo's folder"):
            pictures._open(str(tmp_path / wrong), tmp_path / "box")


@pytest.mark.parametrize(
    "wrong", [{"processes": 0}, {"seeds": ()}, {"steps": -1}, {"evaluate_every": -1}, {"box": "../x"}, {"sub_batch": 0}]
)
def test_settings_of_the_demo_have_bounds(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Settings(**wrong)


def _pictures(folder: Path) -> int:
    return len(onnx_zero_shot._pictures(folder)[0])


def test_a_sparse_member_is_not_unpacked(tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.png")
    head = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    head[156] = ord("S")
    head[386:410] = b"%011o\0" % 0 * 2
    head[483:495] = b"\x80" + (3 << 30).to_bytes(11, "big")
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    (tmp_path / "0.tar").write_bytes(bytes(head) + bytes(1024))
    assert run(_pictures, tmp_path, seconds=10, mib=500).refused("a.png", "0.tar")


def test_honest_tasks_of_the_demo_are_read(tmp_path: Path) -> None:
    tiny.write_tar(tmp_path / "0.tar", [{"png": tiny.picture(k), "cls": b"%d" % k} for k in range(3)])
    images, labels = onnx_zero_shot._pictures(tmp_path)
    assert [image.size for image in images] == [(20, 18)] * 3
    assert labels == [0, 1, 2]


def test_names_in_tables_are_plain() -> None:
    tried = [{"<img src=x onerror=alert(1)>": 1, "score": 0.5}]
    table = evidence._tuning({"iid": {"tried": tried, "chosen": {"a|b\n# learning_rate": 1}}})
    assert not set("<>#\n") & set(table.splitlines()[-1])
    assert len(table.splitlines()) == 3
    assert "a b   learning rate 1" in table
    assert evidence._plain("iid < h_acid") == "iid < h acid"
    assert "0.25" in evidence._sweep_table({"0.25": {}}, "score")


def test_prose_names_files_that_it_cannot_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("pipe", "bytes", "open"):
        (tmp_path / name).mkdir()
    os.mkfifo(tmp_path / "pipe" / "a.py")
    (tmp_path / "bytes" / "a.py").write_bytes(b"\xff\xfe")
    (tmp_path / "open" / "a.py").write_text("(" * 100)
    for name in ("pipe", "bytes", "open"):
        monkeypatch.setattr("sys.argv", ["prose", str(tmp_path / name)])
        with pytest.raises(SystemExit):
            prose.main()
        assert f"{name}/a.py" in capsys.readouterr().err


def test_a_log_without_scored_examples_is_reported(tmp_path: Path) -> None:
    from aced_sdk.reporting.jsonl import read_events

    (tmp_path / "events.jsonl").write_text(json.dumps(STEP | {"parts": {}}) + "\n")
    assert len(list(read_events(tmp_path / "events.jsonl"))) == 1
