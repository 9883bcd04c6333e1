# SPDX-License-Identifier: Apache-2.0
"""Write the demo's page: one HTML file that fetches nothing and claims nothing beyond the figures it shows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from aced_sdk.reporting.page import duration, image_uri, line_chart, percent, write_page
from examples.quickstart.page.assets import PageAssets

LABELS = {
    "iid": "IID",
    "softmax_kd": "Softmax-KD",
    "i_acid": "I-ACID",
    "h_acid": "H-ACID",
    "aced": "ACED",
    "static": "Static filter",
    "trusted": "Trusted set alone",
}
_WORDS = {
    "iid": "no curation, no teacher",
    "softmax_kd": "no curation, learns from the teacher's matches too",
    "i_acid": "trains on what the reference finds easy",
    "h_acid": "trains on what the student finds hard and the reference easy",
    "aced": "H-ACID's choice and the teacher's matches together",
    "static": "fixed top share of the pool by the reference's score",
    "trusted": "only the clean pairs that the reference was made from",
}
_ASIDE = ("static", "trusted")
_COLOURS = {
    "IID": "#868e96",
    "Softmax-KD": "#5f3dc4",
    "I-ACID": "#e67700",
    "H-ACID": "#2b8a3e",
    "ACED": "#d9480f",
    "Static filter": "#1864ab",
    "Trusted set alone": "#adb5bd",
}


def render_page(summary: Mapping[str, Any], assets: PageAssets, path: Path) -> Path:
    """Write the page of one demo run.

    Args:
        summary: the content of summary.json: `methods` (each with zero_shot, retrieval, trained, scored and, over
            several seeds, zero_shot_deviation), `vlm` (accuracy, blind_accuracy), `onnx` (max_abs_diff,
            zero_shot_torch, zero_shot_onnx), `seconds`, `seed` or `seeds`, `versions`. Shares are in 0..1.
        assets: pictures, curves, tables.
        path: the HTML file.

    Returns:
        `path`.
    """
    methods = summary.get("methods", {})
    return write_page(
        path,
        "demo.html.j2",
        folders=[Path(__file__).parent],
        title="An efficient vision encoder, distilled with active data curation",
        tiles=_tiles(summary),
        facts=[*assets.facts, *_run_facts(summary)],
        charts=_charts(assets),
        noise_chart=_noise_chart(assets),
        methods=_method_rows(methods),
        several_seeds=any("zero_shot_deviation" in row for row in methods.values()),
        selection=assets.selection,
        selection_method=LABELS.get(assets.selection_method, assets.selection_method),
        zero_shot_examples=assets.zero_shot_examples,
        vlm=summary.get("vlm", {}),
        vlm_kinds=assets.vlm_kinds,
        vlm_samples=assets.vlm_samples,
        onnx=summary.get("onnx", {}),
        onnx_files=assets.onnx_files,
        licences=assets.licences,
        limits=assets.limits,
        seconds=[(name, duration(value)) for name, value in summary.get("seconds", {}).items()],
        versions=sorted(summary.get("versions", {}).items()),
        picture=image_uri,
    )


def _tiles(summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The main figures, each with what it stands against."""
    tiles = []
    methods, vlm, onnx = summary.get("methods", {}), summary.get("vlm", {}), summary.get("onnx", {})
    if "aced" in methods:
        others = [
            f"{LABELS[name]} {percent(methods[name]['zero_shot'])}" for name in ("iid", "softmax_kd") if name in methods
        ]
        tiles.append(("Zero-shot, ACED", percent(methods["aced"]["zero_shot"]), " · ".join(others)))
        if methods["aced"].get("retrieval") is not None:
            others = [
                f"{LABELS[name]} {percent(methods[name]['retrieval'])}"
                for name in ("iid", "softmax_kd")
                if name in methods
            ]
            tiles.append(("Retrieval, ACED", percent(methods["aced"]["retrieval"]), " · ".join(others)))
    if vlm.get("accuracy") is not None:
        tiles.append(
            ("Answers right", percent(vlm["accuracy"]), f"with shuffled pictures {percent(vlm['blind_accuracy'])}")
        )
    if onnx.get("zero_shot_onnx") is not None:
        tiles.append(
            ("Zero-shot through ONNX", percent(onnx["zero_shot_onnx"]), f"torch {percent(onnx['zero_shot_torch'])}")
        )
    return tiles


def _run_facts(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    facts = []
    seeds = summary.get("seeds", summary.get("seed"))
    if seeds is not None:
        many = isinstance(seeds, list | tuple)
        facts.append(("Seeds" if many else "Seed", ", ".join(map(str, seeds)) if many else str(seeds)))
    if seconds := summary.get("seconds"):
        facts.append(("Time, all stages", duration(seconds.get("total", sum(seconds.values())))))
    return facts


def _method_rows(methods: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    ordered = [name for name in LABELS if name in methods] + [name for name in methods if name not in LABELS]
    top = max((methods[name]["zero_shot"] for name in ordered), default=0.0) or 1.0
    return [
        {
            **methods[name],
            "label": LABELS.get(name, name),
            "words": _WORDS.get(name, ""),
            "width": 100 * methods[name]["zero_shot"] / top,
            "colour": _COLOURS.get(LABELS.get(name, ""), "#868e96"),
            "aside": name in _ASIDE,
            "strong": name == "aced",
        }
        for name in ordered
    ]


def _charts(assets: PageAssets) -> list[tuple[Markup, str]]:
    if not assets.curves:
        return []
    names = [name for name in LABELS if name in assets.curves]
    by_trained = {LABELS[name]: [(p["trained"], p["zero_shot"]) for p in assets.curves[name]] for name in names}
    by_compute = {LABELS[name]: [(p["compute"], p["zero_shot"]) for p in assets.curves[name]] for name in names}
    aside = [LABELS[name] for name in _ASIDE]
    return [
        (
            line_chart(
                by_trained,
                label="Zero-shot accuracy over examples trained",
                x="examples trained",
                y="zero-shot (%)",
                colours=_COLOURS,
                dashed=aside,
                as_percent=True,
            ),
            "At equal numbers of trained examples. Scoring is not counted here; the next chart counts it.",
        ),
        (
            line_chart(
                by_compute,
                label="Zero-shot accuracy over compute",
                x="forward passes of the student (training 3, scoring 1 an example)",
                y="zero-shot (%)",
                colours=_COLOURS,
                dashed=aside,
                as_percent=True,
            ),
            "The same runs against compute. The student's scoring of candidates is counted; reference and teacher "
            "are read from a cache.",
        ),
    ]


def _noise_chart(assets: PageAssets) -> Markup | None:
    if not assets.noise_curve:
        return None
    lines = {
        LABELS.get(name, name): [(step, among) for step, among, _ in points]
        for name, points in assets.noise_curve.items()
        if points
    }
    longest = max(assets.noise_curve.values(), key=len)
    lines["in the pool"] = [(step, pool) for step, _, pool in longest]
    return line_chart(
        lines,
        label="Share of shuffled captions among the examples trained on",
        x="steps",
        y="shuffled captions (%)",
        colours=_COLOURS | {"in the pool": "#868e96"},
        dashed=["in the pool"],
        as_percent=True,
    )
