# SPDX-License-Identifier: Apache-2.0
"""GGUF files whose headers lie, and folders of them."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from aced_sdk.files import ReadError
from tests.security.sandbox import run
from vlm.model.gguf_header import check_gguf
from vlm.model.language import load_language

pytest.importorskip("gguf")
U32, F32, STRING, ARRAY, U64 = 4, 6, 8, 9, 10


def text(value: str | bytes) -> bytes:
    content = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(content)) + content


def kv(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def number(name: str, value: int) -> bytes:
    return kv(name, U32, struct.pack("<I", value))


def tensor(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def gguf(entries: list[bytes], tensors: list[bytes] = [], counts: tuple[int, int] | None = None) -> bytes:  # noqa: B006
    tensor_count, kv_count = counts or (len(tensors), len(entries))
    return b"GGUF" + struct.pack("<IQQ", 3, tensor_count, kv_count) + b"".join([*entries, *tensors]) + bytes(256)


LLAMA = [
    kv("general.architecture", STRING, text("llama")),
    number("llama.block_count", 1),
    number("llama.embedding_length", 16),
    number("llama.feed_forward_length", 32),
    number("llama.attention.head_count", 2),
    number("llama.context_length", 64),
    kv("llama.attention.layer_norm_rms_epsilon", F32, struct.pack("<f", 1e-5)),
    kv("tokenizer.ggml.model", STRING, text("llama")),
    kv("tokenizer.ggml.tokens", ARRAY, struct.pack("<IQ", STRING, 2) + text("a") + text("b")),
]


def changed(name: str, value: int) -> list[bytes]:
    return [number(name, value) if entry.startswith(text(name)) else entry for entry in LLAMA]


LIES: dict[str, bytes] = {
    "nothing": b"",
    "another file": b"PK\x03\x04" + bytes(100),
    "version": b"GGUF" + struct.pack("<IQQ", 99, 0, 0),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "entries": gguf(LLAMA, counts=(0, 2**60)),
    "tensors": gguf(LLAMA, counts=(2**60, len(LLAMA))),
    "more entries than there are": gguf(LLAMA, counts=(0, 60_000)),
    "more tensors than there are": gguf(LLAMA, counts=(60_000, len(LLAMA))),
    "text": gguf([struct.pack("<Q", 2**62) + b"a"]),
    "text cut off": gguf([kv("a", STRING, struct.pack("<Q", 2**20))]),
    "array": gguf([kv("a", ARRAY, struct.pack("<IQ", U32, 2**62))]),
    "array cut off": gguf([kv("a", ARRAY, struct.pack("<IQ", 0, 2**22))]),
    "array of texts": gguf([kv("a", ARRAY, struct.pack("<IQ", STRING, 2**22))]),
    "array of arrays": gguf([kv("a", ARRAY, struct.pack("<IQIQ", ARRAY, 2**40, ARRAY, 2**40))]),
    "long token": gguf([kv("a", ARRAY, struct.pack("<IQ", STRING, 1) + text("a" * 10**5))]),
    "unknown type": gguf([kv("a", 77, b"")]),
    "layers": gguf(changed("llama.block_count", 10**9)),
    "tensors of a layer that it does not count": gguf(LLAMA, [tensor("blk.1.attn_q.weight", (2, 2))]),
    "an epsilon": gguf([*LLAMA[:6], kv("llama.attention.layer_norm_rms_epsilon", F32, struct.pack("<f", 1e30))]),
    "a base that is no number": gguf([*LLAMA, kv("llama.rope.freq_base", F32, struct.pack("<f", float("nan")))]),
    "a scale of zero": gguf([*LLAMA, kv("llama.rope.scaling.factor", F32, struct.pack("<f", 0.0))]),
    "no layers": gguf(changed("llama.block_count", 0)),
    "width": gguf(changed("llama.embedding_length", 2**31)),
    "heads": gguf(changed("llama.attention.head_count", 0)),
    "context": gguf(changed("llama.context_length", 2**31)),
    "dimensions": gguf(LLAMA, [text("a") + struct.pack("<I", 2**31)]),
    "shape": gguf(LLAMA, [tensor("a", (2**40, 2**40))]),
    "size": gguf(LLAMA, [tensor("a", (2**20, 2**10))]),
    "offset": gguf(LLAMA, [tensor("a", (4,), offset=2**62)]),
    "many small": gguf(LLAMA, [tensor(str(n), (64, 64)) for n in range(100)]),
}


def _check_all(files: list[Path]) -> list[str]:
    texts = []
    for path in files:
        try:
            check_gguf(path)
            texts.append("")
        except ReadError as error:
            texts.append(str(error))
    return texts


def test_headers_that_lie(tmp_path: Path) -> None:
    files = [tmp_path / f"{name}.gguf" for name in LIES]
    for path, content in zip(files, LIES.values(), strict=True):
        path.write_bytes(content)
    outcome = run(_check_all, files, seconds=30, mib=300)
    for name, said in zip(LIES, outcome.returned(), strict=True):
        assert name in said, name
    assert outcome.mib < 100


def test_an_honest_header_passes(tmp_path: Path) -> None:
    more = [kv("general.parameter_count", U64, struct.pack("<Q", 8 * 10**9))]
    (tmp_path / "a.gguf").write_bytes(gguf(LLAMA + more, [tensor("a", (16, 2))]))
    check_gguf(tmp_path / "a.gguf")


def _load(path: Path, home: Path) -> None:
    import os

    os.environ["ACED_HOME"] = str(home)
    load_language(path)


@pytest.mark.parametrize(
    "content",
    [
        LIES["array"],
        LIES["layers"],
        gguf(LLAMA),  # sound, and without weights
        gguf([*LLAMA, number("general.alignment", 0)]),
        gguf([kv("general.architecture", STRING, text("../../x"))]),
    ],
)
def test_files_are_checked_before_transformers_reads_them(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.gguf").write_bytes(content)
    outcome = run(_load, tmp_path / "a.gguf", tmp_path / "home", seconds=30)
    assert outcome.refused("field: language")
    assert outcome.mib < 400


def test_a_folder_with_a_link_or_a_broken_note(tmp_path: Path) -> None:
    (tmp_path / "secret.gguf").write_bytes(gguf(LLAMA))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.gguf").symlink_to(tmp_path / "secret.gguf")
    assert run(_load, tmp_path / "folder", tmp_path / "home").refused("leads out of the folder")


def test_numbers_have_names(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(LIES["layers"])
    with pytest.raises(ReadError, match=r"block_count in llama\.block_count is 1000000000"):
        check_gguf(tmp_path / "a.gguf")
