# SPDX-License-Identifier: Apache-2.0
"""The HTML report of one distillation run, from what the run's folder holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup

from aced_sdk.errors import DataError
from aced_sdk.reporting.jsonl import read_events
from aced_sdk.reporting.page import count, duration, line_chart, percent, write_page

_POINTS = 300
"""Points that a line of a chart has at most; more steps are averaged."""

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
    """Write `report.html` into a run's folder: curves, selection, what was scored and trained, held-out figures.

    A run that still goes on, or was interrupted, is reported as far as it came.

    Args:
        run_directory: a folder with `events.jsonl` and, if it is there, `config.yaml`.

    Returns:
        The page's path.

    Raises:
        DataError: if there is no event log, or nothing in it yet.
    """
    folder = Path(run_directory)
    kinds: dict[str, list[Row]] = {}
    for row in read_events(folder / "events.jsonl"):
        kinds.setdefault(row["event"], []).append(_slim(row))
    steps = kinds.get("step_done", [])
    if not steps:
        raise DataError(f"{folder} tells of no step yet", remedy="wait until the run has taken its first step")
    config = folder / "config.yaml"
    sections = [_training(steps), _evaluation(kinds.get("evaluated", [])), _selection(kinds.get("selected", []))]
    return write_page(
        folder / "report.html",
        "run.html.j2",
        title=f"Run {folder.resolve().name}",
        state=_state(kinds),
        tiles=_tiles(kinds),
        sections=[section for section in sections if section is not None],
        warnings=_warnings(kinds),
        config=config.read_text(encoding="utf-8") if config.exists() else "",
    )


def _slim(row: Row) -> Row:
    # Thousands of row numbers a step would fill the memory; the charts need the statistics alone.
    return {name: value for name, value in row.items() if name not in ("picked", "candidates")}


def _state(kinds: dict[str, list[Row]]) -> str:
    last = kinds["step_done"][-1]["step"]
    planned = kinds["run_started"][-1]["steps"] if "run_started" in kinds else None
    of = f" of {count(planned)}" if planned else ""
    resumes = len(kinds.get("run_started", ())) - 1
    ended = "run_ended" in kinds and kinds["run_ended"][-1]["step"] >= last
    text = f"{'Finished' if ended else 'Not finished'}: {count(last)}{of} steps"
    return text + (f", resumed {resumes} time{'s' if resumes > 1 else ''}." if resumes > 0 else ".")


def _tiles(kinds: dict[str, list[Row]]) -> list[tuple[str, str, str]]:
    steps = kinds["step_done"]
    last = steps[-1]
    seconds = sum(row["seconds"] for row in steps)
    waited = sum(row["data_seconds"] for row in steps)
    tiles = [
        ("Examples trained", count(last["trained"]), f"{last['trained'] / max(seconds, 1e-9):,.0f} a second"),
        ("Examples scored", count(last["scored"]), "by the student, for selection"),
        ("Loss", _number(last["loss"]), f"at first {_number(steps[0]['loss'])}"),
        ("Time in steps", duration(seconds), f"{percent(waited / max(seconds, 1e-9))} of it waiting for data"),
    ]
    for task, metrics in (kinds["evaluated"][-1]["metrics"] if "evaluated" in kinds else {}).items():
        name, value = next(iter(metrics.items()), ("", None))
        if value is not None:
            tiles.append((task, percent(value), name))
    return tiles


def _training(steps: list[Row]) -> _Section:
    losses = {"loss": _points(steps, "loss")}
    parts = sorted({name for row in steps for name in row["parts"]})
    if len(parts) > 1:
        losses |= {name: _points(steps, "parts", name) for name in parts}
    examples = {"trained": _points(steps, "trained"), "scored": _points(steps, "scored")}
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
                lines.setdefault(metric, {}).setdefault(task, []).append((row["trained"], value))
    charts = [
        (
            line_chart(tasks, label=f"{metric} over examples trained", x="examples trained", y="%", as_percent=True),
            f"{metric} on held-out data.",
        )
        for metric, tasks in sorted(lines.items())
    ]
    last = rows[-1]["metrics"]
    table = [(task, metric, percent(value)) for task in last for metric, value in last[task].items()]
    return _Section("evaluation", "Held-out figures", charts, ["Task", "Metric", "Last"], table)


def _selection(rows: list[Row]) -> _Section | None:
    names = sorted({name for row in rows for name in row["statistics"]})
    if not names:
        return None
    charts = []
    shares = {f"bad_share_{of}": of for of in ("selected", "candidates")}
    if set(shares) <= set(names):
        lines = {of: _points(rows, "statistics", name) for name, of in shares.items()}
        chart = line_chart(lines, label="Known wrong captions over steps", x="steps", y="%", as_percent=True)
        charts.append((chart, "Share of pairs marked as noisy, among the selected and among all candidates."))
    for name in names:
        if name not in shares:
            words = name.replace("_", " ")
            line = {words: _points(rows, "statistics", name)}
            charts.append((line_chart(line, label=f"{words} over steps", x="steps", y=words), words.capitalize() + "."))
    return _Section("selection", "Selection", charts)


def _warnings(kinds: dict[str, list[Row]]) -> list[tuple[str, str, str]]:
    told = [(row["step"], row["cause"], row["remedy"]) for row in kinds.get("warned", [])]
    skipped = [(row["step"], f"step skipped: {row['reason']}", "") for row in kinds.get("step_skipped", [])]
    return [(count(step), cause, remedy) for step, cause, remedy in sorted(told + skipped)]


def _points(rows: Sequence[Row], name: str, inner: str | None = None) -> Points:
    """(step, value) of each row that has a value, averaged in blocks so that a chart stays small."""
    points = []
    for row in rows:
        value = row[name] if inner is None else row[name].get(inner)
        if value is not None:
            points.append((row["step"], value))
    block = max(1, -(-len(points) // _POINTS))
    groups = [points[start : start + block] for start in range(0, len(points), block)]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
