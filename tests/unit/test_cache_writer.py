# SPDX-License-Identifier: Apache-2.0
"""Checksums of rows, and caches that a user's own encoder writes and a run reads."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import distillation, write_pool

import aced_sdk as aced
from aced_sdk.cache import CacheWriter, open_cache
from aced_sdk.cache.manifest import CacheManifest
from aced_sdk.cache.rows import Layout, RowReader, RowWriter
from aced_sdk.data import Pool
from aced_sdk.errors import CacheError, ConfigError

DIM = 6


def layout(dim: int = 96, count: int = 40, **changes: Any) -> Layout:
    values = {"model": "m", "dim": dim, "scale": 1.0, "bias": 0.0, "shards": ()}
    return Layout(CacheManifest(**values | changes), count)


def filled(dim: int = 96, count: int = 40) -> tuple[Layout, Any, Any]:
    """Random rows with checksums, and their numbers."""
    where, numbers = layout(dim, count), np.arange(count)
    rows = np.random.default_rng(0).integers(2**64, size=(count, where.words + 1), dtype=np.uint64)
    rows[:, -1] = where.checksums(rows, numbers)
    return where, rows, numbers


def test_every_single_flipped_bit_changes_the_checksum() -> None:
    where, rows, numbers = filled(dim=8, count=1)
    assert where.intact(rows, numbers).all()
    for place in range(rows.nbytes * 8):
        rows.view(np.uint8)[0, place // 8] ^= 1 << place % 8
        assert not where.intact(rows, numbers).any(), place
        rows.view(np.uint8)[0, place // 8] ^= 1 << place % 8


def test_swapped_moved_and_zeroed_content_changes_the_checksum() -> None:
    where, rows, numbers = filled()
    assert not where.intact(rows[::-1], numbers).any()
    assert not where.intact(rows, numbers + 1).any()
    assert not where.intact(np.zeros_like(rows), numbers).any()
    generator = np.random.default_rng(1)
    for _ in range(2000):
        row = rows[generator.integers(40)]
        changed, place = row.copy(), generator.integers(where.words, size=2)
        changed[place] = row[place[::-1]]
        number = np.flatnonzero((rows == row).all(axis=1))
        assert where.intact(changed[None], number).all() == (place[0] == place[1])


def test_two_flipped_bits_change_the_checksum() -> None:
    """Also the highest bit of two words, which a plain sum of products does not see."""
    where, rows, _ = filled()
    for bit in (0, 15, 31, 32, 47, 62, 63):
        changed = np.repeat(rows[:1], where.words - 1, axis=0)
        changed[:, 0] ^= np.uint64(1 << bit)
        np.einsum("ii->i", changed[:, 1:-1])[:] ^= np.uint64(1 << bit)
        assert not where.intact(changed, np.zeros(len(changed), np.int64)).any()


def test_the_rows_of_another_cache_have_other_checksums() -> None:
    _, rows, numbers = filled()
    for changes in ({"model": "n"}, {"shards": (("a.tar", "0"),)}, {"scale": 2.0}, {"dtype": "bf16"}):
        assert not layout(**changes).intact(rows, numbers).any()


@pytest.mark.parametrize("dim", [1, 3, 6, 768])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_rows_are_read_as_they_were_written(tmp_path: Path, dim: int, dtype: str) -> None:
    where = layout(dim, 50, dtype=dtype)
    file = RowWriter(tmp_path, where)
    assert file.reserve()
    assert not file.reserve()
    assert (tmp_path / "rows.bin").stat().st_size == where.size
    image, text = torch.randn(2, 50, dim)
    order = np.random.default_rng(0).permutation(50)
    file.write(order[:30], image[order[:30]], text[order[:30]])
    file.write(order[:0], image[:0], text[:0])
    file.blank(order[30:45])
    reader = RowReader(tmp_path, where)
    found = where.tensor(reader.take(order[:30]))
    assert torch.equal(found[:, :dim], image[order[:30]].to(where.dtype))
    assert torch.equal(found[:, dim : 2 * dim], text[order[:30]].to(where.dtype))
    assert not where.tensor(reader.take(order[30:45]))[:, : 2 * dim].any()
    intact = np.concatenate([good for _, _, good in reader.read(range(50))])
    assert sorted(np.flatnonzero(~intact)) == sorted(order[45:])
    with pytest.raises(CacheError, match="checksum"):
        reader.take(order[44:46])


# -- a user's own encoder ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    return Pool([write_pool(tmp_path_factory.mktemp("pool"), pairs=48)])


def vectors(dim: int = DIM) -> torch.Tensor:
    return 3 * torch.randn(2, 48, dim, generator=torch.Generator().manual_seed(0))


def writer(directory: Path, pool: Any, **changes: Any) -> CacheWriter:
    values = {"dim": DIM, "scale": 20.0, "bias": -3.0, "model": "mine@1", "trained_with": "sigmoid"}
    return CacheWriter(directory, pool, **values | changes)


def interrupted(directory: Path, pool: Pool, embeddings: torch.Tensor) -> None:
    """A writer that writes 20 rows and fails."""
    try:
        with writer(directory, pool, dim=embeddings.shape[2]) as file:
            file.write(np.arange(20), *embeddings[:, :20])
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass


def test_rows_in_any_order_and_those_left_out_are_unusable(tmp_path: Path, pool: Pool) -> None:
    image, text = vectors()
    order = torch.randperm(48, generator=torch.Generator().manual_seed(1))
    with writer(tmp_path / "c", str(pool.shards[0].parent)) as file:
        assert len(file.missing()) == 48
        for rows in order[:45].split(7):
            file.write(rows, image[rows], text[rows])
        assert sorted(file.missing()) == sorted(order[45:].tolist())
        with pytest.raises(CacheError, match="incomplete"):
            open_cache(tmp_path / "c", pool)
    cache = open_cache(tmp_path / "c", pool, "mine@1")
    assert sorted(torch.nonzero(~cache.usable).flatten().tolist()) == sorted(order[45:].tolist())
    found = cache.rows(order[:45], torch.device("cpu"))
    unit = torch.nn.functional.normalize
    torch.testing.assert_close(found.image, unit(image[order[:45]], dim=1), atol=2e-3, rtol=0)
    torch.testing.assert_close(found.text, unit(text[order[:45]], dim=1), atol=2e-3, rtol=0)
    assert (found.scale, found.bias, found.trained_with) == (20.0, -3.0, "sigmoid")
    assert not cache.rows(order[45:], torch.device("cpu")).image.any()


def test_an_interrupted_writer_continues_with_the_missing_rows(tmp_path: Path, pool: Pool) -> None:
    image, text = vectors()
    interrupted(tmp_path / "c", pool, vectors())
    with writer(tmp_path / "c", pool) as file:
        assert file.missing().tolist() == [*range(20, 48)]
        file.write(file.missing(), image[20:], text[20:])
    assert open_cache(tmp_path / "c", pool).usable.all()
    with writer(tmp_path / "c", pool) as file:  # complete: a replaced row makes it incomplete until the end
        assert not len(file.missing())
        file.write([5], image[:1], text[:1])
        with pytest.raises(CacheError, match="incomplete"):
            open_cache(tmp_path / "c", pool)
    found = open_cache(tmp_path / "c", pool).rows(torch.tensor([0, 5]), torch.device("cpu"))
    assert torch.equal(found.image[0], found.image[1])


def test_wrong_embeddings_and_another_cache_are_refused(tmp_path: Path, pool: Pool) -> None:
    image, text = vectors()
    with writer(tmp_path / "c", pool) as file:
        for rows, wrong, field in (
            ([48], image[:1], "rows"),
            ([-1], image[:1], "rows"),
            ([0, 1], image[:1], "image"),
            ([0], image[:1, :5], "image"),
            ([0], image[:1] * torch.nan, "image"),
            ([0], image[:1] * 0, "image"),
        ):
            with pytest.raises(CacheError) as caught:
                file.write(rows, wrong, text[:1])
            assert caught.value.field == field
        assert len(file.missing()) == 48
    for changes, words in (
        ({"model": "mine@2"}, "another model"),
        ({"dim": 7}, "width 6, not 7"),
        ({"scale": 21.0}, "another scale, bias or loss"),
        ({"dtype": "bf16"}, "holds fp16, not bf16"),
    ):
        with pytest.raises(CacheError, match=words):
            writer(tmp_path / "c", pool, **changes)
    with pytest.raises(CacheError, match="other shards"):
        writer(tmp_path / "c", Pool(pool.shards[:1]))
    for changes in ({"scale": -1.0}, {"model": ""}, {"dim": 0}):
        with pytest.raises(ConfigError):
            writer(tmp_path / "d", pool, **changes)
    assert not (tmp_path / "d").exists()


def test_files_of_something_else_are_not_written_over(tmp_path: Path, pool: Pool) -> None:
    (tmp_path / "rows.bin").write_text("mine")
    with pytest.raises(CacheError, match=r"rows\.bin has no cache\.json"):
        writer(tmp_path, pool)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "rows.bin"]
    assert (tmp_path / "rows.bin").read_text() == "mine"


def test_a_disk_without_room_is_an_error_at_the_start(tmp_path: Path, pool: Pool) -> None:
    with pytest.raises(CacheError, match=r"No space left on device, [0-9,]{15,} bytes") as caught:
        writer(tmp_path / "c", pool, dim=2**40)
    assert "free disk space" in caught.value.remedy
    assert (tmp_path / "c" / "rows.bin").stat().st_size == 0


def test_space_is_reserved_before_anything_is_written(tmp_path: Path, pool: Pool) -> None:
    with writer(tmp_path / "c", pool, dim=2**16):
        facts = os.stat(tmp_path / "c" / "rows.bin")
        assert 512 * facts.st_blocks >= facts.st_size == 48 * (4 * 2**16 + 8)


def test_a_run_uses_a_cache_of_ones_own(tmp_path: Path, pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACED_HOME", str(tmp_path / "home"))
    image, text = vectors(16)
    with writer(tmp_path / "c", pool, dim=16) as file:
        file.write(np.arange(48), image, text)
    cached = aced.Cached(directory=tmp_path / "c")
    shards = pool.shards[0].parent
    config = distillation(tmp_path / "run", shards, Path("unused"), teacher=cached).replace(reference=cached)
    assert aced.plan(config).pairs == 48
    assert aced.distill(config).step == 6
    assert aced.DistillConfig.from_yaml(tmp_path / "run" / "config.yaml").reference == cached
    assert not (tmp_path / "home" / "embeddings").exists()


def test_a_run_refuses_a_cache_of_another_model_or_an_incomplete_one(tmp_path: Path, pool: Pool) -> None:
    interrupted(tmp_path / "c", pool, vectors(16))
    shards = pool.shards[0].parent
    config = distillation(tmp_path / "run", shards, Path("unused"))
    incomplete = config.replace(reference=aced.Cached(directory=tmp_path / "c"))
    with pytest.raises(CacheError, match="incomplete"):
        aced.distill(incomplete)
    other = incomplete.replace(reference=aced.Cached(directory=tmp_path / "c", model="another"))
    with pytest.raises(CacheError, match="is of the model mine@1") as caught:
        aced.distill(other)
    assert caught.value.field == "reference.model"
    nowhere = incomplete.replace(reference=aced.Cached(directory=tmp_path / "nowhere"))
    with pytest.raises(CacheError, match="no embedding cache"):
        aced.distill(nowhere)


def test_a_closed_writer_touches_no_other_file(tmp_path: Path, pool: Pool) -> None:
    with writer(tmp_path / "cache", pool) as made:
        made.write(np.arange(2), torch.ones(2, DIM), torch.ones(2, DIM))
        made.close()
    other = (tmp_path / "other").open("w+b")
    with pytest.raises(CacheError, match="the writer is closed"):
        made.write(np.arange(2), torch.ones(2, DIM), torch.ones(2, DIM))
    other.close()
    assert (tmp_path / "other").read_bytes() == b""
    assert open_cache(tmp_path / "cache", pool).usable.sum() == 2


@pytest.mark.parametrize(
    "rows", [np.array([True, False]), np.array([1.9, 2.9]), np.zeros((2, 1), np.int64), np.array([0, 2**63], np.uint64)]
)
def test_rows_that_are_no_row_numbers_are_refused(tmp_path: Path, pool: Pool, rows: Any) -> None:
    with writer(tmp_path / "cache", pool) as made, pytest.raises(CacheError):
        made.write(rows, torch.ones(2, DIM), torch.ones(2, DIM))
