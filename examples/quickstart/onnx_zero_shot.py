# SPDX-License-Identifier: Apache-2.0
"""Zero-shot accuracy through ONNX alone: a process that never imports torch.

Usage: python -m examples.quickstart.onnx_zero_shot FOLDER PRECISION EVALUATION TASK[,TASK...]
"""

from __future__ import annotations

import json
import sys
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from aced_sdk.errors import DataError
from aced_sdk.files import printable
from aced_sdk.files.reading import MAX_TEXT
from aced_sdk.processing.plain import open_picture
from export.runtime.encoder import OnnxEncoder


def main(folder: str, precision: str, evaluation: str, tasks: str) -> None:
    """Print one JSON object: task to top-1 and top-5."""
    encoder = OnnxEncoder(folder, precision=precision, threads=1)
    figures = {}
    for task in tasks.split(","):
        root = Path(evaluation) / task
        names = _lines(root / "classnames.txt")
        templates = [t.replace("{c}", "{}") for t in _lines(root / "zeroshot_classification_templates.txt")]
        images, labels = _pictures(root / "test")
        logits = encoder.zero_shot(images, names, templates)
        top = np.argsort(-logits, axis=1)[:, :5]
        hits = top == np.array(labels)[:, None]
        figures[task] = {"acc1": float(hits[:, 0].mean()), "acc5": float(hits.any(axis=1).mean())}
    if "torch" in sys.modules:
        raise SystemExit("torch was imported: the runtime should not need it")
    print(json.dumps(figures))


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _pictures(folder: Path) -> tuple[list[Image.Image], list[int]]:
    images: dict[str, Image.Image] = {}
    labels: dict[str, int] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                stream = tar.extractfile(member)
                data = stream.read(MAX_TEXT) if stream else b""  # a sparse member can name gigabytes
                try:
                    if extension == "cls":
                        labels[key] = int(data)
                    else:
                        images[key] = open_picture(data)
                except ValueError as error:
                    cause = f"{printable(member.name)} in {path.name}: {printable(error)}"
                    raise DataError(cause, remedy="remove the data box and start again") from None
    return [images[key] for key in labels], list(labels.values())


if __name__ == "__main__":
    main(*sys.argv[1:5])
