# SPDX-License-Identifier: Apache-2.0
"""A world small enough for seconds: real tars with real pictures, towers of one layer, runs of a few steps."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from aced_sdk import config, towers

ARCHITECTURE: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
WORDS = ("red", "green", "blue", "small", "large", "round", "square", "cat", "boat", "tree", "house", "star")


def picture(seed: int, size: tuple[int, int] = (20, 18), kind: str = "png") -> bytes:
    """A picture of coarse noise, encoded."""
    pixels = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST).save(stream, kind)
    return stream.getvalue()


def caption(seed: int) -> str:
    """Three words."""
    return " ".join(WORDS[i] for i in np.random.default_rng([7, seed]).integers(0, len(WORDS), 3))


def pair(number: int) -> dict[str, bytes]:
    """A sample's members by extension."""
    return {
        "png": picture(number),
        "txt": caption(number).encode(),
        "json": json.dumps({"number": number, "noisy": number % 4 == 0}).encode(),
    }


def write_tar(path: Path, samples: Sequence[Mapping[str, bytes]], first: int = 0) -> Path:
    """A WebDataset tar; keys count from `first`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, members in enumerate(samples, start=first):
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{number:06d}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def write_pool(
    folder: Path, pairs: int = 64, shards: int = 2, broken: Mapping[int, dict[str, bytes]] | None = None
) -> Path:
    """A folder of tars; `broken` gives some rows other members."""
    each = pairs // shards
    for shard in range(shards):
        rows = range(shard * each, (shard + 1) * each)
        samples = [(broken or {}).get(row) or pair(row) for row in rows]
        write_tar(folder / f"{shard:04d}.tar", samples, rows.start)
    return folder


def encoder(seed: int = 0, **changes: Any) -> towers.DualEncoder:
    """A tower pair with new weights, in evaluation mode."""
    return towers.build(config.Student(architecture=ARCHITECTURE | changes), seed).eval()


def distillation(directory: Path, pool: Path, reference: Path | None, **changes: Any) -> config.DistillConfig:
    """ACED on one plain process: joint selection of 8 of 16, softmax distillation, 6 steps, a checkpoint every 2."""
    values: dict[str, Any] = {
        "student": config.Student(architecture=ARCHITECTURE),
        "data": config.Data(shards=(str(pool),)),
        "reference": reference and config.Frozen(model=str(reference), cache=directory.parent / "cache"),
        "curation": config.Joint(sub_batch=8, super_batch=16, num_chunks=4),
        "objective": config.Objective(distillation=(config.Distillation(weight=2.0),)),
        "schedule": config.Schedule(steps=6),
        "engine": config.Engine(kind="single", device="cpu", checkpoint_every=2, threads=1),
        "directory": directory,
    }
    return config.DistillConfig(**(values | changes))


def write_world(root: Path, pairs: int = 64) -> Path:
    """A pool and a reference under `root`, for `run_in`."""
    write_pool(root / "pool", pairs=pairs)
    towers.save(encoder(1), root / "reference")
    return root


def run_in(world: Path, directory: Path, **changes: Any) -> config.DistillConfig:
    """`distillation` on a world. All its runs share one embedding cache."""
    reference = config.Frozen(model=str(world / "reference"), cache=world / "cache")
    made = distillation(directory, world / "pool", world / "reference")
    return made.replace(**({"reference": reference} | changes))


def exported(folder: Path, seed: int = 0) -> Path:
    """A small student's export in fp32, under `folder`."""
    import export

    changes = {
        "embed_dim": 8,
        "vision_cfg": ARCHITECTURE["vision_cfg"] | {"width": 16},
        "text_cfg": ARCHITECTURE["text_cfg"] | {"context_length": 12, "heads": 1},
    }
    towers.save(encoder(seed, **changes), folder / "s")
    export.to_onnx(folder / "s", folder / "o", precisions=("fp32",), measure=False)
    return folder / "o"
