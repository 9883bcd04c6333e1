# SPDX-License-Identifier: Apache-2.0
"""The HTML report of a distillation run, made from the run's folder."""

from __future__ import annotations

import os
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup

from aced_sdk.config import DistillConfig
from aced_sdk.curation import COLLAPSE_REMEDY, even_pool_size
from aced_sdk.errors import ConfigError, DataError
from aced_sdk.files import ReadError, inside, one_line, printable, read_text
from aced_sdk.reporting.gallery import Group, gallery
from aced_sdk.reporting.jsonl import read_events
from aced_sdk.reporting.page import count, duration, line_chart, percent, write_page
from aced_sdk.reporting.rows import slim
from aced_sdk.reporting.thinning import Thinned

_POINTS = 300
"""Maximum points per line of a chart; more steps are averaged."""

_WARNINGS = 8
"""Warnings shown at the top; more are folded."""

_EVENTS = 5_000_000
"""Maximum events of a log."""

_NAMES = 24
"""Maximum terms, tasks, metrics and statistics shown."""

_LISTED = 1000
"""Maximum warnings, and rows of a table."""

_SCORES = (
    "Pair scores before the first pick, of all candidates and of the picked pairs: the median, the middle half, and "
    "5 to 95 %."
)
_SHARES = (
    (
        {"noisy_selected": "selected", "noisy_candidates": "candidates"},
        "Known wrong captions over steps",
        "Fraction of pairs marked as noisy, among the selected pairs and among all candidates.",
    ),
    (
        {"unique_coverage": "drawn at least once", "top_decile_fraction": "draws of the most drawn tenth"},
        "Coverage of the pool over steps",
        "Fraction of the pool drawn at least once, and fraction of the draws of its most drawn tenth "
        "(10 % if all counts are equal).",
    ),
)

_CURVES, _TOLD, _ONE = ("step_done", "selected", "evaluated"), ("warned", "step_skipped"), ("run_started", "run_ended")

Row = dict[str, Any]
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class _Section:
    anchor: str
    title: str
    charts: list[tuple[Markup, str]]
    heads: list[str] = field(default_factory=list)
    rows: list[tuple[str, str, str]] = field(default_factory=list)


def report(run_directory: str | Path) -> Path:
    """Write `report.html` to a run's folder: warnings, curves, selection, held-out metrics and example pairs.

    A running or interrupted run is reported up to its last event. Pictures are read from the shards in `config.yaml`,
    draw counts from the newest checkpoint. If they are missing, the page says so.

    Args:
        run_directory: a folder with `events.jsonl` and, optionally, `config.yaml` and checkpoints.

    Returns:
        The path of the page.

    Raises:
        DataError: if the event log is missing, broken or has no step yet.
        ConfigError: if the page cannot be written.
    """
    folder = Path(run_directory)
    try:
        log = inside(folder, "events.jsonl")
    except ReadError as error:
        raise DataError(error.cause, remedy=error.remedy) from None
    kinds: dict[str, list[Row]] = {kind: [] for kind in (*_CURVES, *_TOLD, *_ONE)}
    curves = {kind: Thinned() for kind in _CURVES}
    totals: dict[str, float] = defaultdict(float)
    last: Row | None = None
    for number, row in enumerate(read_events(log)):
        if number == _EVENTS:
            raise DataError(f"{printable(log)} has more than {_EVENTS:,} events", remedy="report a shorter log")
        if row["event"] == "selected" and row.get("picked") and row.get("candidates"):
            last = row
        kind = row["event"]
        totals[kind] += 1
        if kind in curves:
            curves[kind].add(slim(row))
        elif kind in _TOLD and len(kinds[kind]) < _LISTED:
            kinds[kind].append(slim(row))
        elif kind in _ONE:
            kinds[kind] = [slim(row)]
        for name in ("seconds", "data_seconds") if kind == "step_done" else ():
            totals[name] += row[name]
    kinds |= {kind: thinned.rows() for kind, thinned in curves.items()}
    kinds = {kind: rows for kind, rows in kinds.items() if rows}
    steps = kinds.get("step_done", [])
    if not steps:
        raise DataError(
            f"{printable(folder)} has logged no step yet", remedy="wait until the run has taken its first step"
        )
    config = _config(folder)
    groups: list[Group] = []
    left_out = ""
    if isinstance(config, DistillConfig) and (config.curation.needs_student or config.curation.needs_reference):
        groups, left_out = gallery(folder, config, last)
    elif isinstance(config, str) and "selected" in kinds:
        left_out = f"The gallery is left out: {config}."
    try:
        sections = [
            _training(steps),
            _evaluation(kinds.get("evaluated", [])),
            _selection(kinds, config if isinstance(config, DistillConfig) else None),
        ]
        return write_page(
            folder / "report.html",
            "run.html.j2",
            title=f"Run {one_line(Path(os.path.realpath(folder)).name)}",
            state=_state(kinds, totals),
            tiles=_tiles(kinds, totals),
            sections=[section for section in sections if section is not None],
            groups=groups,
            left_out=left_out,
            warnings=_warnings(kinds),
            warnings_shown=_WARNINGS,
            config=_text(folder),
        )
    except OSError as error:
        # On import, matplotlib reads the user's configuration folder.
        where = printable(error.filename or folder)
        cause = f"cannot make the report of {printable(folder)}: {where}: {error.strerror}"
        raise DataError(cause, remedy="check permissions and space") from error


def _config(folder: Path) -> DistillConfig | str:
    """The run's config, or the reason why it cannot be read."""
    try:
        return DistillConfig.from_yaml(inside(folder, "config.yaml"))
    except (ConfigError, ReadError) as error:
        return printable(error.cause)


def _text(folder: Path) -> str:
    """The text of the run's config; "" if it cannot be read."""
    try:
        return read_text(inside(folder, "config.yaml"))
    except ReadError:
        return ""


def _state(kinds: dict[str, list[Row]], totals: Mapping[str, float]) -> str:
    last = kinds["step_done"][-1]["step"]
    planned = kinds["run_started"][-1]["steps"] if "run_started" in kinds else None
    of = f" of {count(planned)}" if planned else ""
    resumes = int(totals["run_started"]) - 1
    ended = "run_ended" in kinds and kinds["run_ended"][-1]["step"] >= last
    text = f"{'Finished' if ended else 'Not finished'}: {count(last)}{of} steps"
    return text + (f", resumed {resumes} time{'s' if resumes > 1 else ''}." if resumes > 0 else ".")


def _tiles(kinds: dict[str, list[Row]], totals: Mapping[str, float]) -> list[tuple[str, str, str]]:
    steps = kinds["step_done"]
    last = steps[-1]
    seconds, waited = totals["seconds"], totals["data_seconds"]
    tiles = [
        ("Examples trained", count(last["trained"]), f"{last['trained'] / max(seconds, 1e-9):,.0f} a second"),
        ("Examples scored", count(last.get("scored", 0)), "by the student, for selection"),
        ("Loss", _number(last["loss"]), f"at first {_number(steps[0]['loss'])}"),
        ("Time in steps", duration(seconds), f"{percent(waited / max(seconds, 1e-9))} of it waiting for data"),
    ]
    for row in kinds.get("selected", [])[-1:]:
        size, pairs = row["statistics"].get("effective_pool_size"), _pairs(kinds)
        note = f"effective size {count(size)}" + (f" of {count(pairs)} pairs" if pairs else " pairs")
        tiles.append(("Pool drawn so far", percent(row["statistics"].get("unique_coverage")), note))
    for task, metrics in list((kinds["evaluated"][-1]["metrics"] if "evaluated" in kinds else {}).items())[:_NAMES]:
        name, value = next(iter(metrics.items()), ("", None))
        if value is not None:
            tiles.append((task, percent(value), name))
    return tiles


def _training(steps: list[Row]) -> _Section:
    losses = {"loss": _points(steps, "loss")}
    parts = sorted({name for row in steps for name in row["parts"]})[:_NAMES]
    if len(parts) > 1:
        losses |= {name: _points(steps, "parts", name) for name in parts}
    examples = {"trained": _points(steps, "trained"), "scored": _points(steps, "scored")}
    if steps[-1].get("distilled"):
        examples["distilled, besides"] = _points(steps, "distilled")
    seconds = {"step": _points(steps, "seconds"), "of it waiting for data": _points(steps, "data_seconds")}
    charts = [
        (line_chart(losses, label="Loss over steps", x="steps", y="loss"), "Loss, and its terms before weighting."),
        (
            line_chart(examples, label="Examples scored and trained over steps", x="steps", y="examples"),
            "Examples trained on, and examples that the student scored for selection.",
        ),
        (
            line_chart(
                {"rate": _points(steps, "learning_rate")}, label="Learning rate over steps", x="steps", y="rate"
            ),
            "Learning rate in effect.",
        ),
        (line_chart(seconds, label="Seconds a step", x="steps", y="seconds"), "Wall time of a step."),
    ]
    return _Section("training", "Training", charts)


def _evaluation(rows: list[Row]) -> _Section | None:
    if not rows:
        return None
    lines: dict[str, dict[str, Points]] = {}
    for row in rows:
        for task, metrics in row["metrics"].items():
            for metric, value in metrics.items():
                if value is not None:
                    lines.setdefault(metric, {}).setdefault(task, []).append((row["trained"], value))
    charts = []
    for metric, tasks in sorted(lines.items())[:_NAMES]:
        shown = dict(list(tasks.items())[:_NAMES])
        label = f"{metric} over examples trained"
        chart = line_chart(shown, label=label, x="examples trained", y="%", as_percent=True)
        charts.append((chart, f"{metric} on held-out data."))
    last = rows[-1]["metrics"]
    table = [(task, metric, percent(value)) for task in last for metric, value in last[task].items()]
    return _Section("evaluation", "Held-out figures", charts, ["Task", "Metric", "Last"], table[:_LISTED])


def _selection(kinds: dict[str, list[Row]], config: DistillConfig | None) -> _Section | None:
    rows = kinds.get("selected", [])
    names = {name for row in rows for name in row["statistics"]}
    scored = [row for row in rows if row.get("scores") and all(None not in of for of in row["scores"].values())]
    charts = []
    if scored:
        charts.append((_scores(scored), _SCORES))
    shown: set[str] = set()
    for parts, label, words in _SHARES:
        if parts.keys() <= names:
            shown |= parts.keys()
            lines = {of: _points(rows, "statistics", name) for name, of in parts.items()}
            chart = line_chart(lines, label=label, x="steps", y="%", as_percent=True, dashed=["candidates"])
            charts.append((chart, words))
    if "effective_pool_size" in names:
        shown.add("effective_pool_size")
        charts.append(_effective_pool(kinds, config))
    for name in sorted(names - shown)[:_NAMES]:
        words = name.replace("_", " ")
        line = {words: _points(rows, "statistics", name)}
        charts.append((line_chart(line, label=f"{words} over steps", x="steps", y=words), words.capitalize() + "."))
    return _Section("selection", "Selection", charts) if charts else None


def _scores(rows: list[Row]) -> Markup:
    lines, bands = {}, {}
    for of in ("candidates", "picked"):
        lowest, low, middle, high, highest = (_points(rows, "scores", of, place) for place in range(5))
        lines[of] = middle
        bands[of] = [
            [(step, value, above) for (step, value), (_, above) in zip(under, over, strict=True)]
            for under, over in ((lowest, highest), (low, high))
        ]
    return line_chart(lines, label="Scores over steps", x="steps", y="score", bands=bands, from_zero=False)


def _effective_pool(kinds: dict[str, list[Row]], config: DistillConfig | None) -> tuple[Markup, str]:
    lines = {"effective pool size": _points(kinds["selected"], "statistics", "effective_pool_size")}
    words = "Effective pool size: the number of pairs that, drawn equally often, have the same entropy as these draws."
    pairs, steps = _pairs(kinds), kinds["step_done"]
    if pairs:
        places = [(step, bisect_left(steps, step, key=_step)) for step, _ in lines["effective pool size"]]
        draws = [(step, round(steps[place]["trained"])) for step, place in places if place < len(steps)]
        lines["uniform draws"] = [(step, even_pool_size(drawn, pairs)) for step, drawn in draws]
        words += " Dashed: the size for uniform draws, and the size below which the run warns."
        if config is not None and config.curation.collapse_level and draws and draws[-1][1] >= pairs:
            below = config.curation.collapse_level
            lines["warns below"] = [
                (step, below * even_pool_size(drawn, pairs)) for step, drawn in draws if drawn >= pairs
            ]
    # Only warnings of a collapse have this remedy.
    collapses = [row["step"] for row in kinds.get("warned", []) if row["remedy"] == COLLAPSE_REMEDY][:_NAMES]
    marks = dict.fromkeys(collapses, "") | dict.fromkeys(collapses[:1], "warned of collapse")
    label = "Effective pool size over steps"
    dashed = ["uniform draws", "warns below"]
    return line_chart(lines, label=label, x="steps", y="pairs", dashed=dashed, marks=marks), words


def _pairs(kinds: dict[str, list[Row]]) -> int | None:
    """Number of pairs that the run draws from; None if its log lacks it."""
    pairs: int | None = kinds["run_started"][-1].get("facts", {}).get("pairs") if "run_started" in kinds else None
    return pairs


def _warnings(kinds: dict[str, list[Row]]) -> list[tuple[str, str, str]]:
    told = [(row["step"], row["cause"], row["remedy"]) for row in kinds.get("warned", [])]
    skipped = []
    for row in kinds.get("step_skipped", []):
        pairs = f" (pairs {', '.join(row['keys'])})" if row.get("keys") else ""
        skipped.append((row["step"], f"step skipped: {row['reason']}{pairs}", ""))
    return [(count(step), cause, remedy) for step, cause, remedy in sorted(told + skipped)[:_LISTED]]


def _points(rows: Sequence[Row], *path: str | int) -> Points:
    """(step, value) of the rows that have a value at `path`, averaged in blocks to at most `_POINTS` points."""
    points = []
    for row in rows:
        value: Any = row
        for part in path:
            value = value.get(part) if isinstance(value, dict) else value[part]
        if value is not None:
            points.append((row["step"], value))
    block = max(1, -(-len(points) // _POINTS))
    groups = [points[start : start + block] for start in range(0, len(points), block)]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


def _step(row: Row) -> int:
    return int(row["step"])


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
