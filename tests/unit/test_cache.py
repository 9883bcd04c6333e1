# SPDX-License-Identifier: Apache-2.0
"""Embeddings of frozen models: verified when read, bound to model, preprocessing and shards."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import ARCHITECTURE, distillation, encoder, pair, write_pool, write_tar

import aced_sdk as aced
from aced_sdk import towers
from aced_sdk.cache import default_directory, open_cache, stored_fingerprint, write_cache, write_stored
from aced_sdk.config import Data, Stored
from aced_sdk.data import Decoding, Pool
from aced_sdk.errors import CacheError, DataError
from aced_sdk.towers import DualEncoder

BROKEN = {5: {"png": b"?", "txt": b"x"}, 40: {"txt": b"y"}}


@pytest.fixture(scope="module")
def tower() -> DualEncoder:
    return encoder()


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    return Pool([write_pool(tmp_path_factory.mktemp("pool"), pairs=66, shards=3, broken=BROKEN)])


def settings(pool: Pool) -> Data:
    return Data(shards=tuple(str(shard) for shard in pool.shards), max_unusable_fraction=0.1)


@pytest.fixture(scope="module")
def written(tower: DualEncoder, pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("cache") / "c"
    write_cache(tower, pool, directory, settings(pool), batch_size=10)
    return directory


def test_a_batch_without_a_usable_pair_is_written(
    written: Path, tower: DualEncoder, pool: Pool, tmp_path: Path
) -> None:
    cache = write_cache(tower, pool, tmp_path / "c", settings(pool), batch_size=1)
    assert torch.nonzero(~cache.usable).flatten().tolist() == [5, 40]
    assert (tmp_path / "c" / "usable.bin").read_bytes() == (written / "usable.bin").read_bytes()


@pytest.fixture
def copied(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "copy"))


def test_rows_are_what_the_model_says_of_the_pairs(written: Path, tower: DualEncoder, pool: Pool) -> None:
    cache = open_cache(written, pool, tower.fingerprint())
    rows = torch.tensor([65, 0, 22, 21, 44])
    found = cache.rows(rows, torch.device("cpu"))
    batch = Decoding(pool, tower.processor, settings(pool)).fetch(rows.numpy())
    torch.testing.assert_close(found.image, tower.encode_image(batch.images), atol=2e-3, rtol=0)
    torch.testing.assert_close(found.text, tower.encode_text(batch.tokens), atol=2e-3, rtol=0)
    torch.testing.assert_close(found.image.norm(dim=1), torch.ones(5))
    assert (found.scale, found.bias) == (pytest.approx(tower.scale), tower.bias)
    assert cache.embeddings.image.dtype == torch.float16


def test_unusable_pairs_are_marked(written: Path, tower: DualEncoder, pool: Pool) -> None:
    cache = open_cache(written, pool, tower.fingerprint())
    assert torch.nonzero(~cache.usable).flatten().tolist() == [5, 40]
    assert float(cache.embeddings.image[5].abs().sum()) == 0
    assert float(cache.embeddings.image[cache.usable].float().norm(dim=1).min()) > 0.99


def test_only_what_is_missing_or_torn_is_written_again(
    copied: Path, tower: DualEncoder, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in copied.iterdir()}
    content = bytearray(before["rows.bin"])
    stride = len(content) // 66
    content[30 * stride : 31 * stride] = bytes(stride)
    content[50 * stride] ^= 1
    (copied / "rows.bin").write_bytes(content)
    (copied / "usable.bin").unlink()
    read: list[int] = []
    fetch = Decoding.fetch
    monkeypatch.setattr(Decoding, "fetch", lambda self, rows: read.extend(rows) or fetch(self, rows))
    heard: list[int] = []
    write_cache(tower, pool, copied, settings(pool), 10, lambda done, total: heard.append(done))
    assert read == [*range(22, 32), *range(44, 54)]  # two batches
    assert {path.name: path.read_bytes() for path in copied.iterdir()} == before
    assert heard[-1] == 66


def test_another_model_or_other_shards_are_refused(
    copied: Path, tower: DualEncoder, pool: Pool, tmp_path: Path
) -> None:
    other = encoder(1)
    with pytest.raises(CacheError, match="of another model"):
        open_cache(copied, pool, other.fingerprint())
    with pytest.raises(CacheError, match="of another model"):
        write_cache(other, pool, copied, settings(pool))
    squashed = towers.build(aced.Student(architecture=ARCHITECTURE, resize="shortest"), 0).eval()
    with pytest.raises(CacheError, match="or preprocessing"):  # the same weights
        open_cache(copied, pool, squashed.fingerprint())
    changed = Pool([write_pool(tmp_path / "changed", pairs=66, shards=3, broken=BROKEN | {7: pair(99)})])
    for moved in (changed, Pool(pool.shards[::-1]), Pool(pool.shards[:2])):
        with pytest.raises(CacheError, match="of other shards") as caught:
            open_cache(copied, moved, tower.fingerprint())
        assert caught.value.field == "cache"
        with pytest.raises(CacheError, match="of other shards"):
            write_cache(tower, moved, copied, settings(moved))


@pytest.mark.parametrize("file", ["rows.bin", "usable.bin"])
@pytest.mark.parametrize("damage", ["torn", "gone", "zeroed", "longer"])
def test_a_damaged_file_is_refused_and_written_again(
    copied: Path, tower: DualEncoder, pool: Pool, damage: str, file: str
) -> None:
    path = copied / file
    content = path.read_bytes()
    path.unlink()
    if damage != "gone":
        changed = {"torn": content[:-1], "zeroed": content[:-30] + bytes(30), "longer": content + b"x"}
        path.write_bytes(changed[damage])
    with pytest.raises(CacheError) as caught:
        _ = open_cache(copied, pool, tower.fingerprint()).embeddings
    assert file in caught.value.cause or "incomplete" in caught.value.cause
    assert "write the cache again" in caught.value.remedy
    write_cache(tower, pool, copied, settings(pool), batch_size=10)
    assert path.read_bytes() == content


def test_a_flipped_bit_in_any_file_is_detected(copied: Path, pool: Pool) -> None:
    for name in ("cache.json", "rows.bin", "usable.bin"):
        content = (copied / name).read_bytes()
        for place in np.random.default_rng(0).integers(len(content), size=40):
            for bit in (0, 7):
                changed = bytearray(content)
                changed[place] ^= 1 << bit
                (copied / name).write_bytes(changed)
                with pytest.raises(CacheError):
                    open_cache(copied, pool).rows(torch.arange(66), torch.device("cpu"))
        (copied / name).write_bytes(content)


def test_a_row_is_verified_when_it_is_read(copied: Path, tower: DualEncoder, pool: Pool) -> None:
    content = bytearray((copied / "rows.bin").read_bytes())
    content[44 * (len(content) // 66) + 5] ^= 1
    cache = open_cache(copied, pool, tower.fingerprint())
    (copied / "rows.bin").write_bytes(content)
    for rows in ([3, 40, 4], [0], [22], [43, 21]):
        assert cache.rows(torch.tensor(rows), torch.device("cpu")).text.shape == (len(rows), 16)
    with pytest.raises(CacheError, match=r"row 44 of .*rows.bin.*checksum"):
        cache.rows(torch.tensor([1, 44]), torch.device("cpu"))
    with pytest.raises(CacheError, match=r"row 44 of "):
        _ = cache.embeddings
    blocks = cache.blocks(22)
    assert [len(next(blocks)[1]) for _ in range(2)] == [22, 22]
    with pytest.raises(CacheError, match=r"row 44 of "):
        next(blocks)


def test_all_rows_in_any_order_are_those_of_the_whole(written: Path, tower: DualEncoder, pool: Pool) -> None:
    cache = open_cache(written, pool, tower.fingerprint())
    rows = torch.randint(66, (200,), generator=torch.Generator().manual_seed(0))
    found, whole = cache.rows(rows, torch.device("cpu")), cache.embeddings
    for part, all_of_it in ((found.image, whole.image), (found.text, whole.text)):
        torch.testing.assert_close(part, torch.nn.functional.normalize(all_of_it[rows].float(), dim=1))
    assert cache.rows(rows[:0], torch.device("cpu")).image.shape == (0, 16)
    for row in (66, -1):
        with pytest.raises(IndexError):
            cache.rows(torch.tensor([row]), torch.device("cpu"))


def test_blocks_are_all_rows_in_order(written: Path, pool: Pool) -> None:
    cache = open_cache(written, [str(shard) for shard in pool.shards])
    everything = cache.rows(torch.arange(66), torch.device("cpu"))
    blocks = list(cache.blocks(20))
    assert [block for block, _ in blocks] == [range(20), range(20, 40), range(40, 60), range(60, 66)]
    assert torch.equal(torch.cat([found.image for _, found in blocks]), everything.image)
    assert torch.equal(torch.cat([found.text for _, found in blocks]), everything.text)
    assert blocks[0][1].scale == everything.scale


def test_bf16_is_recorded_kept_and_not_mixed_with_fp16(tmp_path: Path, tower: DualEncoder, pool: Pool) -> None:
    cache = write_cache(tower, pool, tmp_path / "c", settings(pool), dtype="bf16")
    assert json.loads((tmp_path / "c" / "cache.json").read_text())["dtype"] == "bf16"
    assert cache.embeddings.image.dtype == torch.bfloat16
    rows = torch.arange(6, 40)
    exact = write_cache(tower, pool, tmp_path / "exact", settings(pool)).rows(rows, torch.device("cpu"))
    found = open_cache(tmp_path / "c", pool, tower.fingerprint()).rows(rows, torch.device("cpu"))
    torch.testing.assert_close(found.image, exact.image, atol=4e-3, rtol=0)
    torch.testing.assert_close(found.image.norm(dim=1), torch.ones(34))
    (tmp_path / "c" / "usable.bin").unlink()
    with pytest.raises(CacheError, match="holds bf16, not fp16") as caught:
        write_cache(tower, pool, tmp_path / "c", settings(pool), dtype="fp16")
    assert caught.value.field == "dtype"
    assert write_cache(tower, pool, tmp_path / "c", settings(pool)).embeddings.text.dtype == torch.bfloat16


def test_a_shard_without_samples_has_no_rows(tmp_path: Path, tower: DualEncoder) -> None:
    write_pool(tmp_path / "pool", pairs=8)
    write_tar(tmp_path / "pool" / "0000a.tar", [])
    cache = write_cache(tower, Pool([tmp_path / "pool"]), tmp_path / "c", Data(shards=("unused",)))
    assert cache.rows(torch.tensor([3, 4]), torch.device("cpu")).image.norm(dim=1).tolist() == pytest.approx([1, 1])
    reopened = open_cache(tmp_path / "c", Pool([tmp_path / "pool"]), tower.fingerprint())
    assert reopened.rows(torch.arange(8), torch.device("cpu")).text.shape == (8, 16)


def test_a_folder_that_is_no_cache_is_refused(tmp_path: Path, tower: DualEncoder, pool: Pool) -> None:
    with pytest.raises(CacheError, match="no embedding cache"):
        open_cache(tmp_path, pool, tower.fingerprint())
    (tmp_path / "cache.json").write_text('{"format": 4}')
    with pytest.raises(CacheError, match="no embedding cache"):
        open_cache(tmp_path, pool, tower.fingerprint())
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CacheError, match="cannot write"):
        write_cache(tower, pool, tmp_path / "file" / "cache", settings(pool))


def test_too_many_bad_pairs_stop_even_a_small_pool_and_again_when_resumed(
    tmp_path: Path, tower: DualEncoder, pool: Pool
) -> None:
    strict = settings(pool).replace(max_unusable_fraction=0.02)
    for _ in range(2):
        with pytest.raises(DataError, match="2 of 66 pairs are unusable") as caught:
            write_cache(tower, pool, tmp_path / "c", strict)
        assert caught.value.field == "data.max_unusable_fraction"


def test_the_verb_takes_a_folder_and_finds_its_own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACED_HOME", str(tmp_path / "home"))
    shards = write_pool(tmp_path / "pool", pairs=8)
    tower = encoder()
    cache = aced.cache_embeddings(model=tower, data=shards)
    assert cache.directory == default_directory(tower.fingerprint(), Pool([shards]))
    assert cache.directory.is_relative_to(tmp_path / "home")
    named = aced.cache_embeddings(model=tower, data=[str(shards / "0000.tar")], directory=tmp_path / "c")
    assert (len(cache.usable), len(named.usable)) == (8, 4)


# -- embeddings that the shards carry -----------------------------------------------------------------------------


def npz(**arrays: Any) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def vectors(seed: int, rows: int) -> Any:
    return np.random.default_rng(seed).standard_normal((rows, 12)).astype(np.float32)


def carried(number: int) -> dict[str, bytes]:
    """A pair as DataCompDR's, three augmentations and a caption with two synthetic ones, two models of 8 and 4."""
    return pair(number) | {"npz": npz(image_emb=vectors(number, 3), text_emb=vectors(100 + number, 3))}


@pytest.fixture(scope="module")
def carrying(tmp_path_factory: pytest.TempPathFactory) -> Path:
    samples = {number: carried(number) for number in range(32)}
    return write_pool(tmp_path_factory.mktemp("carrying") / "pool", pairs=32, broken=samples)


STORED = Stored(scale=50.0, parts=(8, 4))


def unit(vector: Any) -> Any:
    return vector / np.linalg.norm(vector, axis=-1, keepdims=True)


def test_stored_embeddings_are_the_augmentations_mean_and_the_first_caption(carrying: Path, tmp_path: Path) -> None:
    pool = Pool([carrying])
    write_stored(STORED, pool, tmp_path / "c", settings(pool))
    cache = open_cache(tmp_path / "c", pool, stored_fingerprint(STORED))
    found = cache.rows(torch.arange(32), torch.device("cpu"))
    assert (found.scale, found.bias) == (50.0, 0.0)
    torch.testing.assert_close(cache.embeddings.image.float().norm(dim=1), torch.ones(32), atol=2e-3, rtol=0)
    for row in (0, 31):
        image, text = vectors(row, 3), vectors(100 + row, 3)[0]
        means = [unit(unit(part).mean(axis=0)) for part in (image[:, :8], image[:, 8:])]
        np.testing.assert_allclose(found.image[row], np.concatenate(means) / np.sqrt(2), atol=1e-3)
        np.testing.assert_allclose(
            found.text[row], np.concatenate([unit(text[:8]), unit(text[8:])]) / np.sqrt(2), atol=1e-3
        )


def test_another_reading_of_stored_embeddings_is_refused(carrying: Path, tmp_path: Path) -> None:
    pool = Pool([carrying])
    write_stored(STORED, pool, tmp_path / "c", settings(pool))
    for other in (STORED.replace(parts=()), STORED.replace(scale=100.0)):
        with pytest.raises(CacheError, match="another reading of stored embeddings"):
            write_stored(other, pool, tmp_path / "c", settings(pool))
    moved = STORED.replace(cache=tmp_path / "elsewhere")
    assert stored_fingerprint(moved) == stored_fingerprint(STORED)
    assert len(open_cache(tmp_path / "c", pool, stored_fingerprint(moved)).usable) == 32


ODD: dict[str, bytes | None] = {
    "no stored embeddings": None,
    "unreadable npz": b"PK\x03\x04 torn",
    "no array of that name": npz(image_emb=vectors(0, 3)),
    "stored embeddings of an odd shape or type": npz(image_emb=np.ones((3, 12), np.int64), text_emb=vectors(0, 1)),
    "stored embeddings of another width": npz(image_emb=vectors(0, 3), text_emb=vectors(0, 3)[:, :8]),
    "stored embeddings not finite, or zero": npz(image_emb=vectors(0, 3) * np.nan, text_emb=vectors(0, 3)),
}


@pytest.mark.parametrize("reason", ODD)
def test_odd_stored_embeddings_are_unusable_pairs_and_bounded(tmp_path: Path, reason: str) -> None:
    content = ODD[reason]
    odd = pair(5) | ({} if content is None else {"npz": content})
    write_pool(tmp_path / "pool", pairs=32, broken={number: carried(number) for number in range(32)} | {5: odd})
    pool = Pool([tmp_path / "pool"])
    cache = write_stored(STORED, pool, tmp_path / "c", settings(pool))
    assert torch.nonzero(~cache.usable).flatten().tolist() == [5]
    with pytest.raises(DataError, match=f"1 of 32 pairs are unusable \\(1 {reason}"):
        write_stored(STORED, pool, tmp_path / "d", settings(pool).replace(max_unusable_fraction=0.0))


@pytest.mark.parametrize("kind", ["object array", "zero augmentation", "single vectors", "no archive", "raw member"])
def test_what_a_stored_array_may_be(tmp_path: Path, kind: str) -> None:
    good, image, text = kind == "single vectors", vectors(5, 3), vectors(6, 2)
    image[1] *= kind != "zero augmentation"
    content = {
        "object array": npz(image_emb=np.array([[{}]], dtype=object), text_emb=text),
        "zero augmentation": npz(image_emb=image, text_emb=text),
        "single vectors": npz(image_emb=image[0].astype(np.float16), text_emb=text[0].astype(np.float64)),
        "no archive": pickle.dumps({"image_emb": image.tolist()}),
        "raw member": npz(image_emb=image, text_emb=text).replace(b"\x93NUMPY", b"\x93NUMPX"),
    }[kind]
    broken = {number: carried(number) for number in range(32)} | {5: pair(5) | {"npz": content}}
    pool = Pool([write_pool(tmp_path / "pool", pairs=32, broken=broken)])
    assert bool(write_stored(STORED, pool, tmp_path / "c", settings(pool)).usable[5]) is good


def test_shards_without_stored_embeddings_or_of_other_parts_are_told(
    carrying: Path, pool: Pool, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="no pair of the shards carries arrays 'image_emb'"):
        write_stored(STORED, pool, tmp_path / "c", settings(pool))
    with pytest.raises(DataError, match="have 12 numbers, and their parts add up to 8") as caught:
        write_stored(STORED.replace(parts=(8,)), Pool([carrying]), tmp_path / "c", settings(pool))
    assert caught.value.field == "parts"
    assert not (tmp_path / "c").exists()


def test_a_run_learns_from_stored_embeddings(carrying: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACED_HOME", str(tmp_path / "home"))
    towers.save(encoder(1), tmp_path / "reference")
    config = distillation(tmp_path / "run", carrying, tmp_path / "reference", teacher=STORED)
    assert aced.plan(config).disk - 2 * 12 * encoder().profile().parameters == 32 * (16 + 12) * 4
    assert aced.distill(config).step == 6
    assert default_directory(stored_fingerprint(STORED), Pool([carrying])).is_dir()
