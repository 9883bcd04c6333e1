# SPDX-License-Identifier: Apache-2.0
"""Hostile event logs: a report, a resume and a gallery refuse them by line, or show what can be shown."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from aced_sdk.curation import COLLAPSE_REMEDY, even_pool_size
from aced_sdk.engine.events import CheckpointSaved, StepSkipped, Warned
from aced_sdk.errors import AcedError
from aced_sdk.files import save_tensors, write_json
from aced_sdk.reporting import JsonlWriter, read_events
from aced_sdk.reporting.page import image_uri
from aced_sdk.reporting.run_report import report
from aced_sdk.training.events import Evaluated, RunEnded, RunStarted, Selected, StudentStep
from tests.security.sandbox import run

Row = dict[str, Any]


def step(number: int) -> StudentStep:
    parts = {"contrastive": 1.0, "softmax": 0.5}
    return StudentStep(number, 2.0 / number, parts, 1e-3, 0.5, 8 * number, 0.2, 0.05, 16 * number)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A curated run of two steps with every kind of event, a pool and a checkpoint."""
    root = tmp_path_factory.mktemp("logs")
    pool = tiny.write_pool(root / "pool", 40)
    folder = root / "run"
    tiny.distillation(folder, pool, root / "reference").to_yaml(folder / "config.yaml")
    names = ("unique_coverage", "top_decile_fraction", "effective_pool_size", "noisy_selected", "noisy_candidates")
    scores = {"candidates": (-5.0, -4.0, -3.0, -2.0, -1.0), "picked": (-2.0, -1.5, -1.0, -0.5, 0.0)}
    with JsonlWriter(folder / "events.jsonl") as log:
        log(RunStarted(0, 2, "abc", {"pairs": 40}))
        for number in (1, 2):
            rows = tuple(range(16))
            log(Selected(number, rows[number : number + 8], rows, dict.fromkeys(names, 0.5), scores))
            log(step(number))
        log(Evaluated(2, {"shapes": {"acc1": 0.5, "acc5": 0.9}}, 16, 32))
        log(StepSkipped(2, "the loss was not finite", 1, ("a", "b")))
        log(Warned(2, "the draws have collapsed", COLLAPSE_REMEDY))
        log(CheckpointSaved(2, "checkpoints/step-00000002"))
        log(RunEnded(2, 1.0, 16, 32))
    checkpoint = folder / "checkpoints" / "step-00000002"
    checkpoint.mkdir(parents=True)
    save_tensors(checkpoint / "loop.safetensors", {"counts": torch.arange(40, dtype=torch.int32)})
    write_json(checkpoint / "state.json", {"step": 2})
    return root


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    """The run's folder, to be spoilt; the pool is where it was."""
    shutil.copytree(made / "run", tmp_path / "run")
    return tmp_path / "run"


def rows_of(folder: Path) -> list[Row]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def write(folder: Path, rows: list[Any]) -> None:
    (folder / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _report(folder: Path) -> str:
    return report(folder).read_text(encoding="utf-8")


def _truncate(folder: Path) -> int:
    """What `aced.resume` does with a log."""
    with JsonlWriter(folder / "events.jsonl") as log:
        log.truncate_after(1)
    return sum(1 for _ in read_events(folder / "events.jsonl"))


# -- mutations ----------------------------------------------------------------------------------------------------

ODD: tuple[Any, ...] = (
    None, True, -1, 0, 2**63, 10**30, 10**400, 1e308, -1e308, float("nan"), float("inf"), 1.5, "", "x", "$\\frac{",
    "\ud800", "\x1b[31m", "[red]", "a" * 5000, [], {}, [None], [[1]], {"a": 1}, {"a": None}, {"a": {"b": 1}}, [-1],
    [10**12], ["x"], [1, 2, 3, 4, 5], [1, None, 3, 4, 5], {"candidates": [1, 2], "picked": [1]}, {"\ud800": 1.0},
)  # fmt: skip
NAMES = ("event", "step", "picked", "candidates", "facts", "metrics", "statistics", "scores", "keys", "parts")
KINDS = ("selected", "step_done", "evaluated", "run_started", "warned", "step_skipped", "run_ended")
NOISE = (b"\0", b"{" * 200, b"[" * 100_000, b"9" * 5000, b"\n", b"\xff", b"NaN", b"1e999", b"null")


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a value, with each of its keys or places."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


def mutated(folder: Path, seed: int) -> bytes:
    """The log of a good run with one to three faults."""
    dice, rows = random.Random(seed), rows_of(folder)
    for _ in range(dice.choice([1, 1, 2, 3])):
        row = dice.choice(rows)
        holder, key = dice.choice(list(places(row)) or [(row, "event")])
        fault = dice.randrange(6)
        if fault < 3:
            holder[key] = dice.choice(ODD)
        elif fault == 3:
            del holder[key]
        elif fault == 4:
            row[dice.choice(NAMES)] = dice.choice((*ODD, *KINDS))
        else:
            dice.shuffle(rows)
    content = bytearray("".join(json.dumps(row) + "\n" for row in rows).encode())
    if dice.random() < 0.25:
        at = dice.randrange(len(content))
        content[at : at + dice.choice([0, 1, 40])] = dice.choice(NOISE)
    return bytes(content)


def _mutations(folder: Path, seeds: range) -> dict[str, int]:
    """How the reports and truncations of mutated logs end; charts are checked and not drawn."""
    from unittest.mock import patch

    def chart(lines: dict[str, list[tuple[float, float]]], **_: Any) -> str:
        assert all(abs(number) < 1e40 for points in lines.values() for point in points for number in point)
        return ""

    ends = dict.fromkeys(("shown", "refused"), 0)
    good = rows_of(folder)
    for seed in seeds:
        write(folder, good)
        content = mutated(folder, seed)
        for call in (_report, _truncate):
            (folder / "events.jsonl").write_bytes(content)
            try:
                with patch("aced_sdk.reporting.run_report.line_chart", chart):
                    call(folder)
                ends["shown"] += 1
            except AcedError:
                ends["refused"] += 1
            except Exception as error:
                raise AssertionError(f"mutation {seed}: {error!r}") from error
    return ends


def test_mutated_logs_are_shown_or_refused(copy: Path) -> None:
    ends = run(_mutations, copy, range(200), seconds=120).returned()
    assert ends["shown"] > 40
    assert ends["refused"] > 40


# -- single rows --------------------------------------------------------------------------------------------------


def change(kind: str, **values: Any) -> Callable[[list[Row]], None]:
    def apply(rows: list[Row]) -> None:
        next(row for row in rows[::-1] if row["event"] == kind).update(values)

    return apply


REFUSED: dict[str, tuple[Callable[[list[Row]], None], str]] = {
    "a negative step": (change("step_done", step=-1), "step"),
    "a huge step": (change("step_done", step=10**30), "step"),
    "a step that is true": (change("step_done", step=True), "step"),
    "a loss that is text": (change("step_done", loss="<b>"), "loss"),
    "a loss beyond floats": (change("step_done", loss=10**400), "loss"),
    "a loss of 1e300": (change("step_done", loss=1e300), "loss"),
    "parts that are a list": (change("step_done", parts=[1]), "parts"),
    "1,000 parts": (change("step_done", parts={f"p{n}": 1.0 for n in range(1000)}), "parts"),
    "negative rows": (change("selected", picked=[-1]), "picked"),
    "no candidates": (change("selected", candidates=[]), "candidates"),
    "two quantiles": (change("selected", scores={"candidates": [1, 2], "picked": [1, 2]}), "scores"),
    "metrics of metrics": (change("evaluated", metrics={"a": {"b": {"c": 1}}}), "metrics"),
    "a million pairs less than none": (change("run_started", facts={"pairs": -(10**6)}), "facts"),
    "keys that are numbers": (change("step_skipped", keys=[1]), "keys"),
    "a cause that is a list": (change("warned", cause=["x"]), "cause"),
    "an event that is a list": (change("warned", event=["x"]), "event"),
    "a lone surrogate": (change("warned", cause="\ud800"), "cause"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_hostile_row_is_refused_by_line_and_field(copy: Path, name: str) -> None:
    fault, field = REFUSED[name]
    rows = rows_of(copy)
    fault(rows)
    write(copy, rows)
    assert run(_report, copy).refused("line ", "is not an event", field)


def many(rows: list[Row]) -> None:
    """More statistics, metrics, warnings and alarms than anybody reads."""
    selected, evaluated = (next(row for row in rows if row["event"] == kind) for kind in ("selected", "evaluated"))
    warned = next(row for row in rows if row["event"] == "warned")
    rows += [selected | {"statistics": {f"s{n}-{m}": 1.0 for m in range(100)}} for n in range(30)]
    rows += [evaluated | {"metrics": {f"t{n}": {f"m{m}": 0.5 for m in range(50)}}} for n in range(50)]
    rows += [warned] * 50_000


SHOWN: dict[str, Callable[[list[Row]], None]] = {
    "names that are formulas": change("evaluated", metrics={"$\\frac{$": {"m": 0.5}, "$x^{$": {"m": 1}, "\x07\n": {}}),
    "parts that are formulas": change("step_done", parts={"$\\frac{$": 1.0, "_x": 2.0, "<b>": 1}),
    "rows beyond the pool": change("selected", picked=[10**12]),
    "rows beyond the candidates": change("selected", candidates=[10**12]),
    "large losses": change("step_done", loss=-1e38),
    "no numbers": change("step_done", loss=None, parts={}, gradient_norm=None, learning_rate=None),
    "quantiles of which one is not finite": change(
        "selected", scores={"candidates": [None, 1, 2, 3, 4], "picked": [1, 2, 3, 4, 5]}
    ),
    "metrics that are not finite": change("evaluated", metrics={"a": {"b": None}}),
    "a pool that was drawn forever": change("step_done", trained=2**53),
    "one pair": change("run_started", facts={"pairs": 1}),
    "selection without steps": lambda rows: [row.update(step=9) for row in rows if row["event"] == "selected"] and None,
    "many": many,
}


@pytest.mark.parametrize("name", SHOWN)
def test_an_odd_row_is_shown(copy: Path, name: str) -> None:
    rows = rows_of(copy)
    SHOWN[name](rows)
    write(copy, rows)
    outcome = run(_report, copy, seconds=120)
    assert "</html>" in outcome.returned()
    assert len(outcome.value) < 12_000_000
    assert outcome.mib < 400


def test_the_pool_size_of_many_draws_takes_no_memory() -> None:
    assert run(even_pool_size, 2**53, 3, mib=256).returned() == 3
    assert even_pool_size(int(0.999e6) * 50, 50) == pytest.approx(50, rel=1e-5)


# -- files --------------------------------------------------------------------------------------------------------


def sparse(path: Path) -> None:
    with path.open("r+b") as stream:
        stream.truncate(10**13)


def long_line(path: Path) -> None:
    with path.open("ab") as stream:
        stream.write(b'{"event":"a","step":1,"x":[' + b"[]," * 10_000_000 + b"[]]}\n")


def deep(path: Path) -> None:
    with path.open("ab") as stream:
        stream.write(b'{"event":"a","step":1,"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}\n")


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("attack", [sparse, long_line, deep, pipe], ids=lambda attack: attack.__name__)
@pytest.mark.parametrize("call", [_report, _truncate], ids=lambda call: call.__name__)
def test_a_hostile_log_is_refused(copy: Path, call: Callable[[Path], Any], attack: Callable[[Path], None]) -> None:
    attack(copy / "events.jsonl")
    assert run(call, copy, mib=512).refused()


def test_events_of_other_packages_pass(copy: Path) -> None:
    rows = rows_of(copy)
    write(copy, [*rows, {"event": "stage_started", "step": 2, "anything": [{"of": "any kind"}]}])
    assert "</html>" in run(_report, copy).returned()


def test_lines_that_are_kept_are_kept_to_the_byte(copy: Path) -> None:
    line = '{"step": 1, "event":"mine",  "x": 1.50, "y": "\\u00e4\\ud800"}\n'
    (copy / "events.jsonl").write_text(line)
    assert run(_truncate, copy).returned() == 1
    assert (copy / "events.jsonl").read_text() == line


def _log(folder: Path) -> list[Row]:
    with JsonlWriter(folder / "events.jsonl") as log:
        log(StepSkipped(3, "the loss was not finite", 1, ("\udcff",)))
    return list(read_events(folder / "events.jsonl"))[-1:]


def test_an_event_with_a_name_that_is_not_utf8_is_written(copy: Path) -> None:
    (copy / "events.jsonl").unlink()
    assert run(_log, copy).returned()[0]["keys"] == ["?"]


def test_the_gallery_leaves_out_hostile_pictures(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EOF\n"
    broken = {row: tiny.pair(row) | {"png": eps if row % 2 else b""} for row in range(0, 40, 3)}
    broken[5] = tiny.pair(5) | {"txt": b"a" * 5000}
    tiny.write_pool(tmp_path / "pool", 40, broken=broken)
    tiny.distillation(tmp_path / "run", tmp_path / "pool", tmp_path).to_yaml(tmp_path / "run" / "config.yaml")
    assert run(_report, tmp_path / "run").returned().count("data:image/webp") > 12


def _uri(path: Path) -> str:
    return image_uri(path)


@pytest.mark.parametrize("content", [b"", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EOF\n", b"ICO"])
def test_a_page_shows_no_hostile_picture(tmp_path: Path, content: bytes) -> None:
    from PIL import Image

    if content == b"ICO":
        stream = io.BytesIO()
        Image.new("RGB", (64, 64)).save(stream, "ico")
        content = stream.getvalue()
    (tmp_path / "a.png").write_bytes(content)
    assert run(_uri, tmp_path / "a.png").refused("a.png cannot be shown")
