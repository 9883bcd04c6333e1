# SPDX-License-Identifier: Apache-2.0
"""Embeddings of frozen models: what a killed call left is kept, and what does not fit is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import encoder, pair, write_pool

import aced_sdk as aced
from aced_sdk.cache import default_directory, open_cache, write_cache
from aced_sdk.config import Data
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
    return Data(shards=tuple(str(shard) for shard in pool.shards), max_bad_fraction=0.1)


@pytest.fixture(scope="module")
def written(tower: DualEncoder, pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("cache") / "c"
    write_cache(tower, pool, directory, settings(pool), batch_size=10)
    return directory


@pytest.fixture
def copied(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "copy"))


def test_rows_are_what_the_model_says_of_the_pairs(written: Path, tower: DualEncoder, pool: Pool) -> None:
    cache = open_cache(written, tower.fingerprint(), pool)
    rows = torch.tensor([65, 0, 22, 21, 44])
    found = cache.rows(rows, torch.device("cpu"))
    batch = Decoding(pool, tower, settings(pool)).fetch(rows.numpy())
    torch.testing.assert_close(found.image, tower.encode_image(batch.images), atol=2e-3, rtol=0)
    torch.testing.assert_close(found.text, tower.encode_text(batch.tokens), atol=2e-3, rtol=0)
    torch.testing.assert_close(found.image.norm(dim=1), torch.ones(5))
    assert (found.scale, found.bias) == (pytest.approx(tower.scale), tower.bias)
    assert cache.embeddings.image.dtype == torch.float16


def test_unusable_pairs_are_marked(written: Path, tower: DualEncoder, pool: Pool) -> None:
    cache = open_cache(written, tower.fingerprint(), pool)
    assert torch.nonzero(~cache.usable).flatten().tolist() == [5, 40]
    assert float(cache.embeddings.image[5].abs().sum()) == 0
    assert float(cache.embeddings.image[cache.usable].float().norm(dim=1).min()) > 0.99


def test_only_what_is_missing_or_torn_is_written_again(copied: Path, tower: DualEncoder, pool: Pool) -> None:
    parts = sorted(copied.glob("part-*.safetensors"))
    before = {part.name: part.read_bytes() for part in parts}
    parts[1].unlink()
    parts[2].write_bytes(parts[2].read_bytes()[:100])
    kept = parts[0].stat().st_mtime_ns
    heard: list[int] = []
    write_cache(tower, pool, copied, settings(pool), progress=lambda done, total: heard.append(done))
    assert {part.name: part.read_bytes() for part in parts} == before
    assert parts[0].stat().st_mtime_ns == kept
    assert heard[-1] == 66
    assert sorted(path.name for path in copied.iterdir()) == ["cache.json", *sorted(before)]


def test_another_model_or_other_shards_are_refused(
    copied: Path, tower: DualEncoder, pool: Pool, tmp_path: Path
) -> None:
    other = encoder(1)
    with pytest.raises(CacheError, match="of another model"):
        open_cache(copied, other.fingerprint(), pool)
    with pytest.raises(CacheError, match="of another model"):
        write_cache(other, pool, copied, settings(pool))
    changed = Pool([write_pool(tmp_path / "changed", pairs=66, shards=3, broken=BROKEN | {7: pair(99)})])
    for moved in (changed, Pool(pool.shards[::-1]), Pool(pool.shards[:2])):
        with pytest.raises(CacheError, match="of other shards") as caught:
            open_cache(copied, tower.fingerprint(), moved)
        assert caught.value.field == "cache"
        with pytest.raises(CacheError, match="of other shards"):
            write_cache(tower, moved, copied, settings(moved))


@pytest.mark.parametrize("damage", ["torn", "gone", "flipped", "foreign"])
def test_a_damaged_part_is_refused(copied: Path, tower: DualEncoder, pool: Pool, damage: str) -> None:
    part = copied / "part-000001.safetensors"
    content = bytearray(part.read_bytes())
    if damage == "gone":
        part.unlink()
    elif damage == "torn":
        part.write_bytes(content[:-1])
    elif damage == "flipped":
        content[-30] ^= 1
        part.write_bytes(content)
    else:
        save_file({"image": load_file(part)["image"]}, part)
    with pytest.raises(CacheError, match=r"part-000001|0001\.tar") as caught:
        open_cache(copied, tower.fingerprint(), pool)
    assert "cache_embeddings again" in caught.value.remedy
    assert len(write_cache(tower, pool, copied, settings(pool)).usable) == 66


def test_a_folder_that_is_no_cache_is_refused(tmp_path: Path, tower: DualEncoder, pool: Pool) -> None:
    with pytest.raises(CacheError, match="no embedding cache"):
        open_cache(tmp_path, tower.fingerprint(), pool)
    (tmp_path / "cache.json").write_text('{"format": 2}')
    with pytest.raises(CacheError, match="no embedding cache"):
        open_cache(tmp_path, tower.fingerprint(), pool)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CacheError, match="cannot write"):
        write_cache(tower, pool, tmp_path / "file" / "cache", settings(pool))


def test_too_many_bad_pairs_stop_even_a_small_pool_and_again_when_resumed(
    tmp_path: Path, tower: DualEncoder, pool: Pool
) -> None:
    strict = settings(pool).replace(max_bad_fraction=0.02)
    for _ in range(2):
        with pytest.raises(DataError, match="2 of 66 pairs are unusable") as caught:
            write_cache(tower, pool, tmp_path / "c", strict)
        assert caught.value.field == "data.max_bad_fraction"


def test_the_verb_takes_a_folder_and_finds_its_own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACED_HOME", str(tmp_path / "home"))
    shards = write_pool(tmp_path / "pool", pairs=8)
    tower = encoder()
    cache = aced.cache_embeddings(model=tower, data=shards)
    assert cache.directory == default_directory(tower.fingerprint(), Pool([shards]))
    assert cache.directory.is_relative_to(tmp_path / "home")
    named = aced.cache_embeddings(model=tower, data=[str(shards / "0000.tar")], directory=tmp_path / "c")
    assert (len(cache.usable), len(named.usable)) == (8, 4)
