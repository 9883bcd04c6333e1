# SPDX-License-Identifier: Apache-2.0
"""Pairs come in an order that seed and position alone decide; what is broken is skipped, counted and replaced."""

from __future__ import annotations

import errno
import io
import tarfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import caption, encoder, pair, picture, write_pool, write_tar

from aced_sdk.config import Data
from aced_sdk.data import Decoding, FullOrder, Pool, RowSet, SuperBatches, UnusablePair, prepare
from aced_sdk.errors import DataError
from aced_sdk.towers import DualEncoder

BROKEN = {
    3: {"png": b"no picture", "txt": b"a cat"},
    10: {"png": picture(10), "txt": b"  \n"},
    20: {"txt": b"a boat"},
    33: {"png": picture(33)[:60], "txt": b"a tree"},
    41: {"png": picture(41), "txt": b"\xff\xfe"},
}


@pytest.fixture(scope="module")
def tower() -> DualEncoder:
    return encoder()


@pytest.fixture(scope="module")
def broken_pool(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    return Pool([write_pool(tmp_path_factory.mktemp("broken"), pairs=64, broken=BROKEN)])


def settings(pool: Pool, **changes: object) -> Data:
    return Data(shards=tuple(str(shard) for shard in pool.shards), **changes)


def test_rows_follow_shards_and_keys(tmp_path: Path) -> None:
    pool = Pool([write_pool(tmp_path, pairs=40, shards=4)])
    assert len(pool) == 40
    assert [pool.key(row) for row in range(len(pool))] == [f"{row:06d}" for row in range(40)]
    assert [(shard.name, rows) for shard, rows in pool.shard_rows()][1] == ("0001.tar", range(10, 20))
    for row in (0, 9, 10, 39):
        assert pool.text(row) == caption(row)
        assert pool.metadata(row) == {"number": row, "noisy": row % 4 == 0}
        assert pool.read(row, "png") == picture(row)
        expected = np.array(Image.open(io.BytesIO(picture(row))))
        np.testing.assert_array_equal(np.array(pool.image(row, 10**6)), expected)
    assert pool.read(0, "cls") is None


def test_shards_are_named_by_file_folder_and_braces(tmp_path: Path) -> None:
    write_pool(tmp_path / "a", pairs=8, shards=4)
    write_pool(tmp_path / "b", pairs=4, shards=2)
    pool = Pool([str(tmp_path / "a" / "{0001..0003}.tar"), tmp_path / "b", str(tmp_path / "a" / "0000.tar")])
    assert [f"{p.parent.name}/{p.stem}" for p in pool.shards] == [
        "a/0001", "a/0002", "a/0003", "b/0000", "b/0001", "a/0000",
    ]  # fmt: skip
    assert len(pool) == 12
    for missing in (tmp_path / "a" / "{0003..0004}.tar", tmp_path / "none"):
        with pytest.raises(DataError, match="there is no shard") as caught:
            Pool([str(missing)])
        assert caught.value.field == "data.shards"
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no tars"):
        Pool([tmp_path / "empty"])
    with pytest.raises(DataError, match="hold no samples"):
        Pool([write_tar(tmp_path / "nothing.tar", [])])


def test_keys_may_lie_in_folders_and_metadata_may_be_broken(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, content in [("a/1.PNG", picture(0)), ("a/1.txt", b"x"), ("b/1.txt", b"y"), ("a/1.json", b"[1]")]:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    pool = Pool([tmp_path / "x.tar"])
    assert [pool.key(row) for row in range(len(pool))] == ["a/1", "b/1"]
    assert pool.image(0, 10**6).size == (20, 18)
    assert pool.metadata(0) == pool.metadata(1) == {}


def test_the_fingerprint_follows_content_and_order(tmp_path: Path) -> None:
    one = write_pool(tmp_path / "one", pairs=8)
    same = write_pool(tmp_path / "same", pairs=8)
    other = write_pool(tmp_path / "other", pairs=8, broken={5: pair(99)})
    assert Pool([one]).fingerprint == Pool([same]).fingerprint != Pool([other]).fingerprint
    turned = Pool([one / "0001.tar", one / "0000.tar"])
    assert turned.fingerprint != Pool([one]).fingerprint


def test_reasons_of_unusable_pairs(broken_pool: Pool) -> None:
    for row, cause in [(3, "unreadable picture"), (20, "no picture"), (33, "unreadable picture")]:
        with pytest.raises(UnusablePair, match=cause):
            broken_pool.image(row, 10**6)
    for row, cause in [(10, "empty caption"), (41, "not UTF-8")]:
        with pytest.raises(UnusablePair, match=cause):
            broken_pool.text(row)
    with pytest.raises(UnusablePair, match="too many pixels"):
        broken_pool.image(0, max_pixels=20 * 18 - 1)
    assert broken_pool.image(0, max_pixels=20 * 18).size == (20, 18)


def test_a_picture_as_thin_as_a_thread_is_unusable(tmp_path: Path) -> None:
    # Resizing its short side would make millions of pixels of a few thousand.
    buffer = io.BytesIO()
    Image.new("RGB", (1, 5000)).save(buffer, format="PNG")
    write_tar(tmp_path / "0.tar", [{"png": buffer.getvalue(), "txt": b"a thread"}])
    with pytest.raises(UnusablePair, match="too long and thin"):
        Pool([tmp_path]).image(0, 10**6)


def batches_of(
    decoder: Decoding, pool: Pool, seed: int, state: np.ndarray | None = None, lanes: int = 1
) -> SuperBatches:
    order = FullOrder([range(len(pool))], lanes, seed)
    return SuperBatches(decoder, order, 16, order.start() if state is None else state, RowSet(len(pool)))


def test_super_batches_replace_what_is_unusable_and_count_it(broken_pool: Pool, tower: DualEncoder) -> None:
    decoder = Decoding(broken_pool, tower.processor, settings(broken_pool, max_unusable_fraction=0.5))
    batches = batches_of(decoder, broken_pool, seed=0)
    seen: list[int] = []
    for _ in range(4):
        batch, state = next(batches)
        assert len(batch) == 16
        assert batch.images.shape == (16, 3, 16, 16)
        assert batch.images.dtype == torch.uint8
        seen += batch.rows.tolist()
    batches.close()
    order = FullOrder([range(64)], 1, 0).rows(np.zeros(1, np.int64), np.zeros((1, 1), np.int64), int(state[0, 0]))[0]
    assert seen == [row for row in order if row not in BROKEN]
    assert set(range(64)) - set(seen) >= set(BROKEN)
    assert set(decoder.skipped) == {"unreadable picture", "empty caption", "no picture", "caption is not UTF-8"}
    assert decoder.skipped.total() >= len(BROKEN)


def test_a_small_pool_with_too_many_unusable_pairs_ends_the_run(broken_pool: Pool, tower: DualEncoder) -> None:
    assert len(broken_pool) < 1000
    bound = (len(BROKEN) - 1) / 64
    decoder = Decoding(broken_pool, tower.processor, settings(broken_pool, max_unusable_fraction=bound))
    batches = batches_of(decoder, broken_pool, seed=0)
    with pytest.raises(DataError, match=rf"{len(BROKEN)} of 64 pairs are unusable .*the first is") as caught:
        list(islice(batches, 8))  # the pool is read twice; each pair counts once
    batches.close()
    assert any(broken_pool.name(row) in str(caught.value) for row in BROKEN)


@pytest.mark.parametrize("lanes", [1, 4])
@pytest.mark.parametrize("stop", [1, 3, 5])
def test_super_batches_continue_from_a_state_as_if_never_stopped(
    broken_pool: Pool, tower: DualEncoder, stop: int, lanes: int
) -> None:
    def take(state: np.ndarray | None, count: int) -> tuple[list[torch.Tensor], np.ndarray]:
        decoder = Decoding(broken_pool, tower.processor, settings(broken_pool, max_unusable_fraction=0.5))
        batches = batches_of(decoder, broken_pool, 1, state, lanes)
        taken = []
        for _ in range(count):
            batch, state = next(batches)
            taken.append(batch.rows)
        batches.close()
        return taken, state

    whole, end = take(None, 6)
    head, state = take(None, stop)
    tail, again = take(state, 6 - stop)
    assert torch.equal(torch.stack(whole), torch.stack(head + tail))
    np.testing.assert_array_equal(end, again)


def test_prepared_pictures_and_tokens_equal_decoded_ones(broken_pool: Pool, tower: DualEncoder, tmp_path: Path) -> None:
    data = settings(broken_pool, max_unusable_fraction=0.5)
    heard: list[tuple[int, int]] = []
    prepared = prepare(broken_pool, tower.processor, data, tmp_path, lambda done, of: heard.append((done, of)))
    assert heard[-1] == (64, 64)
    rows = np.flatnonzero(prepared.usable(slice(0, len(broken_pool))))
    assert set(range(64)) - set(rows.tolist()) == set(BROKEN)
    picked = np.random.default_rng(0).permutation(rows)[:20]
    decoded = Decoding(broken_pool, tower.processor, data).fetch(picked)
    stored = prepared.fetch(picked)
    assert torch.equal(stored.images, decoded.images)
    assert torch.equal(stored.tokens, decoded.tokens)
    assert torch.equal(stored.rows, decoded.rows)
    times = {p: p.stat().st_mtime_ns for p in prepared.folder.iterdir()}
    again = prepare(broken_pool, tower.processor, data, tmp_path)
    assert {p: p.stat().st_mtime_ns for p in again.folder.iterdir()} == times


def test_another_binding_is_prepared_in_another_folder(tmp_path: Path, tower: DualEncoder) -> None:
    one = Pool([write_pool(tmp_path / "one", pairs=8)])
    two = Pool([write_pool(tmp_path / "two", pairs=8, broken={1: pair(77)})])
    folders = {
        prepare(one, tower.processor, settings(one), tmp_path / "p").folder,
        prepare(two, tower.processor, settings(two), tmp_path / "p").folder,
        prepare(one, tower.processor, settings(one, max_pixels=1000), tmp_path / "p").folder,
    }
    assert len(folders) == 3


def test_a_small_pool_with_too_many_bad_pairs_is_not_prepared(
    broken_pool: Pool, tower: DualEncoder, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="5 of 64 pairs are unusable") as caught:
        prepare(broken_pool, tower.processor, settings(broken_pool), tmp_path)
    assert caught.value.field == "data.max_unusable_fraction"
    assert list(tmp_path.iterdir()) == []


def test_nothing_usable_stops_at_once(tmp_path: Path, tower: DualEncoder) -> None:
    bad = {row: {"png": b"?", "txt": b"x"} for row in range(8)}
    pool = Pool([write_pool(tmp_path, pairs=8, broken=bad)])
    order = FullOrder([range(8)], 4, 0)
    batches = SuperBatches(Decoding(pool, tower.processor, settings(pool)), order, 4, order.start(), RowSet(8))
    with pytest.raises(DataError, match="4 unreadable picture"):
        next(batches)
    batches.close()


@pytest.mark.parametrize("place", ["os.posix_fallocate", "numpy.save"])
def test_a_full_disk_leaves_no_half_prepared_pool(
    tmp_path: Path, tower: DualEncoder, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    pool = Pool([write_pool(tmp_path / "pool", pairs=8)])
    with monkeypatch.context() as patch:
        patch.setattr(place, full)
        with pytest.raises(DataError, match="No space left on device") as caught:
            prepare(pool, tower.processor, settings(pool), tmp_path / "prepared")
    assert "free disk space" in caught.value.remedy
    assert caught.value.field == "data.prepared"
    assert not list((tmp_path / "prepared").iterdir())
    assert prepare(pool, tower.processor, settings(pool), tmp_path / "prepared").usable(slice(0, len(pool))).sum() == 8


def test_prepared_pictures_that_are_stored_by_columns_are_refused(tmp_path: Path, tower: DualEncoder) -> None:
    pool = Pool([write_pool(tmp_path / "pool", pairs=8)])
    folder = prepare(pool, tower.processor, settings(pool), tmp_path / "prepared").folder
    np.save(folder / "images.npy", np.asfortranarray(np.load(folder / "images.npy")))
    with pytest.raises(DataError, match=r"images\.npy is stored by columns"):
        prepare(pool, tower.processor, settings(pool), tmp_path / "prepared")
