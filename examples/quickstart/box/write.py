# SPDX-License-Identifier: Apache-2.0
"""Writing: WebDataset shards to train from, and evaluation folders in CLIP_benchmark's WebDataset layout."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .pictures import Candidate
from .render import Picture

ROWS_PER_SHARD = 1000


def write_tar(path: Path, rows: Sequence[Mapping[str, bytes]], keys: Sequence[str]) -> None:
    """One shard: of each row the files KEY.EXTENSION, extensions sorted; equal rows give equal bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, row in zip(keys, rows, strict=True):
            for extension, data in sorted(row.items()):
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def write_pairs(folder: Path, rows: Sequence[tuple[Candidate, str]], pictures: Mapping[str, Picture]) -> None:
    """Shards of (candidate, caption as trained on) in the order given, at most 1,000 rows each."""
    for start in range(0, len(rows), ROWS_PER_SHARD):
        shard = rows[start : start + ROWS_PER_SHARD]
        files = [
            {"png": pictures[c.key].png, "txt": caption.encode(), "json": _json(_facts(c, caption, pictures[c.key]))}
            for c, caption in shard
        ]
        write_tar(folder / f"{start // ROWS_PER_SHARD:05d}.tar", files, [c.key for c, _ in shard])


def write_zero_shot(folder: Path, rows: Sequence[tuple[str, bytes, str]], templates: Sequence[str]) -> int:
    """A zero-shot task of (key, PNG, class name) and its prompt templates with `{c}`; returns the number of classes."""
    names = sorted({name for _, _, name in rows})
    index = {name: number for number, name in enumerate(names)}
    files = [{"png": png, "cls": str(index[name]).encode()} for _, png, name in rows]
    write_tar(folder / "test" / "0.tar", files, [key for key, _, _ in rows])
    (folder / "test" / "nshards.txt").write_text("1\n")
    (folder / "classnames.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    (folder / "zeroshot_classification_templates.txt").write_text("\n".join(templates) + "\n", encoding="utf-8")
    return len(names)


def write_retrieval(folder: Path, rows: Sequence[tuple[str, bytes, str]]) -> int:
    """A retrieval task of (key, PNG, text); returns the number of distinct texts."""
    files = [{"png": png, "txt": text.encode()} for _, png, text in rows]
    write_tar(folder / "test" / "0.tar", files, [key for key, _, _ in rows])
    (folder / "test" / "nshards.txt").write_text("1\n")
    (folder / "dataset_type.txt").write_text("retrieval\n")
    return len({text for _, _, text in rows})


def write_json(path: Path, value: Any) -> None:
    """Indented JSON with a newline at its end."""
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _facts(candidate: Candidate, caption: str, picture: Picture) -> dict[str, Any]:
    return {
        "source": candidate.source,
        "license": candidate.licence,
        "style": candidate.style,
        "kind": candidate.kind,
        "concept": candidate.concept,
        "true_caption": candidate.caption,
        "noisy": caption != candidate.caption,
        "colour": picture.colour,
    }


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, ensure_ascii=False).encode()
