# SPDX-License-Identifier: Apache-2.0
"""Tables and pictures of the ordering benchmark's figures.

    python -m benchmarks.ordering.evidence benchmarks/results/ordering-cpu.json docs/evidence

Writes `tables.md` and one SVG for the table, the learning curves and each sweep
of several values. Every figure is read from the JSON.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.ordering.rows import CURVES

NAMES = {
    "iid": "IID",
    "softmax_kd": "Softmax-KD",
    "sigmoid_kd": "Sigmoid-KD",
    "feature_kd": "Feature-KD",
    "interactive_kd": "ICL-KD",
    "i_acid": "I-ACID",
    "i_acid_kd": "I-ACID + KD",
    "h_acid_independent": "H-ACID, independent",
    "h_acid": "H-ACID, joint",
    "aced": "ACED (ACIDistill)",
    "aced_cheap": "ACED, scoring at half the side",
    "aced_iid_distill": "ACED (IIDistill)",
    "static": "static filter",
    "static_kd": "static filter + KD",
    "trusted": "trusted set alone",
}
METRICS = {
    "score": "score",
    "zero_shot": "seen concepts, new styles",
    "held_out_concepts": "unseen concepts",
    "retrieval": "unseen concepts, retrieval",
    "other_domain": "another domain",
}
SWEEPS = {
    "length": "steps",
    "trusted": "share of the trusted pairs that there are",
    "few_trusted_and_long": "steps, with a quarter of the trusted pairs",
    "noise": "share of shuffled captions",
    "f": "filter ratio f",
    "reference": "reference and teacher",
    "pool": "pairs in the pool",
    "gain": "gain",
    "chunks": "chunks n",
}
APART = ("length", "trusted", "few_trusted_and_long")  # shown by metric too
_OURS, _OTHERS, _FIXED = "#1f6f8b", "#9aa5ab", "#c9772d"


def main() -> None:
    """Read the JSON named first, write into the folder named second."""
    source, folder = Path(sys.argv[1]), Path(sys.argv[2])
    result = json.loads(source.read_text(encoding="utf-8"))
    folder.mkdir(parents=True, exist_ok=True)
    mpl.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "aced"})
    _rows(result, folder / "rows.svg")
    _curves(result, folder / "curves.svg")
    for name, sweep in result.get("sweeps", {}).items():
        if len(sweep) > 1:
            _sweep(name, sweep, folder / f"sweep-{name}.svg")
    (folder / "tables.md").write_text(tables(result), encoding="utf-8")


def tables(result: Mapping[str, Any]) -> str:
    """All tables as Markdown."""
    seeds, steps = result["seeds"], result["steps"]
    trained = f"{steps * result['sub_batch']:,}"
    parts = [
        "# Tables of the ordering benchmark",
        f"Written by `python -m benchmarks.ordering.evidence`. Per cent, mean ± standard deviation over {seeds} seeds; "
        "pool, noise, reference, weights and order are redrawn with the seed. Cost is in forward passes of the student "
        "per trained example, a backward pass counted as two.",
        f"## Equal trained examples ({trained})",
        _table(result["variants"]),
    ]
    if "equal_compute" in result:
        aced = {"aced": result["variants"]["aced"], "h_acid": result["variants"]["h_acid"]}
        parts += ["## Equal compute, scoring counted", _table({**result["equal_compute"], **aced})]
    if "claims" in result:
        parts += ["## What was claimed", _claims(result["claims"])]
    for name, sweep in result.get("sweeps", {}).items():
        parts.append(f"## {SWEEPS[name]} ({_seeds(sweep)} seeds)")
        parts += [_sweep_table(sweep, metric) for metric in (METRICS if name in APART else ("score",))]
    parts += ["## Settings, chosen on the validation split", _tuning(result["tuning"])]
    return "\n\n".join(parts) + "\n"


def _cell(value: Mapping[str, Any] | None) -> str:
    return "" if value is None else f"{value['mean']:.1f} ± {value['std']:.1f}"


def _table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    metrics = [metric for metric in METRICS if metric in next(iter(rows.values()))]
    lines = [
        "| row | " + " | ".join(METRICS[metric] for metric in metrics) + " | cost | shuffled among the trained |",
        "|---|" + "---|" * (len(metrics) + 2),
    ]
    for row, values in rows.items():
        bad = values["noisy_selected"]
        shown = [f"{values['cost']:.0f}F", "" if bad is None else f"{100 * bad:.0f} %"]
        lines.append("| " + " | ".join([NAMES[row], *(_cell(values[metric]) for metric in metrics), *shown]) + " |")
    return "\n".join(lines)


def _claims(claims: Mapping[str, Any]) -> str:
    lines = ["| claim | lead in points | seeds won | over two deviations |", "|---|---|---|---|"]
    others = {name: value for name, value in claims.items() if isinstance(value, dict) and "points" in value}
    leads = {**claims["order"], **others}
    for name, lead in leads.items():
        lines.append(
            f"| {_plain(name)} | {lead['points']:+.1f} | {lead['seeds_won']} | {_yes(lead['over_two_deviations'])} |"
        )
    quarter = claims["aced_at_a_quarter_of_the_steps"]
    lines += [
        "",
        f"ACED's score is {claims['aced_over_iid_ratio']:.1f} times IID's. After a quarter of the steps (learning rate "
        f"still high) ACED stands at {quarter['score']:.1f}, IID at the end at {quarter['iid_at_the_end']:.1f}.",
    ]
    return "\n".join(lines)


def _plain(name: str) -> str:
    """A name as words, without what Markdown or HTML reads as more."""
    return re.sub(r"<(?! )|[^\w.,:%()/=+< -]", " ", name.replace("_", " ")).strip()


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _seeds(sweep: Mapping[str, Mapping[str, Any]]) -> int:
    return len(next(iter(next(iter(sweep.values())).values()))["score"]["values"])


def _sweep_table(sweep: Mapping[str, Mapping[str, Any]], metric: str) -> str:
    rows = list(dict.fromkeys(row for values in sweep.values() for row in values))
    lines = [f"| {METRICS[metric]} | " + " | ".join(map(_plain, sweep)) + " |", "|---|" + "---|" * len(sweep)]
    for row in rows:
        cells = [_cell(values[row].get(metric)) if row in values else "" for values in sweep.values()]
        lines.append(f"| {NAMES[row]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _tuning(tuning: Mapping[str, Any]) -> str:
    lines = ["| row | tried (validation score) | chosen |", "|---|---|---|"]
    for row, told in tuning.items():
        tried = "; ".join(f"{_choice(one)}: {100 * one['score']:.1f}" for one in told["tried"])
        lines.append(f"| {NAMES[row]} | {tried} | {_choice(told['chosen'])} |")
    return "\n".join(lines)


def _choice(choice: Mapping[str, float]) -> str:
    return ", ".join(f"{_plain(name)} {value:g}" for name, value in choice.items() if name != "score")


def _rows(result: Mapping[str, Any], path: Path) -> None:
    variants = result["variants"]
    metrics = [metric for metric in METRICS if metric in variants["iid"]]
    order = sorted(variants, key=lambda row: variants[row]["score"]["mean"])
    figure, axes = plt.subplots(1, len(metrics), figsize=(2.4 * len(metrics) + 1.4, 4.2), sharey=True)
    for metric, axis in zip(metrics, axes, strict=True):
        for place, row in enumerate(order):
            value = variants[row][metric]
            axis.barh(place, value["mean"], color=_colour(row), height=0.7)
            axis.plot(value["values"], [place] * len(value["values"]), ".", color="black", markersize=3)
        axis.set_title(METRICS[metric], fontsize=9)
        axis.set_xlabel("per cent")
    axes[0].set_yticks(range(len(order)), [NAMES[row] for row in order])
    _save(figure, path)


def _curves(result: Mapping[str, Any], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(7.5, 3.6))
    for row in CURVES:
        curves = result["curves"][row]
        steps = [point["step"] for point in curves[0]]
        means = [100 * sum(c[place]["score"] for c in curves) / len(curves) for place in range(len(steps))]
        axis.plot(steps, means, _dash(row), marker="o", markersize=3, color=_colour(row), label=NAMES[row])
    axis.set_xlabel(f"steps of {result['sub_batch']} trained pairs")
    axis.set_ylabel("score, per cent")
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    _save(figure, path)


def _sweep(name: str, sweep: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(4.6, 3))
    values = list(sweep)
    for row in dict.fromkeys(row for rows in sweep.values() for row in rows):
        points = [(place, rows[row]["score"]) for place, rows in enumerate(sweep.values()) if row in rows]
        _line(axis, row, points)
    axis.set_xticks(range(len(values)), values)
    axis.set_xlabel(SWEEPS[name])
    axis.set_ylabel("score, per cent")
    axis.legend(frameon=False, fontsize=8)
    _save(figure, path)


def _line(axis: Axes, row: str, points: Sequence[tuple[int, Mapping[str, Any]]]) -> None:
    axis.errorbar(
        [place for place, _ in points],
        [value["mean"] for _, value in points],
        yerr=[value["std"] for _, value in points],
        marker="o",
        markersize=3,
        capsize=2,
        color=_colour(row),
        linestyle=_dash(row),
        label=NAMES[row],
    )


def _dash(row: str) -> str:
    return "--" if row.endswith("_kd") else "-"


def _colour(row: str) -> str:
    if "acid" in row or "aced" in row:
        return {"aced": "#0b3c49", "h_acid": _OURS, "i_acid": "#63a8bf", "i_acid_kd": "#3f8ca8"}.get(row, _OURS)
    return _FIXED if row in ("static", "static_kd", "trusted") else _OTHERS


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
