# SPDX-License-Identifier: Apache-2.0
"""Embeddings of frozen models: memory-mapped, verified when touched, bound to model, preprocessing and shards."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import ARCHITECTURE, distillation, encoder, pair, write_pool, write_tar

import aced_sdk as aced
from aced_sdk import towers
from aced_sdk.cache import default_directory, embeddings, open_cache, stored_fingerprint, write_cache, write_stored
from aced_sdk.cache.parts import Part
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
    assert sorted(path.name for path in copied.iterdir()) == [".lock", "cache.json", *sorted(before)]


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


@pytest.mark.parametrize("damage", ["torn", "gone", "flipped", "foreign", "wider", "bf16"])
def test_a_damaged_part_is_refused(copied: Path, tower: DualEncoder, pool: Pool, damage: str) -> None:
    part = copied / "part-000001.safetensors"
    content, tensors = bytearray(part.read_bytes()), load_file(part)
    if damage == "gone":
        part.unlink()
    elif damage == "torn":
        part.write_bytes(content[:-1])
    elif damage == "flipped":
        content[-30] ^= 1
        part.write_bytes(content)
    elif damage == "foreign":
        save_file({"image": tensors["image"]}, part)
    elif damage == "wider":
        save_file(tensors | {"text": torch.zeros(22, 17, dtype=torch.float16)}, part)
    else:
        save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, part)
    opened = open_cache(copied, pool, tower.fingerprint()) if damage == "flipped" else None  # no header tells that
    with pytest.raises(CacheError, match="part-000001") as caught:
        _ = opened.embeddings if opened else open_cache(copied, pool, tower.fingerprint())
    assert "delete that file" in caught.value.remedy
    cache = write_cache(tower, pool, copied, settings(pool))
    assert cache.rows(torch.tensor([30]), torch.device("cpu")).image.norm() == pytest.approx(1)


def test_a_part_is_verified_once_and_only_when_touched(
    copied: Path, tower: DualEncoder, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = copied / "part-000002.safetensors"
    content = bytearray(part.read_bytes())
    content[-30] ^= 1
    part.write_bytes(content)
    checked: list[int] = []
    digest = Part.digest
    monkeypatch.setattr(Part, "digest", lambda self: checked.append(len(self.usable)) or digest(self))
    monkeypatch.setattr(embeddings, "_OPEN_PARTS", 1)
    cache = open_cache(copied, pool, tower.fingerprint())
    assert checked == []
    for rows in ([3, 40, 4], [0], [22], [43, 21]):  # maps are closed and opened again, and not verified again
        found = cache.rows(torch.tensor(rows), torch.device("cpu"))
        assert found.text.shape == (len(rows), 16)
    assert len(checked) == 2
    with pytest.raises(CacheError, match=r"part-000002.*checksum"):
        cache.rows(torch.tensor([1, 44]), torch.device("cpu"))
    with pytest.raises(CacheError, match="part-000002"):
        _ = cache.embeddings


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_embeddings_stay_on_disk(copied: Path, tower: DualEncoder, pool: Pool) -> None:
    cache = open_cache(copied, pool, tower.fingerprint())
    cache.rows(torch.arange(66), torch.device("cpu"))
    mapped = Path("/proc/self/maps").read_text(encoding="utf-8")
    assert all(f"{copied}/part-00000{number}.safetensors" in mapped for number in range(3))


def test_all_rows_in_any_order_are_those_of_the_whole(written: Path, tower: DualEncoder, pool: Pool) -> None:
    cache = open_cache(written, pool, tower.fingerprint())
    rows = torch.randint(66, (200,), generator=torch.Generator().manual_seed(0))
    found, whole = cache.rows(rows, torch.device("cpu")), cache.embeddings
    for part, all_of_it in ((found.image, whole.image), (found.text, whole.text)):
        torch.testing.assert_close(part, torch.nn.functional.normalize(all_of_it[rows].float(), dim=1))
    assert cache.rows(rows[:0], torch.device("cpu")).image.shape == (0, 16)
    with pytest.raises(IndexError):
        cache.rows(torch.tensor([66]), torch.device("cpu"))


def test_bf16_is_recorded_kept_and_not_mixed_with_fp16(tmp_path: Path, tower: DualEncoder, pool: Pool) -> None:
    cache = write_cache(tower, pool, tmp_path / "c", settings(pool), dtype="bf16")
    assert json.loads((tmp_path / "c" / "cache.json").read_text())["dtype"] == "bf16"
    assert cache.embeddings.image.dtype == torch.bfloat16
    rows = torch.arange(6, 40)
    exact = write_cache(tower, pool, tmp_path / "exact", settings(pool)).rows(rows, torch.device("cpu"))
    found = open_cache(tmp_path / "c", pool, tower.fingerprint()).rows(rows, torch.device("cpu"))
    torch.testing.assert_close(found.image, exact.image, atol=4e-3, rtol=0)
    torch.testing.assert_close(found.image.norm(dim=1), torch.ones(34))
    (tmp_path / "c" / "part-000000.safetensors").unlink()
    with pytest.raises(CacheError, match="holds bf16, not fp16") as caught:
        write_cache(tower, pool, tmp_path / "c", settings(pool), dtype="fp16")
    assert caught.value.field == "dtype"
    assert write_cache(tower, pool, tmp_path / "c", settings(pool)).embeddings.text.dtype == torch.bfloat16


def test_a_cache_of_the_first_format_opens_as_fp16(copied: Path, tower: DualEncoder, pool: Pool) -> None:
    manifest = json.loads((copied / "cache.json").read_text())
    del manifest["dtype"]
    (copied / "cache.json").write_text(json.dumps(manifest | {"format": 1}))
    assert open_cache(copied, pool, tower.fingerprint()).embeddings.image.dtype == torch.float16
    (copied / "part-000002.safetensors").unlink()
    assert len(write_cache(tower, pool, copied, settings(pool)).usable) == 66


def test_a_shard_without_samples_has_an_empty_part(tmp_path: Path, tower: DualEncoder) -> None:
    write_pool(tmp_path / "pool", pairs=8)
    write_tar(tmp_path / "pool" / "0000a.tar", [])
    cache = write_cache(tower, Pool([tmp_path / "pool"]), tmp_path / "c", Data(shards=("unused",)))
    assert cache.rows(torch.tensor([3, 4]), torch.device("cpu")).image.norm(dim=1).tolist() == pytest.approx([1, 1])
    reopened = open_cache(tmp_path / "c", Pool([tmp_path / "pool"]), tower.fingerprint())
    assert reopened.rows(torch.arange(8), torch.device("cpu")).text.shape == (8, 16)


def test_a_folder_that_is_no_cache_is_refused(tmp_path: Path, tower: DualEncoder, pool: Pool) -> None:
    with pytest.raises(CacheError, match="no embedding cache"):
        open_cache(tmp_path, pool, tower.fingerprint())
    (tmp_path / "cache.json").write_text('{"format": 3}')
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
