# SPDX-License-Identifier: Apache-2.0
"""Evaluation tasks in CLIP_benchmark's layout, and the figures that `aced_sdk.evaluate` gives on them."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

import aced_sdk as aced
from tools.clients.expected import Expectations

CLASSES = ("apple", "boat", "cat", "table", "clock", "sky", "tree")
TEMPLATES = ("a photo of a {c}.", "one {c} on a table")
_BOUND = 1e-6  # of figures in 0..1: every hit is the same, ties included


def make(folder: Path, expected: Expectations) -> None:
    """Write `tasks/classes`, `tasks/multilabel` and `tasks/retrieval`, and evaluate the CLIP student on them.

    Samples have very unequal classes. In retrieval, captions and pictures are repeated, so that scores tie.
    """
    generator = np.random.default_rng(1)
    root = folder / "tasks"
    labels = np.minimum(generator.geometric(0.3, 90) - 1, len(CLASSES) - 1)
    _write(root / "classes", [{"cls": str(label).encode()} for label in labels])
    shown = generator.random((60, len(CLASSES))) < np.linspace(0, 0.6, len(CLASSES))  # the first class never
    _write(root / "multilabel", [{"npy": _npy(row)} for row in shown])
    captions = [f"a {size} {name}" for name in CLASSES for size in ("red", "small")]
    picked = [generator.choice(captions, generator.integers(1, 4)) for _ in range(50)]
    _write(root / "retrieval", [{"txt": "\n".join(lines).encode()} for lines in picked], repeat=5)
    report = aced.evaluate(
        folder / "students" / "clip", ("classes", "multilabel", "retrieval"), root, max_unusable_fraction=0
    )
    for task, metrics in report.tasks.items():
        for metric, value in metrics.items():
            expected.add(f"tasks/{task}", metric, value, _BOUND)


def _write(folder: Path, samples: list[Mapping[str, bytes]], repeat: int = 0) -> None:
    """A task of two tars; every `repeat`-th picture is the one before it once more."""
    generator = np.random.default_rng(2)
    test = folder / "test"
    test.mkdir(parents=True)
    picture, half = b"", len(samples) // 2
    for shard, rows in enumerate((range(half), range(half, len(samples)))):
        with tarfile.open(test / f"{shard}.tar", "w") as tar:
            for row in rows:
                if not repeat or (row + 1) % repeat:
                    picture = _png(generator)
                for extension, content in {"png": picture, **samples[row]}.items():
                    member = tarfile.TarInfo(f"{row:04d}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    (test / "nshards.txt").write_text("2")
    (folder / "dataset_type.txt").write_text("classification" if folder.name == "classes" else folder.name)
    (folder / "classnames.txt").write_text("\n".join(CLASSES))
    (folder / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES))


def _png(generator: np.random.Generator) -> bytes:
    coarse = Image.fromarray(generator.integers(0, 256, (3, 3, 3), dtype=np.uint8))
    stream = io.BytesIO()
    coarse.resize((48, 40), Image.Resampling.NEAREST).save(stream, "PNG")
    return stream.getvalue()


def _npy(row: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, row.astype(np.int64))
    return stream.getvalue()
