# SPDX-License-Identifier: Apache-2.0
"""Tars that are unusual: each is read rightly, its samples are skipped under their own reason, or it is refused."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from tiny import picture

from aced_sdk.data.pool import Pool, UnusablePair
from aced_sdk.errors import DataError


def blob(files: Sequence[tuple[str, bytes]]) -> bytes:
    """A tar of these files, in this order."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def pool(folder: Path, content: bytes) -> Pool:
    (folder / "0.tar").write_bytes(content)
    return Pool([folder / "0.tar"])


def pairs(found: Pool) -> list[tuple[str, str, str]]:
    """Key, caption and name of the picture that each row holds, or the reasons why not."""
    names = {picture(number): f"picture {number}" for number in range(8)}
    return [(found.key(row), _text(found, row), _picture(found, row, names)) for row in range(len(found))]


def _text(found: Pool, row: int) -> str:
    try:
        return found.text(row)
    except UnusablePair as reason:
        return f"({reason})"


def _picture(found: Pool, row: int, names: dict[bytes, str]) -> str:
    try:
        found.image(row, 10**6)
        return names[found.read(row, "png") or found.read(row, "jpg") or b""]
    except UnusablePair as reason:
        return f"({reason})"


def pair(key: str, number: int) -> list[tuple[str, bytes]]:
    return [(f"{key}.png", picture(number)), (f"{key}.txt", f"caption {number}".encode())]


def test_joined_tars_with_equal_names_are_samples_of_their_own(tmp_path: Path) -> None:
    expected = [(key, f"caption {n}", f"picture {n}") for n, key in [(0, "a"), (1, "b"), (2, "a"), (3, "b")]]
    one, two = pair("a", 0) + pair("b", 1), pair("a", 2) + pair("b", 3)
    assert pairs(pool(tmp_path, blob(one + two))) == expected
    assert pairs(pool(tmp_path, blob(one) + blob(two))) == expected
    same = pair("a", 0) + pair("a", 1)
    assert pairs(pool(tmp_path, blob(same))) == [("a", "caption 0", "picture 0"), ("a", "caption 1", "picture 1")]


@pytest.mark.parametrize(
    "names",
    ["a.png a.txt a.txt", "a.png b.png b.txt a.txt a.png", "a.png a.PNG a.txt", "a.txt b.png b.txt a.png a.txt"],
)
def test_a_name_that_is_twice_is_not_paired(tmp_path: Path, names: str) -> None:
    files = [(name, picture(0) if name.lower().endswith("png") else b"x") for name in names.split()]
    read = {key: (text, image) for key, text, image in pairs(pool(tmp_path, blob(files)))}
    assert read.pop("a") == ("(a name is twice in the shard)",) * 2
    assert all(values == ("x", "picture 0") for values in read.values())


def test_the_files_of_a_sample_may_lie_anywhere(tmp_path: Path) -> None:
    files = [("a.png", picture(0)), ("b.png", picture(1)), ("b.txt", b"caption 1"), ("a.txt", b"caption 0")]
    assert pairs(pool(tmp_path, blob(files))) == [("a", "caption 0", "picture 0"), ("b", "caption 1", "picture 1")]


def test_several_tars_in_one_file_are_all_read(tmp_path: Path) -> None:
    first, second = blob(pair("a", 0)), blob(pair("b", 1))
    expected = [("a", "caption 0", "picture 0"), ("b", "caption 1", "picture 1")]
    assert pairs(pool(tmp_path, first + second)) == expected
    blocks = -(-len(first.rstrip(b"\0")) // 512)
    assert pairs(pool(tmp_path, first[: 512 * blocks + 512] + second)) == expected  # one block of zeros is an end mark
    assert pairs(pool(tmp_path, first + bytes(3 * 2**20) + second)) == expected
    with pytest.raises(DataError, match="broken or cut off after 2 files"):
        pool(tmp_path, first + b"something else".ljust(512, b"."))


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE])
@pytest.mark.parametrize("long", ["", "x" * 150])
def test_links_have_the_bytes_of_their_file(tmp_path: Path, kind: bytes, long: str) -> None:
    with tarfile.open(tmp_path / "0.tar", "w", format=tarfile.GNU_FORMAT if long else tarfile.PAX_FORMAT) as tar:
        for name, content in pair(f"d/a{long}", 0):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for key, target in [("b", f"a{long}.png"), ("c", "none.png")]:
            link = tarfile.TarInfo(f"d/{key}.png")
            link.type, link.linkname = kind, target if kind == tarfile.SYMTYPE else f"d/{target}"
            tar.addfile(link)
            text = tarfile.TarInfo(f"d/{key}.txt")
            text.size = 1
            tar.addfile(text, io.BytesIO(b"x"))
    missing = "(a link to a file that is not in the shard)"
    assert pairs(Pool([tmp_path / "0.tar"])) == [
        (f"d/a{long}", "caption 0", "picture 0"), ("d/b", "x", "picture 0"), ("d/c", missing, missing),
    ]  # fmt: skip


def test_keys_with_dots_are_not_merged(tmp_path: Path) -> None:
    files = pair("shot.2024.01", 0) + pair("shot.2024.02", 1) + pair("12", 2) + pair("12.5", 3)
    expected = [("shot.2024.01", 0), ("shot.2024.02", 1), ("12", 2), ("12.5", 3)]
    assert pairs(pool(tmp_path, blob(files))) == [(k, f"caption {n}", f"picture {n}") for k, n in expected]


def test_parts_of_a_sample_keep_their_long_extensions(tmp_path: Path) -> None:
    files = [*pair("a", 0), ("a.seg.png", picture(1)), ("a.clip.npy", b"y"), ("v1.2/b.png", picture(2))]
    found = pool(tmp_path, blob(files))
    assert [found.key(row) for row in range(len(found))] == ["a", "v1.2/b"]
    assert set(found.members(0)) == {"png", "txt", "seg.png", "clip.npy"}
    assert pairs(found)[0] == ("a", "caption 0", "picture 0")


def test_hidden_files_belong_to_no_sample(tmp_path: Path) -> None:
    files = [("._a.png", b"macOS"), *pair("a", 0), ("._a.txt", b"macOS"), (".DS_Store", b"."), ("d/._b.png", b"macOS")]
    assert pairs(pool(tmp_path, blob(files))) == [("a", "caption 0", "picture 0")]


@pytest.mark.parametrize(("kind", "pack"), [("gzip", gzip.compress), ("bzip2", bz2.compress), ("xz", lzma.compress)])
def test_compressed_tars_are_named(tmp_path: Path, kind: str, pack: object) -> None:
    with pytest.raises(DataError, match=f"0.tar is compressed with {kind}") as caught:
        pool(tmp_path, pack(blob(pair("a", 0))))  # type: ignore[operator]
    assert "decompress" in str(caught.value)


@pytest.mark.parametrize("form", ["pax", "gnu"])
def test_sparse_files_are_named(tmp_path: Path, form: str) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        info = tarfile.TarInfo("a.png")
        if form == "pax":
            info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.name": "a.png"}
        else:
            info.type = tarfile.GNUTYPE_SPARSE
        tar.addfile(info)
    with pytest.raises(DataError, match=r"0\.tar holds a sparse file, 'a\.png'"):
        Pool([tmp_path / "0.tar"])


def test_captions_of_a_json_are_read_where_there_is_no_txt(tmp_path: Path) -> None:
    files = [
        ("a.png", picture(0)), ("a.json", b'{"caption": " a cat "}'), *pair("b", 1), ("b.json", b'{"caption": "x"}'),
        ("c.png", picture(2)), ("c.json", b'{"caption": 3}'), ("d.png", picture(3)), ("e.png", picture(4)),
        ("e.txt", b" \n"), ("f.png", picture(5)), ("f.json", b'{"caption": "\\ud800"}'), ("g.png", picture(6)),
        ("g.json", b'{"caption": "' + b"x" * 70_000 + b'"}'),
    ]  # fmt: skip
    assert [text for _, text, _ in pairs(pool(tmp_path, blob(files)))] == [
        "a cat", "caption 1", "(no caption)", "(no caption)", "(empty caption)", "(caption is not UTF-8)",
        "(the caption in KEY.json has too many bytes)",
    ]  # fmt: skip


def test_lines_of_a_caption_are_one_text_or_the_first_of_them(tmp_path: Path) -> None:
    files = [("a.png", picture(0)), ("a.txt", b"\n a cat \n\n it sleeps\n"), *pair("b", 1)]
    joined = pool(tmp_path, blob(files))
    first = Pool([tmp_path / "0.tar"], caption_lines="first")
    assert (joined.text(0).split(), joined.text(1)) == (["a", "cat", "it", "sleeps"], "caption 1")
    assert (first.text(0), first.text(1)) == ("a cat", "caption 1")
    assert joined.many_lines() == (1, 2)
    assert joined.fingerprint != first.fingerprint  # caches and prepared pictures of one do not serve the other
