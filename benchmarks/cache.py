# SPDX-License-Identifier: Apache-2.0
"""The embedding cache: writing beside the frozen model's bare inference, reading beside RAM and the loader, and scale.

    python -m benchmarks.cache [--device cuda] [--architectures ViT-B-32 ViT-S-32] [--output FILE]

Writing: an open_clip model with random weights embeds PNG pictures made here and their captions. Bare inference has all
pictures decoded and all captions tokenised beforehand; `write_cache` starts from the tars and ends with its files
on disk, the hashing of weights and shards (`start_seconds`) included. Both run alternately, and the best run of each
counts: `share_of_bare` is the ratio of their rates, and `noisy` says that runs of the same work differed by more than a
tenth.
Reading: random rows of a cache of random embeddings, in the page cache as after an epoch, beside the same rows of
tensors in RAM and beside the pictures of the same pairs, decoded from tars or read from prepared arrays. `read_seconds`
of a large step is reading and verifying alone; `rows_seconds` also converts to normalised float32 on the device.
`one_file_per_shard` in the results has figures of the earlier layout, from its last commit on the same machine.
Opening: caches whose rows are a hole in the file, so that they need no space; the list of usable pairs is real.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from aced_sdk.cache import EmbeddingCache, write_cache
from aced_sdk.cache.embeddings import read_ahead, write_usable
from aced_sdk.cache.manifest import CacheManifest, read_manifest
from aced_sdk.cache.rows import Layout, RowReader, RowWriter
from aced_sdk.config import Data, Student
from aced_sdk.data import Decoding, Pool, prepare
from aced_sdk.files import write_json
from aced_sdk.towers import DualEncoder, Embeddings, build
from benchmarks.machine import emit, machine

SHARDS = 4


def picture(generator: np.random.Generator) -> bytes:
    """A PNG of a few plain shapes on white, 128 x 128."""
    image = Image.new("RGB", (128, 128), "white")
    draw = ImageDraw.Draw(image)
    for _ in range(6):
        x, y, wide, high = (int(value) for value in generator.integers(8, 64, 4))
        colour = tuple(int(value) for value in generator.integers(0, 256, 3))
        shape = draw.ellipse if generator.random() < 0.5 else draw.rectangle
        shape((x, y, x + wide, y + high), fill=colour)
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def write_pool(folder: Path, pairs: int, seed: int) -> Pool:
    """Tars of pictures, each with a caption of its own."""
    generator = np.random.default_rng(seed)
    for shard, rows in enumerate(np.array_split(np.arange(pairs), SHARDS)):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for row in rows.tolist():
                text = f"picture {row} of six plain shapes on white, as icons are".encode()
                for extension, content in (("png", picture(generator)), ("txt", text)):
                    member = tarfile.TarInfo(f"{row:06d}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return Pool([folder])


def seconds(work: Callable[..., Any], *arguments: Any) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - start


def writing(encoder: DualEncoder, name: str, pool: Pool, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """`write_cache` beside bare inference, alternately."""
    data = Data(shards=tuple(str(shard) for shard in pool.shards), workers=arguments.workers)
    decoder, everything = Decoding(pool, encoder.processor, data), np.arange(len(pool), dtype=np.int64)
    # As `write_cache` cuts them: no batch crosses from one shard into the next.
    batches = [
        decoder.fetch(everything[rows.start : rows.stop][start : start + arguments.batch])
        for _, rows in pool.shard_rows()
        for start in range(0, len(rows), arguments.batch)
    ]
    decoding = min(seconds(decoder.fetch, everything) for _ in range(2))

    def bare() -> None:
        for batch in batches:
            encoder.encode_image(batch.images).cpu()
            encoder.encode_text(batch.tokens).cpu()

    def write(target: Path) -> None:
        write_cache(encoder, pool, target, data, arguments.batch)

    encoder.encode_image(batches[0].images)  # the first call loads libraries
    start = min(seconds(encoder.fingerprint) for _ in range(2))
    runs = [(seconds(bare), seconds(write, folder / f"{name}-{number}")) for number in range(arguments.repeats)]
    alone, written = zip(*runs, strict=True)
    return {
        "architecture": name,
        "pixels": list(encoder.preprocess_config.size),
        "pairs": len(pool),
        "batch": arguments.batch,
        "decoding_threads": arguments.workers,
        "decoding_pairs_per_second": len(pool) / decoding,
        "start_seconds": start,
        "bare_pairs_per_second": len(pool) / min(alone),
        "write_cache_pairs_per_second": len(pool) / min(written),
        "share_of_bare": min(alone) / min(written),
        "run_seconds": {"bare": alone, "write_cache": written},
        "noisy": any(max(times) > 1.1 * min(times) for times in (alone, written)),
    }


def new_manifest(folder: Path, pairs: int, dim: int) -> CacheManifest:
    """The manifest of a cache of shards of 10,000 pairs."""
    shards = tuple((f"{number:06d}.tar", f"{number:064x}") for number in range(-(-pairs // 10_000)))
    manifest = CacheManifest(model="random", dim=dim, scale=1.0, bias=0.0, shards=shards)
    folder.mkdir()
    write_json(folder / "cache.json", manifest.model_dump(mode="json"))
    return manifest


def random_cache(folder: Path, pairs: int, dim: int, seed: int) -> tuple[EmbeddingCache, float]:
    """A cache of random embeddings, and how many seconds its rows took to be written and synced."""
    manifest, spent = new_manifest(folder, pairs, dim), 0.0
    file, noise = RowWriter(folder, Layout(manifest, pairs)), torch.Generator().manual_seed(seed)
    spent += seconds(file.reserve)
    for start in range(0, pairs, 10_000):
        rows = np.arange(start, min(start + 10_000, pairs))
        image, text = torch.nn.functional.normalize(torch.randn(2, len(rows), dim, generator=noise), dim=-1)
        spent += seconds(file.write, rows, image, text)
    spent += seconds(file.sync)
    file.close()
    write_usable(folder, manifest, np.ones(pairs, np.bool_))
    return EmbeddingCache(folder, manifest, pairs), spent


# Its own process, so that the memory is that of opening alone.
OPENING = """
import json, sys, time
from pathlib import Path
from aced_sdk.cache import EmbeddingCache
from aced_sdk.cache.manifest import read_manifest

def kib(name):
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith(name)))

folder, pairs = Path(sys.argv[1]), int(sys.argv[2])
before, start = kib("VmRSS"), time.perf_counter()
cache = EmbeddingCache(folder, read_manifest(folder), pairs)
spent = time.perf_counter() - start
maps = sum(str(folder) in line for line in open("/proc/self/maps"))
print(json.dumps([spent, (kib("VmRSS") - before) / 1024, maps]))
"""


def opening(folder: Path, pairs: int, dim: int, repeats: int) -> dict[str, Any]:
    """Seconds and memory to open a cache of so many pairs, its shards' names and digests included."""
    manifest = new_manifest(folder, pairs, dim)
    size = Layout(manifest, pairs).size
    with (folder / "rows.bin").open("wb") as file:
        os.truncate(file.fileno(), size)
    write_usable(folder, manifest, np.ones(pairs, np.bool_))
    command = [sys.executable, "-c", OPENING, str(folder), str(pairs)]
    runs = [json.loads(subprocess.run(command, check=True, capture_output=True).stdout) for _ in range(repeats)]
    for path in folder.iterdir():
        path.unlink()
    return {
        "pairs": pairs,
        "rows_gigabytes": size / 1e9,
        "shards": len(manifest.shards),
        "open_seconds": min(run[0] for run in runs),
        "resident_megabytes": max(run[1] for run in runs),
        "maps": runs[0][2],
    }


def large_step(cache: EmbeddingCache, pairs: int, written: float, arguments: argparse.Namespace) -> dict[str, Any]:
    """A step of a large super-batch, and the rates of writing and of the checksum."""
    layout = Layout(read_manifest(cache.directory), pairs)
    reader, noise = RowReader(cache.directory, layout), np.random.default_rng(arguments.seed)

    def read(rows: np.ndarray[Any, np.dtype[np.int64]]) -> None:
        for _ in read_ahead(reader.take, np.split(rows, range(2048, len(rows), 2048)), threads=8):
            pass

    def scan() -> None:
        for _, _, intact in reader.read(range(pairs)):
            if not intact.all():
                raise SystemExit("the benchmark's own cache is damaged")

    def check() -> None:
        for _ in range(100):
            layout.intact(block, numbers)

    numbers = np.arange(2048)
    block = reader.take(numbers)
    scan()  # into the page cache
    device, runs = torch.device(arguments.device), []
    for _ in range(arguments.repeats + 2):
        rows = noise.integers(pairs, size=arguments.step)
        runs.append((seconds(cache.rows, torch.from_numpy(rows), device), seconds(read, rows)))
    return {
        "pairs": pairs,
        "dim": arguments.dim,
        "gigabytes": layout.size / 1e9,
        "rows": arguments.step,
        "rows_seconds": min(run[0] for run in runs),
        "read_seconds": min(run[1] for run in runs),
        "run_seconds": {"rows": [run[0] for run in runs], "read": [run[1] for run in runs]},
        "noisy": any(max(times) > 1.1 * min(times) for times in zip(*runs, strict=True)),
        "checksum_gigabytes_per_second": 100 * block.nbytes / min(seconds(check) for _ in range(5)) / 1e9,
        "scan_gigabytes_per_second": layout.size / min(seconds(scan) for _ in range(3)) / 1e9,
        "write_gigabytes_per_second": layout.size / written / 1e9,
    }


def reading(encoder: DualEncoder, pool: Pool, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """`rows` beside the same rows in RAM and beside the step's data loading."""
    device = torch.device(arguments.device)
    cache, _ = random_cache(folder / "random", arguments.cached, arguments.dim, arguments.seed)
    whole = cache.embeddings

    def from_ram(rows: torch.Tensor) -> Embeddings:
        picked = whole[rows]
        image, text = (torch.nn.functional.normalize(v.to(device).float(), dim=-1) for v in (picked.image, picked.text))
        return Embeddings(image, text, 1.0)

    data = Data(shards=tuple(str(shard) for shard in pool.shards), workers=arguments.workers)
    decoder = Decoding(pool, encoder.processor, data)
    prepared = prepare(pool, encoder.processor, data, folder / "prepared")
    noise = torch.Generator().manual_seed(arguments.seed)
    results = []
    for batch in arguments.batches:
        times: dict[str, list[float]] = {"rows": [], "ram": [], "prepared": [], "decoding": []}
        for _ in range(arguments.repeats + 2):
            rows = torch.randint(arguments.cached, (batch,), generator=noise)
            pictures = rows.numpy() % len(pool)
            times["rows"].append(seconds(cache.rows, rows, device))
            times["ram"].append(seconds(from_ram, rows))
            times["prepared"].append(seconds(prepared.fetch, pictures))
            sample = pictures[:256]
            times["decoding"].append(seconds(decoder.fetch, sample) * batch / len(sample))
        best = {name: min(values) for name, values in times.items()}
        results.append(
            {
                "rows": batch,
                "seconds": best,
                "rows_over_ram": best["rows"] / best["ram"],
                "rows_over_prepared_pictures": best["rows"] / best["prepared"],
                "rows_over_decoding": best["rows"] / best["decoding"],
            }
        )
    return {
        "pairs": arguments.cached,
        "dim": arguments.dim,
        "megabytes": 4 * arguments.cached * arguments.dim / 1e6,
        "batches": results,
    }


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description="writing and reading of the embedding cache")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--architectures", nargs="+", default=["ViT-B-32"], help="open_clip names of frozen models")
    parser.add_argument("--pairs", type=int, default=128, help="pairs to embed")
    parser.add_argument("--batch", type=int, default=16, help="pairs read at once while writing")
    parser.add_argument("--threads", type=int, default=1, help="torch's CPU threads")
    parser.add_argument("--workers", type=int, default=1, help="threads that decode")
    parser.add_argument("--cached", type=int, default=100_000, help="pairs in the cache that is read")
    parser.add_argument("--dim", type=int, default=768, help="embedding dimension of the cache that is read")
    parser.add_argument("--scale", type=int, nargs="*", default=[1_000_000, 128_000_000], help="pairs of opened caches")
    parser.add_argument("--large", type=int, default=1_000_000, help="pairs in the cache of a large step")
    parser.add_argument("--step", type=int, default=163_840, help="rows of a large step")
    parser.add_argument("--batches", type=int, nargs="+", default=[1024, 4096], help="rows read at once")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="write the JSON object to this file too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result: dict[str, Any] = {"benchmark": "cache", "seed": arguments.seed, "writing": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "pool").mkdir()
        pool = write_pool(folder / "pool", arguments.pairs, arguments.seed)
        for architecture in arguments.architectures:
            encoder = build(Student(architecture=architecture), arguments.seed).eval().to(arguments.device)
            result["writing"].append(writing(encoder, architecture, pool, folder, arguments))
        result["reading"] = reading(encoder, pool, folder, arguments)
        result["opening"] = [
            opening(folder / f"sparse-{pairs}", pairs, arguments.dim, arguments.repeats) for pairs in arguments.scale
        ]
        cache, written = random_cache(folder / "large", arguments.large, arguments.dim, arguments.seed)
        result["large_step"] = large_step(cache, arguments.large, written, arguments)
        result["load"] = os.getloadavg()
    emit(result | machine(arguments.device), arguments.output)


if __name__ == "__main__":
    main()
