# SPDX-License-Identifier: Apache-2.0
"""Hostile tars, samples and evaluation tasks: refused by name or skipped and counted; no hang, no memory filled."""

from __future__ import annotations

import io
import os
import struct
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from PIL import Image

from aced_sdk.cache import write_stored
from aced_sdk.config import Data, Stored
from aced_sdk.data import Decoding, FullOrder, Pool, RowSet, SuperBatches
from aced_sdk.data.shards import shard_paths
from aced_sdk.data.tars import entries
from aced_sdk.errors import DataError
from aced_sdk.evaluation import load_task
from tests.security.sandbox import MIB, run

# -- names of shards ----------------------------------------------------------------------------------------------

NAMES = {
    "one range": "{0..1000000000}.tar",
    "a product": "x" + "{0..9}" * 9,
    "letters": "{a..z}" * 6,
    "commas": "{a,b,c,d}" * 12,
    "nested": "{" * 3000 + "a,b" + "}" * 3000,
    "long numbers": "{1.." + "9" * 6000 + "}",
    "unknown user": "~nosuchuser/0.tar",
    "unknown user in braces": "{~nosuchuser,b}/0.tar",
    "NUL": "a\0b.tar",
    "long": "x" * 5000,
    "pipe": "",
}


def _paths(name: str) -> int:
    return len(shard_paths([name])[0])


@pytest.mark.parametrize("name", NAMES)
def test_a_hostile_name_of_a_shard_is_refused(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / "pipe.tar")
    given = str(tmp_path / "pipe.tar") if name == "pipe" else NAMES[name]
    assert run(_paths, given, mib=256).refused("data.shards")


def test_nested_patterns_within_the_bound_are_counted_exactly(tmp_path: Path) -> None:
    """1,000 x 1,000 names in two branches would be refused if branches multiplied."""
    outcome = run(_paths, f"{tmp_path}/{{a/{{0..999}}{{0..99}},b/{{00..99}}{{x,y,{{z,w}}}}}}.tar")
    assert outcome.refused("there is no shard", "a/00.tar")


# -- tars ---------------------------------------------------------------------------------------------------------


def header(name: str = "0.txt", size: bytes = b"00000000001", kind: bytes = b"0") -> bytes:
    """A tar header with a right checksum and whatever size."""
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT))
    block[124:136] = size.ljust(12, b"\0")
    block[156:157] = kind
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % 512)


NEGATIVE = b"\xff" * 11 + b"\0"
TARS: dict[str, bytes] = {
    "a negative size, which leads back": header(size=NEGATIVE) + bytes(1024),
    "a long name of a petabyte": header(size=b"\x80" + (10**15).to_bytes(11, "big"), kind=b"L") + bytes(1024),
    "a pax header of a petabyte": header(size=b"\x80" + (10**15).to_bytes(11, "big"), kind=b"x") + bytes(1024),
    "a pax header of digits": header(size=b"%o" % 900_000, kind=b"x") + padded(b"1" * 900_000) + bytes(1024),
    "a pax record of length 0": header(size=b"12", kind=b"x") + padded(b"0 path=a\n") + header() + bytes(1024),
    "a pax size below 0": header(size=b"15", kind=b"x") + padded(b"13 size=-512\n") + header() + bytes(1024),
    "a sparse file": header(size=b"1000", kind=b"S") + bytes(2048),
    "a size beyond the end": header(size=b"77777777777") + bytes(1024),
    "a size that is no number": header(size=b"1_0 0x") + bytes(1024),
}


def _index(path: Path) -> int:
    return len(Pool([path]))


@pytest.mark.parametrize("name", TARS)
def test_a_hostile_tar_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "0.tar").write_bytes(TARS[name])
    cause = "sparse" if name == "a sparse file" else "broken or cut off"
    assert run(_index, tmp_path / "0.tar", mib=256).refused(cause, "data.shards")


@pytest.mark.parametrize("target", ["a pipe", "/dev/zero", "nothing"])
def test_a_folder_of_shards_may_hold_no_pipe_and_no_device(tmp_path: Path, target: str) -> None:
    tiny.write_pool(tmp_path, pairs=8)
    if target == "a pipe":
        os.mkfifo(tmp_path / "9.tar")
    else:
        (tmp_path / "9.tar").symlink_to(target)
    assert run(_index, tmp_path, mib=256).refused("9.tar")


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_honest_tars_are_read_as_tarfile_reads_them(tmp_path: Path, form: int) -> None:
    path = tmp_path / "0.tar"
    names = ["a.png", "d/e.txt", "ü.txt", f"{'p' * 90}/{'n' * 80}.png"]
    names += [] if form == tarfile.USTAR_FORMAT else ["l" * 300 + ".txt", "中" * 90 + ".json"]
    with tarfile.open(path, "w", format=form) as tar:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = 511 + number, 0.5
            tar.addfile(info, io.BytesIO(bytes(info.size)))
            for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE):
                info = tarfile.TarInfo(f"other{number}")
                info.type, info.linkname = kind, "t" * 90
                tar.addfile(info)
    with tarfile.open(path) as tar:
        expected = [(m.name, m.offset_data, m.size) for m in tar if m.isfile()]
    with path.open("rb") as stream:
        found = [(name, m.offset, m.size) for _, name, m in entries(stream, path.stat().st_size) if m]
    assert found == expected
    assert len(found) == len(names)


# -- samples ------------------------------------------------------------------------------------------------------


def encoded(kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (32, 32), (200, 10, 10)).save(stream, kind, **options)
    return stream.getvalue()


def scans(count: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    stream = io.BytesIO()
    Image.new("L", (6000, 6000), 128).save(stream, "jpeg", progressive=True)
    content = stream.getvalue()
    return content[:-2] + content[content.rfind(b"\xff\xda") : -2] * count + content[-2:]


def changed(content: bytes, at: int, by: bytes) -> bytes:
    return content[:at] + by + content[at + len(by) :]


def ppm(width: int, height: int) -> bytes:
    return b"P6 %d %d 255\n" % (width, height)


def bomb(width: int, height: int) -> bytes:
    """A PNG that claims a size, with hardly any data."""
    content = bytearray(encoded("png"))
    content[16:24] = struct.pack(">II", width, height)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


# Contents are made when a test asks for them: every child imports this module.
PICTURES: dict[str, tuple[Callable[[], bytes], str]] = {
    "EPS": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EOF\n", "unreadable picture"),
    "ICO": (lambda: encoded("ico"), "unreadable picture"),
    "ICNS": (lambda: encoded("icns"), "unreadable picture"),
    "DDS": (lambda: changed(encoded("dds"), 80, b"\4\0\0\0ABCD"), "unreadable picture"),
    "AVIF": (lambda: changed(encoded("avif"), 84, b"\xff"), "unreadable picture"),
    "torn AVIF": (lambda: encoded("avif")[:-40], "unreadable picture"),
    "PPM": (lambda: ppm(30_000, 30_000), "unreadable picture"),
    "bomb": (lambda: bomb(60_000, 60_000), "too many pixels"),
    "long": (lambda: bomb(40_000, 2), "too long and thin"),
    "JPEG scans": (lambda: scans(3000), "too many scans or too much EXIF data"),
    "JPEG segments": (lambda: encoded("jpeg")[:2] + b"\xff\xfe\0\2" * 1_000_000, "unreadable picture"),
    "torn": (lambda: encoded("webp")[:40], "unreadable picture"),
    "empty": (bytes, "unreadable picture"),
}


def _fetch(folder: Path, **changes: Any) -> tuple[int, Counter[str]]:
    """How many pairs of a pool were usable, and why the others were not."""
    pool = Pool([folder])
    decoder = Decoding(pool, tiny.encoder().processor, Data(shards=("unused",), max_unusable_fraction=0.5, **changes))
    batch = decoder.fetch(np.arange(len(pool)))
    pool.noisy(np.arange(len(pool)))
    return len(batch), decoder.skipped


@pytest.mark.parametrize("kind", PICTURES)
def test_a_hostile_picture_is_skipped_and_counted(tmp_path: Path, kind: str) -> None:
    content, reason = PICTURES[kind]
    tiny.write_pool(tmp_path, pairs=8, broken={3: tiny.pair(3) | {"png": content()}})
    outcome = run(_fetch, tmp_path, mib=512)
    assert outcome.returned() == (7, Counter({reason: 1}))
    assert outcome.mib < 200


def _fetch_beside(folder: Path, programs: Path) -> Counter[str]:
    os.environ["PATH"] = f"{programs}:{os.environ['PATH']}"
    return _fetch(folder)[1]


def test_a_postscript_file_starts_no_ghostscript(tmp_path: Path) -> None:
    (tmp_path / "programs").mkdir()
    program = tmp_path / "programs" / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/code-has-run\n")
    program.chmod(0o755)
    tiny.write_pool(tmp_path / "pool", pairs=8, broken={3: tiny.pair(3) | {"png": PICTURES["EPS"][0]()}})
    assert run(_fetch_beside, tmp_path / "pool", tmp_path / "programs").returned() == {"unreadable picture": 1}
    assert not (tmp_path / "code-has-run").exists()


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "F", "CMYK", "LA", "1"])
def test_odd_modes_are_taken_or_counted(tmp_path: Path, mode: str) -> None:
    stream = io.BytesIO()
    Image.new(mode, (20, 20)).save(stream, "tiff")
    tiny.write_pool(tmp_path, pairs=8, broken={3: tiny.pair(3) | {"png": stream.getvalue()}})
    usable, bad = run(_fetch, tmp_path).returned()
    assert usable + bad.total() == 8
    assert set(bad) <= {"samples of 32 bits"}


MEMBERS: dict[str, tuple[str, Callable[[], bytes], str | None]] = {
    "a word of 200 kB": (
        "txt",
        lambda: bytes(97 + n * n % 26 for n in range(200_000)),
        "KEY.txt has too many bytes",
    ),
    "a caption of 20 MB": ("txt", lambda: b"a cat " * 3_500_000, "KEY.txt has too many bytes"),
    "lists in lists": ("json", lambda: b"[" * 500_000, None),
    "objects in objects": ("json", lambda: b'{"a":' * 100_000 + b"1" + b"}" * 100_000, None),
    "a number of 100,000 digits": ("json", lambda: b'{"noisy":' + b"9" * 100_000 + b"}", None),
    "KEY.json of 20 MB": ("json", lambda: b"[" + b"[]," * 7_000_000 + b"[]]", None),
}


@pytest.mark.parametrize("name", MEMBERS)
def test_a_hostile_text_is_skipped_and_counted(tmp_path: Path, name: str) -> None:
    extension, content, reason = MEMBERS[name]
    tiny.write_pool(tmp_path, pairs=8, broken={3: tiny.pair(3) | {extension: content()}})
    outcome = run(_fetch, tmp_path, mib=512)
    assert outcome.returned() == ((7, Counter({reason: 1})) if reason else (8, Counter()))
    assert outcome.seconds < 20
    assert outcome.mib < 120


def test_the_bound_on_captions_is_the_configs(tmp_path: Path) -> None:
    tiny.write_pool(tmp_path, pairs=8, broken={3: tiny.pair(3) | {"txt": b"a cat " * 1000}})
    assert run(_fetch, tmp_path).returned()[0] == 7
    pool = Pool([tmp_path])
    roomy = Decoding(pool, tiny.encoder().processor, Data(shards=("unused",), max_caption_bytes=6000))
    assert len(roomy.fetch(np.arange(8))) == 8


@pytest.mark.parametrize("extension", ["png", "txt", "json"])
def test_a_member_of_gigabytes_is_not_read(tmp_path: Path, extension: str) -> None:
    size = 3 * 2**30
    with (tmp_path / "0.tar").open("wb") as stream:
        for number, content in enumerate([tiny.picture(0), b"a cat"]):
            stream.write(header(f"0.{('png', 'txt')[number]}", b"%o" % len(content)) + padded(content))
        stream.write(header(f"1.{extension}", b"%o" % size))
        stream.truncate(stream.tell() + size + 1024)  # a hole: nothing is on the disk
    outcome = run(_fetch, tmp_path, mib=512)
    usable, bad = outcome.returned()
    assert (usable, bad.total(), outcome.mib < 120) == (1, 1, True)


def _batch(folder: Path) -> int:
    pool = Pool([folder])
    decoder = Decoding(pool, tiny.encoder().processor, Data(shards=("unused",), max_unusable_fraction=1))
    order = FullOrder([range(len(pool))], 4, 0)
    batches = SuperBatches(decoder, order, 4, order.start(), RowSet(len(pool)))
    try:
        return len(next(batches)[0])
    finally:
        batches.close()


def test_a_pool_of_nothing_usable_ends_the_run_whatever_the_bound(tmp_path: Path) -> None:
    tiny.write_pool(tmp_path, pairs=8, broken={row: {"png": b"?", "txt": b"x"} for row in range(8)})
    assert run(_batch, tmp_path).refused("no pair of the pool is usable")


def test_keys_that_are_not_utf8_are_names_all_the_same(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        info = tarfile.TarInfo("\udcff\x1b[31m.txt")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"x"))
    assert Pool([tmp_path]).key(0).encode()


# -- embeddings in shards -----------------------------------------------------------------------------------------


def npy(shape: str, kind: str = "'<f4'", data: bytes = b"") -> bytes:
    text = f"{{'descr': {kind}, 'fortran_order': False, 'shape': {shape}, }}".ljust(117).encode() + b"\n"
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(text)) + text + data


def archive(image: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as packed:
        packed.writestr("image_emb.npy", image)
        packed.writestr("text_emb.npy", npy("(1, 12)", data=np.ones(12, "<f4").tobytes()))
    return stream.getvalue()


ARCHIVES: dict[str, tuple[Callable[[], bytes], str]] = {
    "a bomb": (lambda: npy("(100000000, 12)", data=bytes(200 * MIB)), "stored embeddings are too large"),
    "a bomb of the right shape": (lambda: npy("(3, 12)", data=bytes(200 * MIB)), "stored embeddings not finite, or"),
    "a claim": (lambda: npy("(1000000000000, 12)"), "stored embeddings are too large"),
    "a long header": (
        lambda: b"\x93NUMPY\x02\0" + struct.pack("<I", 200 * MIB) + b" " * 200 * MIB,
        "unreadable npz",
    ),
    "a wide one": (lambda: npy("(1, 1000000)", data=bytes(4_000_000)), "stored embeddings are too large"),
    "deep": (lambda: npy("-" * 30 + "(" * 60), "unreadable npz"),
    "python 2": (lambda: npy("(3L, 12"), "unreadable npz"),
}


def _stored(folder: Path) -> str:
    pool = Pool([folder / "pool"])
    try:
        write_stored(Stored(scale=10.0), pool, folder / "c", Data(shards=("unused",), max_unusable_fraction=0))
    except DataError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", ARCHIVES)
def test_a_hostile_npz_is_skipped_and_counted(tmp_path: Path, name: str) -> None:
    made, reason = ARCHIVES[name]
    content = archive(made())
    fine = archive(npy("(3, 12)", data=np.ones(36, "<f4").tobytes()))
    samples = {row: tiny.pair(row) | {"npz": content if row == 5 else fine} for row in range(8)}
    tiny.write_pool(tmp_path / "pool", pairs=8, broken=samples)
    outcome = run(_stored, tmp_path, mib=512)
    assert f"1 of 8 pairs are unusable (1 {reason}" in outcome.returned()
    assert outcome.mib < 100


# -- evaluation tasks ---------------------------------------------------------------------------------------------


def task(root: Path, kind: str = "classification") -> Path:
    samples = [{"png": tiny.picture(n), "cls": b"0", "txt": b"a cat"} for n in range(4)]
    tiny.write_tar(root / "t" / "test" / "0.tar", samples)
    (root / "t" / "classnames.txt").write_text("cat\nboat\n")
    (root / "t" / "zeroshot_classification_templates.txt").write_text("a {c}\n")
    (root / "t" / "dataset_type.txt").write_text(kind)
    return root / "t"


def _task(root: Path, name: str = "t") -> tuple[int, dict[str, int]]:
    loaded = load_task(name, root, tiny.encoder(), max_unusable_fraction=1)
    return len(loaded.images), loaded.skipped


FILES = [("classnames.txt", attack) for attack in ("pipe", "device", "link out", "not UTF-8", "large", "long line")]
FILES += [("zeroshot_classification_templates.txt", attack) for attack in ("pipe", "link out", "long line")]
FILES += [("dataset_type.txt", attack) for attack in ("pipe", "device", "link out", "not UTF-8", "large")]


@pytest.mark.parametrize(("file", "attack"), FILES)
def test_a_hostile_file_of_a_task_is_refused(tmp_path: Path, file: str, attack: str) -> None:
    path = task(tmp_path / "tasks") / file
    path.unlink()
    (tmp_path / "private").write_text("retrieval")
    if attack == "pipe":
        os.mkfifo(path)
    elif attack in ("device", "link out"):
        path.symlink_to("/dev/zero" if attack == "device" else tmp_path / "private")
    else:
        path.write_bytes({"not UTF-8": b"\xff", "large": b"a\n" * 3_000_000, "long line": b"a" * 20_000}[attack])
    assert run(_task, tmp_path / "tasks", mib=512).refused()


@pytest.mark.parametrize(("name", "template"), [("cat\n", "a {c}\n"), ("c" * 400 + "\n", "{c}" * 150 + "\n")])
def test_a_product_of_classes_and_templates_is_bounded(tmp_path: Path, name: str, template: str) -> None:
    folder = task(tmp_path)
    (folder / "classnames.txt").write_text(name * (4_000_000 // len(name)))
    (folder / "zeroshot_classification_templates.txt").write_text(template * 100)
    assert run(_task, tmp_path, mib=512).refused("prompts")


@pytest.mark.parametrize("name", ["../t", "/t", "a\0b", "x" * 5000, "\x1b[31m"], ids=repr)
def test_a_task_is_a_folder_of_the_root(tmp_path: Path, name: str) -> None:
    task(tmp_path)
    (tmp_path / "root").mkdir()
    outcome = run(_task, tmp_path / "root", str(tmp_path / "t") if name == "/t" else name)
    assert outcome.refused("there is no task")
    assert "\x1b" not in outcome.value


SAMPLES: dict[str, tuple[str, str, Callable[[], bytes], str]] = {
    "EPS": ("classification", "png", PICTURES["EPS"][0], "unreadable picture"),
    "broken AVIF": ("classification", "png", PICTURES["AVIF"][0], "unreadable picture"),
    "a class of 20 MB": ("classification", "cls", lambda: b"0" * 20_000_000, "KEY.cls has too many bytes"),
    "captions without end": ("retrieval", "txt", lambda: b"a\n" * 30_000, "too many captions"),
    "a long caption": ("retrieval", "txt", lambda: b"a" * 20_000, "caption has too many bytes"),
    "a caption of 20 MB": ("retrieval", "txt", lambda: b"a" * 20_000_000, "KEY.txt has too many bytes"),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_a_hostile_sample_of_a_task_is_skipped_and_counted(tmp_path: Path, name: str) -> None:
    kind, extension, content, reason = SAMPLES[name]
    folder = task(tmp_path, kind)
    samples = [{"png": tiny.picture(n), "cls": b"0", "txt": b"a cat"} for n in range(4)]
    samples[2][extension] = content()
    tiny.write_tar(folder / "test" / "0.tar", samples)
    assert run(_task, tmp_path, mib=512).returned() == (3, {reason: 1})
