# SPDX-License-Identifier: Apache-2.0
"""The demo's page and a run's report, opened in a real browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from aced_sdk.reporting import JsonlWriter
from aced_sdk.reporting.run_report import report
from aced_sdk.training.events import RunEnded, RunStarted, StudentStep
from examples.quickstart.page import (
    KindAccuracy,
    LicenceRow,
    OnnxFile,
    PageAssets,
    SelectionMoment,
    Thumb,
    VlmSample,
    ZeroShotExample,
    render_page,
)

SECTIONS = {"done", "methods", "curves", "selection", "zero-shot", "vlm", "onnx", "licences", "limits"}
SCORES = {"iid": 0.04, "softmax_kd": 0.05, "i_acid": 0.11, "h_acid": 0.12, "aced": 0.15, "static": 0.1, "trusted": 0.2}


def picture(number: int) -> Image.Image:
    image = Image.new("RGBA", (96, 96), (0, 0, 0, 0))
    draw = ImageDraw.Draw(image)
    colour = ((number * 67) % 256, (number * 129) % 256, (number * 31) % 256)
    if number % 2:
        draw.ellipse((8, 8, 88, 88), fill=colour)
    else:
        draw.rounded_rectangle((10, 18, 86, 78), 14, fill=colour)
    return image


def thumbs(first: int, noisy_every: int) -> list[Thumb]:
    return [
        Thumb(picture(n), f"caption <{n}>", f"true caption {n}", noisy=n % noisy_every == 0)
        for n in range(first, first + 12)
    ]


def made_up_summary() -> dict[str, Any]:
    methods = {
        name: {
            "zero_shot": score,
            "retrieval": 0.8 * score,
            "trained": 76_800,
            "scored": 384_000 if "aci" in name else 0,
        }
        for name, score in SCORES.items()
    }
    methods["aced"]["zero_shot_deviation"] = 0.004
    return {
        "methods": methods,
        "vlm": {"accuracy": 0.61, "blind_accuracy": 0.42, "samples": []},
        "onnx": {"max_abs_diff": 3.1e-7, "zero_shot_torch": 0.15, "zero_shot_onnx": 0.15},
        "seconds": {"box": 130.0, "distil": 300.5, "total": 700.0},
        "seeds": [0, 1, 2],
        "versions": {"torch": "1.2.3", "aced-sdk": "0.1.0"},
    }


def made_up_assets() -> PageAssets:
    growth = [0.1, 0.4, 0.65, 0.8, 0.92, 1.0]
    curves: dict[str, Any] = {
        name: [
            {"trained": 12_800 * n, "scored": 64_000 * n, "compute": 38_400.0 * n, "zero_shot": score * growth[n - 1]}
            for n in range(1, 7)
        ]
        for name, score in SCORES.items()
    }
    classes = [("grinning face", 0.31), ("cat face", 0.27), ("a rather long name of a class that has to wrap", 0.2)]
    return PageAssets(
        facts=[("Pool", "13,500 pairs"), ("Shuffled captions", "50 %"), ("Machine", "2 cores")],
        curves=curves,
        selection=[SelectionMoment(step, thumbs(step, 5), thumbs(step + 1, 2), 0.3, 0.6) for step in (10, 150, 300)],
        noise_curve={
            name: [(30 * n, 0.5 - 0.015 * n, 0.5) for n in range(11)] for name in ("i_acid", "h_acid", "aced")
        },
        zero_shot_examples=[ZeroShotExample(picture(n), classes[n % 2][0], classes) for n in range(6)],
        vlm_kinds=[KindAccuracy("name", 200, 0.55, 0.3), KindAccuracy("yes or no", 200, 0.67, 0.5)],
        vlm_samples=[
            VlmSample(picture(1), "", "a red balloon", "balloon", None),
            VlmSample(picture(2), "What is this?", "a <cat>", "cat face", True),
            VlmSample(picture(3), "Is this a fruit?", "yes", "no", False),
        ],
        onnx_files=[
            OnnxFile("vision", "fp32", 1.6, 0.7, 1.9, 0.999999, 0.15),
            OnnxFile("text", "int8", 1.3, 0.2, None, 0.998),
        ],
        licences=[LicenceRow("noto", "1.2.3", "Apache-2.0", 3200)],
        limits=["A pictogram world: nothing here supports a claim about photographs."],
    )


def browser() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    pytest.skip("no Chromium on PATH: install chromium to run this test")


def opened(page: Path, profile: Path, width: int = 1280) -> tuple[str, str]:
    """The page's document after loading, and what the browser logged of it."""
    done = subprocess.run(
        [
            browser(),
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
            *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
            "--host-resolver-rules=MAP * ~NOTFOUND",  # the browser's own habits shall not reach the network either
            f"--user-data-dir={profile}",
            f"--window-size={width},2000",
            "--enable-logging=stderr",
            "--v=0",
            f"--log-net-log={profile / 'net.json'}",
            "--virtual-time-budget=3000",
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    console = "\n".join(line for line in done.stderr.splitlines() if ":CONSOLE" in line)
    return done.stdout, console


def addresses(profile: Path) -> set[str]:
    """Every http(s) address that the page asked for; what the browser asks for itself has no origin."""
    log = (profile / "net.json").read_text(encoding="utf-8", errors="replace")
    asked = re.findall(r'"initiator":"([^"]+)".*"url":"(https?://[^"]+)"', log)
    return {address for origin, address in asked if origin != "not an origin"}


def test_the_demo_page_opens_whole_and_asks_nothing_of_the_network(tmp_path: Path) -> None:
    page = render_page(made_up_summary(), made_up_assets(), tmp_path / "report.html")
    document, console = opened(page, tmp_path / "profile")
    assert set(re.findall(r'<section id="([\w-]+)"', document)) == SECTIONS
    assert set(re.findall(r'<a href="#([\w-]+)"', document)) == SECTIONS
    assert console == ""
    assert addresses(tmp_path / "profile") == set()
    assert document.count("<svg") == 3
    for words in (
        "15.0 %",
        "± 0.4",
        "really: true caption 10",
        "✗ wrong",
        "a &lt;cat&gt;",
        "61.0 %",
        "42.0 %",
        "3.1e-07",
    ):
        assert words in document
    assert "caption <10>" not in document


def test_the_browser_test_would_see_a_request(tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text('<img src="http://127.0.0.1:9/a.png"><script>console.error("oh")</script>', encoding="utf-8")
    _, console = opened(page, tmp_path / "profile")
    assert "oh" in console
    assert addresses(tmp_path / "profile") == {"http://127.0.0.1:9/a.png"}


def test_parts_that_are_missing_are_left_out(tmp_path: Path) -> None:
    summary = {"methods": {"iid": {"zero_shot": 0.0, "retrieval": None, "trained": 1, "scored": 0}}}
    text = render_page(summary, PageAssets(), tmp_path / "report.html").read_text(encoding="utf-8")
    assert set(re.findall(r'<section id="([\w-]+)"', text)) == {"done", "methods"}
    assert set(re.findall(r'<a href="#([\w-]+)"', text)) == {"done", "methods"}
    empty = render_page({}, PageAssets(), tmp_path / "empty.html").read_text(encoding="utf-8")
    assert set(re.findall(r'<section id="([\w-]+)"', empty)) == {"done"}


@pytest.mark.parametrize("width", [1280, 420])
def test_nothing_is_wider_than_the_window(width: int, tmp_path: Path) -> None:
    page = render_page(made_up_summary(), made_up_assets(), tmp_path / "report.html")
    # A frame gives the page exactly this width; a browser window cannot be made so narrow.
    probe = tmp_path / "probe.html"
    text = page.read_text(encoding="utf-8").replace(
        "default-src 'none';", "default-src 'none'; script-src 'unsafe-inline';"
    )
    page.write_text(
        text.replace(
            "</body>", "<script>parent.postMessage(document.documentElement.scrollWidth, '*')</script></body>"
        ),
        encoding="utf-8",
    )
    probe.write_text(
        f'<iframe src="report.html" style="width:{width}px;height:900px;border:0"></iframe><p id="w"></p>'
        '<script>onmessage = (event) => { document.getElementById("w").textContent = event.data }</script>',
        encoding="utf-8",
    )
    document, _ = opened(probe, tmp_path / "profile", width=1500)
    measured = re.search(r'<p id="w">(\d+)</p>', document)
    assert measured is not None
    assert int(measured[1]) <= width


def test_a_run_report_opens_in_a_browser(tmp_path: Path) -> None:
    with JsonlWriter(tmp_path / "events.jsonl") as writer:
        writer(RunStarted(0, steps=20, config_hash="abc"))
        for n in range(1, 21):
            writer(StudentStep(n, 1 / n, {"contrastive": 1.0}, 1e-3, 0.5, 256 * n, 0.2, 0.01, 1280 * n))
        writer(RunEnded(20, seconds=4.0, trained=5120, scored=25600))
    document, console = opened(report(tmp_path), tmp_path / "profile")
    assert "Finished: 20 of 20 steps." in document
    assert document.count("<svg") == 4
    assert console == ""
    assert addresses(tmp_path / "profile") == set()
