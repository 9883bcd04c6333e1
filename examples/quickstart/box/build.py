# SPDX-License-Identifier: Apache-2.0
"""The data box from end to end: fetch, read, split, render, write; built aside and put in place at once."""

from __future__ import annotations

import hashlib
import json
import os
import random
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from aced_sdk import files

from . import clipart, questions, write
from .config import SIZES, BoxConfig
from .emoji import read_catalogue
from .fetch import PackageGoneError, Progress, cannot_write, fetch, home_folder, locked, read_tar
from .pictures import Candidate, read_sets
from .render import Picture, render_all
from .sources import APT_CLIPART, APT_STAMPS, CAPTIONS, PICTURES, Package, PictureSet
from .splits import Splits, decide_fates, plain, shuffle_captions, split

RECIPE_VERSION = 2  # raise it when the same config and packages give another box
TEMPLATES = ("{c}", "an emoji of a {c}", "a drawing of a {c}", "an icon of a {c}")
FLAG_TEMPLATES = ("flag: {c}", "the flag of {c}", "an emoji of the flag of {c}")
STAMP_TEMPLATES = ("{c}",)


@dataclass(frozen=True)
class Box:
    """A finished box: its folder and its manifest."""

    directory: Path
    manifest: dict[str, Any]

    @property
    def trusted(self) -> Path:
        """Shards whose captions are all true, in the reference's styles."""
        return self.directory / "trusted"

    @property
    def pool(self) -> Path:
        """Shards to train from, in the student's styles, with shuffled captions among them."""
        return self.directory / "pool"

    @property
    def evaluation(self) -> Path:
        """Tasks to report, one folder each."""
        return self.directory / "evaluation"

    @property
    def validation(self) -> Path:
        """Tasks to choose settings on."""
        return self.directory / "validation"

    @property
    def vqa(self) -> Path:
        """`train.json`, `test.json` and `images/`."""
        return self.directory / "vqa"


def build_box(config: BoxConfig, home: Path | None = None, progress: Progress | None = None) -> Box:
    """Build the box of `config` in the home folder, or take the one that is there.

    Args:
        home: where downloads and boxes go; by default ACED_HOME, else the user's cache folder.
        progress: called with what is being done, how much is done and how much there is.

    Raises:
        FetchError: a needed package cannot be had or is not what was pinned.
        DataError: an archive cannot be read, or the home folder cannot be written.
    """
    root = home_folder(home)
    recipe = recipe_of(config)
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
    target = root / "box" / digest[:12]
    if (manifest := read_manifest(target, recipe)) is not None:
        return Box(target, manifest)
    with locked(root):
        # Whoever held the lock may have built this very box meanwhile.
        if (manifest := read_manifest(target, recipe)) is not None:
            return Box(target, manifest)
        began = time.monotonic()
        loaded = _load(config, root / "downloads", progress or _silent)
        try:
            with tempfile.TemporaryDirectory(prefix=".part-", dir=target.parent) as temporary:
                inside = Path(temporary) / "box"
                inside.mkdir()
                manifest = _write_box(config, loaded, inside, progress or _silent)
                manifest = {"recipe": recipe, "seconds": round(time.monotonic() - began, 1), **manifest}
                write.write_json(inside / "manifest.json", manifest)
                if target.exists():  # damaged: read_manifest refused it
                    os.replace(target, Path(temporary) / "damaged")
                os.replace(inside, target)
        except OSError as error:
            raise cannot_write(target, error) from error
    return Box(target, manifest)


def recipe_of(config: BoxConfig) -> dict[str, Any]:
    """Everything that decides what is in the box: the config and the pinned packages."""
    packages = {part.package.name: part.package.sha256 for part in chosen_sets(config)}
    return {
        "recipe_version": RECIPE_VERSION,
        "config": config.model_dump(),
        "size": asdict(SIZES[config.size]),
        "packages": {CAPTIONS.name: CAPTIONS.sha256, **packages},
    }


def chosen_sets(config: BoxConfig) -> list[PictureSet]:
    """The picture sets that this size takes."""
    return [part for part in PICTURES if part.in_slice or config.size != "slice"]


def read_manifest(folder: Path, recipe: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of a box that is there, whole and of this recipe; None if any of this is not so."""
    try:
        manifest: dict[str, Any] = files.read_json(files.inside(folder, "manifest.json"))
        sizes = {name: files.inside(folder, name).stat().st_size for name in manifest["files"]}
        return manifest if sizes == manifest["files"] and manifest["recipe"] == recipe else None
    except (files.ReadError, OSError, LookupError, TypeError, ValueError):  # damaged, or cut off
        return None


@dataclass
class _Loaded:
    candidates: list[Candidate]
    stamps: dict[str, list[Candidate]]
    sources: list[dict[str, Any]]
    skipped: dict[str, str]
    counts: dict[str, Counter[str]]


def _load(config: BoxConfig, downloads: Path, progress: Progress) -> _Loaded:
    """Fetch what the recipe asks for and read all its drawings."""
    sets = chosen_sets(config)
    progress("fetch emojibase-data", 0, len(sets) + 1)
    captions = fetch(CAPTIONS, downloads)
    sources: list[dict[str, Any]] = [_described(CAPTIONS)]
    archives: dict[PictureSet, Path] = {}
    skipped: dict[str, str] = {}
    for done, part in enumerate(sets, start=1):
        progress(f"fetch {part.name}", done, len(sets) + 1)
        try:
            archives[part] = fetch(part.package, downloads)
        except PackageGoneError as error:
            if part.package.needed:
                raise
            skipped[part.name] = error.cause
        else:
            facts = {"style": part.style, "role": part.role, "kind": part.kind}
            sources.append(_described(part.package) | facts)
    progress("read drawings", 0, 1)
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    catalogue = read_catalogue(read_tar(captions, lambda name: name.startswith("en/") and name.endswith(".json")))
    candidates = read_sets(archives, catalogue, config.picture_size, counts)
    stamps: dict[str, list[Candidate]] = {}
    if config.with_apt and not clipart.has_apt():
        skipped |= dict.fromkeys((APT_CLIPART, APT_STAMPS), "this system has no apt-get and dpkg-deb")
    elif config.with_apt:
        progress("fetch and read clip-art and stamps", 0, 1)
        debs = {name: clipart.fetch_deb(name, downloads) for name in (APT_CLIPART, APT_STAMPS)}
        candidates = sorted([*candidates, *clipart.read_clipart(debs[APT_CLIPART])], key=lambda c: c.key)
        stamps = clipart.read_stamps(debs[APT_STAMPS])
        sources += [clipart.describe(path, name) for name, path in debs.items()]
    return _Loaded(candidates, stamps, sources, skipped, counts)


def _write_box(config: BoxConfig, loaded: _Loaded, folder: Path, progress: Progress) -> dict[str, Any]:
    """Split, render and write everything but the manifest, which is returned."""
    size = SIZES[config.size]
    counts = loaded.counts
    fates = decide_fates(loaded.candidates, config.seed)
    parts = split(loaded.candidates, fates, config, size, counts)
    stamps = [stamp for task in loaded.stamps.values() for stamp in task]
    pictures = render_all([*parts.everything(), *stamps], config.picture_size, counts, progress)
    progress("write", 0, 1)
    rows = _write_training(config, parts, pictures, folder)
    tasks = _write_tasks(parts, loaded.stamps, pictures, folder)
    vqa = _write_vqa(config, parts, pictures, folder)
    progress("write", 1, 1)
    sized = [path for path in sorted(folder.rglob("*")) if path.suffix in (".tar", ".json")]
    return {
        "rows": rows,
        "tasks": tasks,
        "vqa": vqa,
        "concepts": dict(Counter(fates.values())),
        "held_out_concepts": sorted(concept for concept, fate in fates.items() if fate != "train"),
        **{name: dict(counts[name]) for name in ("blank", "unreadable", "unjoined", "left_out")},
        "skipped": loaded.skipped,
        "sources": loaded.sources,
        "files": {str(path.relative_to(folder)): path.stat().st_size for path in sized},
    }


def _write_training(
    config: BoxConfig, parts: Splits, pictures: dict[str, Picture], folder: Path
) -> dict[str, dict[str, Any]]:
    """The trusted shards and the pool with its noise; returns their counts."""
    counts: dict[str, dict[str, Any]] = {}
    for name, part, noise in (("trusted", parts.trusted, 0.0), ("pool", parts.pool, config.noise)):
        rng = random.Random(f"{config.seed} {name}")
        rows = [c for c in part if c.key in pictures]
        rng.shuffle(rows)
        captions = shuffle_captions([c.caption for c in rows], noise, rng)
        write.write_pairs(folder / name, list(zip(rows, captions, strict=True)), pictures)
        counts[name] = {
            "rows": len(rows),
            "noisy": sum(c.caption != caption for c, caption in zip(rows, captions, strict=True)),
            "distinct_captions": len(set(captions)),
            "kinds": dict(Counter(c.kind for c in rows)),
            "styles": dict(Counter(c.style for c in rows)),
        }
    return counts


def _write_tasks(
    parts: Splits, stamps: dict[str, list[Candidate]], pictures: dict[str, Picture], folder: Path
) -> dict[str, dict[str, int]]:
    """Evaluation and validation tasks; returns pictures and texts of each."""
    evaluation, validation = folder / "evaluation", folder / "validation"
    countries = [replace(c, caption=c.meaning.country) for c in parts.flags if c.meaning and c.meaning.country]
    by_style = {style: [c for c in parts.unseen_style if c.style == style] for style in ("twemoji", "openmoji")}
    tasks: list[tuple[Path, Sequence[Candidate], Sequence[str]]] = [
        *((evaluation / f"unseen_style_{style}", rows, TEMPLATES) for style, rows in by_style.items()),
        (evaluation / "unseen_concept", parts.unseen_concept, TEMPLATES),
        (evaluation / "flags", countries, FLAG_TEMPLATES),
        *((evaluation / name, rows, STAMP_TEMPLATES) for name, rows in stamps.items()),
        (validation / "validation_style", parts.validation_style, TEMPLATES),
        (validation / "validation_concept", parts.validation_concept, TEMPLATES),
    ]
    counts: dict[str, dict[str, int]] = {}
    for path, part, templates in tasks:
        rows = [(c.key, pictures[c.key].png, c.caption) for c in part if c.key in pictures]
        counts[path.name] = {"pictures": len(rows), "texts": write.write_zero_shot(path, rows, templates)}
        if path.name == "unseen_concept":
            retrieval = write.write_retrieval(evaluation / f"retrieval_{path.name}", rows)
            counts[f"retrieval_{path.name}"] = {"pictures": len(rows), "texts": retrieval}
    return counts


def _write_vqa(config: BoxConfig, parts: Splits, pictures: dict[str, Picture], folder: Path) -> dict[str, Any]:
    """Questions about training pictures, and about unseen styles for the test; returns counts and answer lists."""
    size = SIZES[config.size]
    rng = random.Random(f"{config.seed} vqa")
    train = questions.ask(plain([*parts.trusted, *parts.pool]), pictures, size.questions_train, rng)
    names = {question.answer for question in train if question.kind == "name"}
    unseen = [*parts.unseen_style, *(c for c in parts.unseen_concept if c.role == "unseen")]
    test = questions.ask(unseen, pictures, size.questions_test, rng, known=names)
    counts: dict[str, Any] = {}
    for name, asked in (("train", train), ("test", test)):
        rng.shuffle(asked)
        images = questions.write_images(folder / "vqa" / "images", asked, pictures)
        write.write_json(folder / "vqa" / f"{name}.json", [question.to_llava() for question in asked])
        counts[name] = {"questions": dict(Counter(q.kind for q in asked)), "pictures": images}
    answers = {kind: sorted({q.answer for q in [*train, *test] if q.kind == kind}) for kind in questions.KINDS}
    return {**counts, "answers": answers}


def _described(package: Package) -> dict[str, Any]:
    return {
        "package": package.name,
        "version": package.version,
        "sha256": package.sha256,
        "licence": package.licence,
        "project": package.project,
    }


def _silent(stage: str, done: int, total: int) -> None:
    """Progress that nobody asked for."""
