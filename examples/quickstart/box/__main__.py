# SPDX-License-Identifier: Apache-2.0
"""Build the data box from a terminal: `python -m examples.quickstart.box`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from aced_sdk.errors import AcedError

from . import BoxConfig, build_box, fetch_models


def main(
    slice_only: Annotated[bool, typer.Option("--slice", help="a small box for a first look and for tests")] = False,
    full: Annotated[bool, typer.Option("--full", help="all icons and logos")] = False,
    with_apt: Annotated[bool, typer.Option("--with-apt", help="add clip-art and Tux Paint stamps (Debian)")] = False,
    models: Annotated[bool, typer.Option("--models", help="fetch the pretrained models as well")] = False,
    seed: Annotated[int, typer.Option(help="decides held-out concepts, noise and order")] = 0,
    noise: Annotated[float, typer.Option(help="share of the pool's captions dealt to wrong pictures")] = 0.5,
    home: Annotated[Path | None, typer.Option(help="instead of ACED_HOME or the cache folder")] = None,
) -> None:
    """Fetch, check, render, join, split and write the quickstart's real data."""
    size = "slice" if slice_only else "full" if full else "small"
    try:
        config = BoxConfig.model_validate({"seed": seed, "noise": noise, "size": size, "with_apt": with_apt})
        box = build_box(config, home, _show)
        folders = fetch_models(home, _show) if models else {}
    except AcedError as error:
        print(f"\n{error}", file=sys.stderr)
        raise typer.Exit(1) from error
    print(f"\r\033[K{box.directory}")
    for name, rows in box.manifest["rows"].items():
        print(f"{name}: {rows['rows']} rows, {rows['noisy']} with a shuffled caption, {json.dumps(rows['kinds'])}")
    for name, task in box.manifest["tasks"].items():
        print(f"{name}: {task['pictures']} pictures, {task['texts']} texts")
    for name in ("train", "test"):
        print(f"vqa {name}: {json.dumps(box.manifest['vqa'][name]['questions'])}")
    for name, reason in box.manifest["skipped"].items():
        print(f"skipped {name}: {reason}")
    for name, folder in folders.items():
        print(f"{name}: {folder}")


def _show(stage: str, done: int, total: int) -> None:
    print(f"\r\033[K{stage} {done}/{total}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    typer.run(main)
