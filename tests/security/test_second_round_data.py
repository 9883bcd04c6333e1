# SPDX-License-Identifier: Apache-2.0
"""Pools, tasks and configs of a second round of attacks."""

from __future__ import annotations

import io
import os
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import aced_sdk
from aced_sdk.cache import write_stored
from aced_sdk.config import Data, DistillConfig, Stored
from aced_sdk.data import Pool, prepare
from aced_sdk.engine.deepspeed_engine import deepspeed_json
from aced_sdk.errors import ConfigError
from aced_sdk.evaluation import expand_names
from aced_sdk.evaluation.metrics import class_embeddings, merged_retrieval, multilabel, retrieval
from aced_sdk.evaluation.tasks import load_task, open_task
from aced_sdk.processing.plain import PictureError, open_picture, to_rgb
from tests import tiny
from tests.security.sandbox import Outcome, run

OPEN = "{'descr': '<f4', 'shape': (((("  # numpy's tokenizer raises an error of its own


def npy(shape: tuple[int, ...] | str, content: bytes = b"", kind: str = "<f4") -> bytes:
    """An array's file, or one with this text as its header."""
    text = shape if isinstance(shape, str) else repr({"descr": kind, "fortran_order": False, "shape": shape})
    header = text.encode() + b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + content


def npz(image: bytes, text: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("image_emb.npy", image)
        archive.writestr("text_emb.npy", text)
    return stream.getvalue()


def vector(width: int = 4) -> bytes:
    return npy((1, width), np.ones(width, "<f4").tobytes())


def plain(width: int, height: int, mode: str = "RGB", kind: str = "PNG") -> bytes:
    """A picture of one colour."""
    stream = io.BytesIO()
    Image.new(mode, (width, height)).save(stream, kind)
    return stream.getvalue()


# Embeddings and labels in arrays


def store(shard: str, target: str) -> int:
    data = Data(shards=(shard,), max_unusable_fraction=0.5)
    return int(write_stored(Stored(scale=1.0), Pool([shard]), Path(target), data).usable.sum())


def stored(folder: Path, bad: bytes) -> Outcome:
    good = {"txt": b"a", "npz": npz(vector(), vector())}
    shard = tiny.write_tar(folder / "0.tar", [good, good, {"txt": b"a", "npz": bad}])
    return run(store, str(shard), str(folder / "cache"), seconds=60)


@pytest.mark.parametrize("header", [OPEN, "'''", "(" * 90 + ")" * 90, "{1: 2}", "[]"])
def test_a_broken_header_of_stored_embeddings_is_one_bad_pair(tmp_path: Path, header: str) -> None:
    assert stored(tmp_path, npz(npy(header), vector())).returned() == 2


def test_a_negative_dimension_unpacks_nothing(tmp_path: Path) -> None:
    bomb = npy((-1, 4), bytes(200 * 2**20))
    outcome = stored(tmp_path, npz(bomb, vector()))
    assert outcome.returned() == 2
    assert outcome.mib < 100


def test_a_width_of_no_model_is_refused_before_memory_is_filled(tmp_path: Path) -> None:
    wide = {"txt": b"a", "npz": npz(vector(65_536), vector(65_536))}
    shard = tiny.write_tar(tmp_path / "0.tar", [wide] * 200)
    outcome = run(store, str(shard), str(tmp_path / "cache"))
    assert outcome.refused("too large")
    assert outcome.mib < 100


def write_task(
    folder: Path, kind: str, samples: list[dict[str, bytes]], names: str = "a\nb", prompt: str = "{c}"
) -> Path:
    tiny.write_tar(folder / "test" / "0.tar", samples)
    (folder / "dataset_type.txt").write_text(kind)
    (folder / "classnames.txt").write_text(names)
    (folder / "zeroshot_classification_templates.txt").write_text(prompt)
    return folder


def skipped(root: str) -> dict[str, int]:
    return load_task("t", Path(root), tiny.encoder(), max_unusable_fraction=0.5).skipped


DEEP = npy("(" * 90 + ")" * 90)


@pytest.mark.parametrize(
    "array", [npz(vector(), vector()), b"PK\x03\x04torn", npy(OPEN), DEEP, npy((10**14,), kind="|u1")]
)
def test_a_broken_array_of_labels_is_one_bad_sample(tmp_path: Path, array: bytes) -> None:
    good = {"png": tiny.picture(0), "npy": npy((2,), b"\1\0", "|u1")}
    write_task(tmp_path / "t", "multilabel", [good, good, good | {"npy": array}])
    assert run(skipped, str(tmp_path), seconds=60).returned() == {"no classes": 1}


def reopened(folder: str, name: str, content: bytes) -> None:
    pool, encoder = Pool([Path(folder) / "pool"]), tiny.encoder()
    data = Data(shards=(str(Path(folder) / "pool"),))
    (prepare(pool, encoder.processor, data, Path(folder) / "prepared").folder / name).write_bytes(content)
    prepare(pool, encoder.processor, data, Path(folder) / "prepared")


def test_a_broken_header_of_prepared_pictures_is_named(tmp_path: Path) -> None:
    tiny.write_pool(tmp_path / "pool", 2, 1)
    assert run(reopened, str(tmp_path), "images.npy", npy(OPEN), seconds=60).refused("cannot be used")


# Evaluation


def prompts(root: str) -> int:
    return len(open_task("t", Path(root)).classes)


def test_templates_that_multiply_names_are_refused(tmp_path: Path) -> None:
    write_task(tmp_path / "t", "classification", [{"txt": b""}], "\n".join(["a b " * 120] * 1000), "{c}" * 160)
    assert run(prompts, str(tmp_path)).refused("prompts of more than 1,000 letters")


def recalls(pictures: int, captions: int) -> float:
    import torch

    images, texts = torch.ones(pictures, 2), torch.ones(captions, 2)
    owner = torch.arange(captions) % pictures
    both = retrieval(images, texts, owner) | merged_retrieval(images, texts, owner, torch.arange(captions))
    return both["image_to_text_r1"]


def test_a_task_of_many_captions_is_ranked_in_pieces() -> None:
    outcome = run(recalls, 1500, 150_000, seconds=240, mib=4096)
    assert outcome.returned() <= 1
    assert outcome.mib < 1500


def test_metrics_in_pieces_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    images, texts = torch.nn.functional.normalize(torch.randn(2, 30, 8), dim=-1)
    owner, same = torch.randint(30, (30,)), torch.arange(30) % 20
    labels, encoder = torch.rand(30, 30) > 0.5, tiny.encoder()

    def figures() -> list[Any]:
        return [
            retrieval(images, texts, owner),
            merged_retrieval(images, texts, owner, same),
            multilabel(images, texts, labels),
            class_embeddings(encoder, list("abcde"), ["a {c}", "{c}"]).numpy().round(5).tolist(),
        ]

    whole = figures()
    for name in ("_PROMPTS", "_LABELS", "_MATCHES"):
        monkeypatch.setattr(f"aced_sdk.evaluation.metrics.{name}", 70 if name != "_PROMPTS" else 4)
    for one, expected in zip(figures(), whole, strict=True):
        assert one == pytest.approx(expected) if isinstance(one, dict) else one == expected


def test_names_of_tasks_are_no_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name, count in (("x1", 1), ("x{1,1}", 3), ("~", 3), ("home", 1)):
        write_task(tmp_path / name, "classification", [{"txt": b""}] * count)
    monkeypatch.chdir(tmp_path)
    assert len(open_task("x{1,1}", tmp_path).pool) == 3
    assert len(open_task("~", Path(".")).pool) == 3


def test_a_task_that_is_named_often_is_read_once() -> None:
    assert expand_names(["a", "stable_eval", "a", "stable_eval"]) == ["a", *expand_names(["stable_eval"])]


# Shards


def pool_of(shard: str) -> int:
    return len(Pool([shard]))


@pytest.mark.parametrize(
    "pattern",
    [
        "/x{0..99999999\n}.tar",  # braceexpand takes the line break for the end of the number
        "{0..999999999}" * 200_000,  # the product has a million digits
        "{0..999999999}" * 3000,
        "{1..1}" * 500_000,
        "/x{" + "0" * 4000 + "..999999}",  # a million names of 4,000 letters
    ],
)
def test_patterns_are_counted_before_they_are_expanded(pattern: str) -> None:
    outcome = run(pool_of, pattern, seconds=20)
    assert outcome.refused("data.shards")
    assert outcome.mib < 100


def test_a_shard_that_shrinks_gives_no_half_caption(tmp_path: Path) -> None:
    pool = Pool([tiny.write_pool(tmp_path, 2, 1)])
    os.truncate(pool.shards[0], pool.members(0)["txt"].offset + 3)
    with pytest.raises(aced_sdk.errors.DataError, match="cut off while"):
        pool.text(0)


# Pictures


def decoded(content: bytes) -> str:
    try:
        return str(to_rgb(open_picture(content)).size)
    except PictureError as error:
        return str(error)


def run_length_bmp(width: int, height: int) -> bytes:
    body = b"\x01\x00\x00\x00" * height + b"\x00\x01"
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(body), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 1078 + len(body), 0, 0, 1078) + info + bytes(1024) + body


def scans_jpeg(scans: int) -> bytes:
    picture = plain(64, 64, kind="JPEG")
    start = picture.index(b"\xff\xda")
    return picture[:-2] + picture[start:-2] * scans + b"\xff\xd9"


def tiled_tiff(tiles: int) -> bytes:
    """One tile of 8 x 8 pixels, many times."""
    numbers = [(256, 8 * tiles // 256), (257, 8 * 256), (258, 8), (259, 1), (262, 1), (277, 1), (322, 8), (323, 8)]
    tags = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in numbers]
    tags += [struct.pack("<HHII", tag, 4, tiles, 200) for tag in (324, 325)]
    head = b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + b"".join(tags)
    return head.ljust(200, b"\0") + struct.pack("<I", 8) * tiles


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (run_length_bmp(140_000, 705), "too many pixels"),
        (scans_jpeg(2000), "too many scans"),
        (tiled_tiff(102_400), "102,400 tiles"),
    ],
)
def test_few_bytes_do_not_take_long_to_decode(content: bytes, words: str) -> None:
    assert words in run(decoded, content, seconds=20).returned()


@pytest.mark.parametrize("mode", ["P", "LA"])
def test_a_large_picture_is_in_memory_twice_at_most(mode: str) -> None:
    outcome = run(decoded, plain(6000, 6000, mode), seconds=60, mib=2048)
    assert outcome.returned() == "(6000, 6000)"
    assert outcome.mib < 400


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "La", "P", "PA"])
def test_strips_of_a_picture_are_the_picture(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 41, 4), dtype=np.uint8))
    paths = {"La": ("LA", "La"), "P": ("RGB", "P"), "PA": ("RGB", "P", "PA")}
    for step in paths.get(mode, (mode,)):
        pixels = pixels.convert(step)
    whole = np.asarray(to_rgb(pixels))
    monkeypatch.setattr("aced_sdk.processing.plain.pictures._STRIP", 100)
    assert np.array_equal(np.asarray(to_rgb(pixels)), whole)


# Configs


def read(path: str) -> str:
    return DistillConfig.from_yaml(path).hash()


@pytest.mark.parametrize("text", ["".join(f"a{n}: 0\n" for n in range(40_000)), "teacher: [" + "1," * 40_000 + "]"])
def test_many_mistakes_are_counted(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    outcome = run(read, str(tmp_path / "c.yaml"), seconds=20)
    assert outcome.refused("mistakes" if text.startswith("teacher") else "40,000 fields")


def test_of_some_mistakes_a_few_are_told(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("".join(f"a{n}: 0\n" for n in range(300)))
    with pytest.raises(ConfigError, match=r"30\d mistakes: .*; and \d+ more"):
        read(str(tmp_path / "c.yaml"))


def test_the_deepspeed_json_imports_no_module() -> None:
    from aced_sdk.config import Engine, Optimizer

    given = {"torch_autocast": {"enabled": True, "lower_precision_safe_modules": ["evil.Module"]}}
    with pytest.raises(ConfigError, match="torch_autocast"):
        deepspeed_json(Engine(deepspeed=given), Optimizer(), 1)
