# SPDX-License-Identifier: Apache-2.0
"""Progress bars, the event log, page blocks and the report of a run."""

from __future__ import annotations

import base64
import io
import json
import logging
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from aced_sdk import config
from aced_sdk.curation import COLLAPSE_REMEDY
from aced_sdk.engine.events import StepSkipped, Warned
from aced_sdk.errors import DataError
from aced_sdk.files import save_tensors, write_json
from aced_sdk.reporting import JsonlWriter, Progress, Stages, read_events
from aced_sdk.reporting.page import (
    count,
    duration,
    figure_svg,
    image_uri,
    line_chart,
    percent,
    thumbnail_uri,
    write_page,
)
from aced_sdk.reporting.run_bar import RunBar
from aced_sdk.reporting.run_report import report
from aced_sdk.training.events import Evaluated, RunEnded, RunStarted, Selected, StudentStep
from tests import tiny


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def step(number: int, **values: Any) -> StudentStep:
    """One step of a made-up run with b = 256, B = 1280."""
    return StudentStep(
        **{
            "step": number,
            "loss": 2.0 / number,
            "parts": {"contrastive": 1.0, "softmax": 0.5},
            "learning_rate": 1e-3,
            "gradient_norm": 0.5,
            "trained": 256 * number,
            "scored": 1280 * number,
            "seconds": 0.2,
            "data_seconds": 0.05,
        }
        | values
    )


# --- lines of a run ----------------------------------------------------------------------------------------------


def test_warnings_of_a_run_are_lines_on_standard_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def heard() -> str:
        with RunBar("distil r") as bar:
            bar(Warned(0, "3 of 9 pairs are unusable", "look at the shards"))
            for in_a_row in (1, 2):
                bar(StepSkipped(6 + in_a_row, "the loss was not finite", in_a_row))
        return capsys.readouterr().err

    monkeypatch.delenv("RANK", raising=False)
    assert heard() == (
        "distil r: warning: 3 of 9 pairs are unusable; look at the shards\n"
        "distil r: warning: step 7 was skipped: the loss was not finite\n"
    )
    monkeypatch.setenv("RANK", "1")
    assert heard() == ""


# --- progress ----------------------------------------------------------------------------------------------------


def test_a_bar_on_a_terminal_shows_title_count_and_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("COLUMNS", "160")
    stream = Terminal()
    with Progress("distil", 4, stream=stream) as bar:
        for _ in range(4):
            bar.advance(loss=0.25)
    shown = stream.getvalue()
    assert "distil" in shown
    assert "4/4 steps" in shown
    assert "loss 0.25" in shown
    assert bar.done == 4


@pytest.mark.parametrize("rank", ["1", "7"])
def test_other_ranks_show_nothing(rank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", rank)
    stream = Terminal()
    with Progress("distil", 4, stream=stream, plain=True) as bar:
        bar.advance(3)
    assert (stream.getvalue(), bar.done) == ("", 3)


def test_off_a_terminal_there_is_silence_unless_plain_lines_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    silent, plain = io.StringIO(), io.StringIO()
    with Progress("distil", 4, stream=silent) as bar:
        bar.advance(4)
    with Progress("distil", 4, stream=plain, plain=True) as bar:
        bar.advance(4)
    assert silent.getvalue() == ""
    assert re.fullmatch(r"distil: started\ndistil: done after [\d.]+ s, 4 steps\n", plain.getvalue())


def test_an_inner_bar_joins_the_display_of_the_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("COLUMNS", "160")
    stream = Terminal()
    with Stages(["data", "train"], stream=stream) as stages:
        with stages.stage("data", total=2, unit="shards") as bar:
            bar.advance(2)
        with stages.stage("train"), Progress("a verb's own bar", 5) as inner:  # would go to standard error by itself
            inner.advance(5)
    shown = stream.getvalue()
    for words in ("1/2 data", "2/2 train", "a verb's own bar", "2/2 stages"):
        assert words in shown


def test_a_stage_that_fails_is_not_counted_and_frees_the_display(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    stream = io.StringIO()
    stages = Stages(["data", "train"], plain=True, stream=stream)
    with pytest.raises(OSError, match="disk"), stages, stages.stage("data"):
        raise OSError("disk")
    assert "stopped after" in stream.getvalue()
    assert stages.done == 0
    with pytest.raises(ValueError, match="no stage 'evaluate'"):
        stages.stage("evaluate")


def test_progress_leaves_logging_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    before = (list(logging.root.handlers), logging.root.level)
    with Progress("distil", 1, stream=Terminal()) as bar:
        bar.advance()
    assert (list(logging.root.handlers), logging.root.level) == before


# --- the event log -----------------------------------------------------------------------------------------------


def test_events_come_back_in_order_and_a_bad_loss_becomes_null(tmp_path: Path) -> None:
    with JsonlWriter(tmp_path / "run" / "events.jsonl") as writer:
        writer(step(1))
        writer(step(2, loss=math.nan, parts={"contrastive": math.inf}))
        rows = list(read_events(writer.path))  # each line is there at once, without a close
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[1]["loss"] is None
    assert rows[1]["parts"] == {"contrastive": None}


@pytest.mark.parametrize("torn", [b'{"event": "step_done", "st', b"x" * 200_000])
def test_a_torn_last_line_is_dropped_and_written_over(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "events.jsonl"
    with JsonlWriter(path) as writer:
        writer(step(1))
    with path.open("ab") as stream:
        stream.write(torn)
    assert [row["step"] for row in read_events(path)] == [1]
    with JsonlWriter(path) as writer:
        writer(step(2))
    assert [row["step"] for row in read_events(path)] == [1, 2]


def test_a_resume_drops_what_it_will_tell_again(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with JsonlWriter(path) as writer:
        for number in range(1, 6):
            writer(step(number))
        writer.truncate_after(3)
        writer(step(4, loss=9.0))
    rows = list(read_events(path))
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[-1]["loss"] == 9.0


def test_a_broken_line_in_the_middle_is_told_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"event": "a", "step": 1}\nrubbish\n{"event": "a", "step": 2}\n', encoding="utf-8")
    with pytest.raises(DataError, match="line 2 of"):
        list(read_events(path))
    with pytest.raises(DataError, match="No such file"):
        list(read_events(tmp_path / "none.jsonl"))


# --- pages -------------------------------------------------------------------------------------------------------


def test_a_picture_survives_its_data_address(tmp_path: Path) -> None:
    picture = Image.new("RGBA", (5, 3), (10, 200, 30, 128))
    picture.save(tmp_path / "a.png")
    for source in (picture, tmp_path / "a.png"):
        head, _, body = image_uri(source).partition(",")
        back = Image.open(io.BytesIO(base64.b64decode(body)))
        assert head == "data:image/png;base64"
        assert (back.size, back.getpixel((0, 0))) == ((5, 3), (10, 200, 30, 128))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "CMYK", "I;16"])
def test_a_thumbnail_is_small_and_keeps_its_shape(mode: str) -> None:
    head, _, body = thumbnail_uri(Image.new(mode, (900, 600)), side=90).partition(",")
    back = Image.open(io.BytesIO(base64.b64decode(body)))
    assert (head, back.size, back.format) == ("data:image/webp;base64", (90, 60), "WEBP")
    assert len(body) < 4000


def test_a_thumbnail_stays_see_through() -> None:
    picture = Image.new("RGBA", (40, 40), (255, 0, 0, 0))
    back = Image.open(io.BytesIO(base64.b64decode(thumbnail_uri(picture).partition(",")[2])))
    assert back.convert("RGBA").getpixel((5, 5))[3] == 0  # type: ignore[index]
    assert picture.size == (40, 40)


def test_a_figure_becomes_svg_with_its_label_escaped() -> None:
    figure = Figure()
    figure.add_subplot().plot([1, 2], [3, 4])
    svg = figure_svg(figure, 'a "label" & more')
    assert svg.startswith('<svg role="img" aria-label="a &#34;label&#34; &amp; more"')
    assert svg.rstrip().endswith("</svg>")
    assert "<?xml" not in svg


def test_a_chart_draws_every_line_in_percent() -> None:
    chart = line_chart({"one": [(0, 0.1), (10, 0.4)], "two": [(0, 0.2)]}, label="l", x="steps", y="%", as_percent=True)
    text = re.sub(r"\s+", " ", chart)
    assert "<!-- one -->" in text
    assert "<!-- two -->" in text
    assert "<!-- 40 -->" in text  # an axis tick: 0.4 is shown as 40


def test_a_chart_shades_bands_and_marks_places() -> None:
    bare = {"one": [(0.0, 1.0), (10.0, 2.0)]}
    plain = line_chart(bare, label="l", x="x", y="y")
    full = line_chart(bare, label="l", x="x", y="y", bands={"one": [[(0, 0.5, 1.5), (10, 1, 3)]]}, marks={5: "here"})
    assert "<!-- here -->" in full
    assert "fill-opacity: 0.16" in full
    assert "<!-- here -->" not in plain
    assert "fill-opacity" not in plain


def test_pages_escape_what_they_are_given(tmp_path: Path) -> None:
    (tmp_path / "t.html.j2").write_text("{{ title }} {{ 0.25 | percent }}", encoding="utf-8")
    page = write_page(tmp_path / "out.html", "t.html.j2", folders=[tmp_path], title="<script>")
    assert page.read_text(encoding="utf-8") == "&lt;script&gt; 25.0 %"


def test_numbers_as_people_say_them() -> None:
    assert [percent(0.1234), percent(None), count(None)] == ["12.3 %", "–", "–"]
    assert count(1234567) == "1\N{NARROW NO-BREAK SPACE}234\N{NARROW NO-BREAK SPACE}567"
    assert [duration(s) for s in (8.24, 185, 7800, None)] == ["8.2 s", "3 min 05 s", "2 h 10 min", "–"]


# --- the report of a run -----------------------------------------------------------------------------------------


def test_a_run_is_reported_from_its_events(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 7  # <odd>\n", encoding="utf-8")
    with JsonlWriter(tmp_path / "events.jsonl") as writer:
        writer(RunStarted(0, steps=700, config_hash="abc"))
        for number in range(1, 701):
            writer(step(number, loss=math.nan if number == 5 else 1.0 / number))
            if number % 100 == 0:
                shares = {"unique_coverage": number / 1000, "noisy_selected": 0.3, "noisy_candidates": 0.5}
                writer(Selected(number, picked=(1,), candidates=(1, 2), statistics=shares))
                metrics = {"unseen_style": {"top1": number / 7000}}
                writer(Evaluated(number, metrics=metrics, trained=256 * number, scored=0))
        writer(Warned(9, cause="few shards", remedy="write more"))
        writer(StepSkipped(5, reason="loss is not finite", in_a_row=1))
        writer(RunEnded(700, seconds=140.0, trained=179200, scored=896000))
    text = report(tmp_path).read_text(encoding="utf-8")
    for words in (
        "Finished: 700 of 700 steps.",
        "few shards",
        "step skipped: loss is not finite",
        "unseen_style",
        "10.0 %",
    ):
        assert words in text
    assert "among the selected pairs and among all candidates" in text
    for anchor in ("training", "evaluation", "selection", "warnings", "config"):
        assert f'<section id="{anchor}">' in text
    assert "seed: 7  # &lt;odd&gt;" in text
    assert "179\N{NARROW NO-BREAK SPACE}200" in text
    assert "25.0 % of it waiting for data" in text


def test_an_unfinished_run_is_reported_as_far_as_it_came(tmp_path: Path) -> None:
    with JsonlWriter(tmp_path / "events.jsonl") as writer:
        for started in (0, 2):
            writer(RunStarted(started, steps=9, config_hash="abc"))
            writer(step(started + 1, parts={"contrastive": 1.0}))
    text = report(tmp_path).read_text(encoding="utf-8")
    assert "Not finished: 3 of 9 steps, resumed 1 time." in text
    assert 'id="evaluation"' not in text


def test_a_run_without_steps_has_no_report(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text(json.dumps({"event": "run_started", "step": 0, "steps": 9}) + "\n")
    with pytest.raises(DataError, match="no step yet"):
        report(tmp_path)


def test_scores_coverage_and_a_collapse_are_drawn(tmp_path: Path) -> None:
    with JsonlWriter(tmp_path / "events.jsonl") as writer:
        writer(RunStarted(0, steps=20, config_hash="abc", facts={"pairs": 500}))
        for number in range(1, 21):
            shares = {"unique_coverage": 0.1, "top_decile_fraction": 0.9, "effective_pool_size": 40.0, "odd": 1.0}
            # A log of an older version, then a newer one.
            scores = {} if number < 5 else {"candidates": (-5, -4, -3, -2, -1), "picked": (-2.0, -1.5, -1, -0.5, 0)}
            writer(Selected(number, (1,), (1, 2), shares, scores))
            writer(step(number))
        writer(Warned(7, cause="the draws have collapsed", remedy=COLLAPSE_REMEDY))
    text = report(tmp_path).read_text(encoding="utf-8")
    assert "Pair scores before the first pick" in text
    assert 'aria-label="Scores over steps"' in text
    assert text.count("fill-opacity: 0.16") == 4  # two bands each around the candidates' and the picked's median
    assert "<!-- warned of collapse -->" in text
    assert "<!-- uniform draws -->" in text
    assert "<!-- drawn at least once -->" in text
    assert "<figcaption>Odd.</figcaption>" in text
    assert "effective size 40 of 500 pairs" in text
    assert "The gallery is left out: cannot read" in text


def test_a_log_without_scores_has_no_chart_of_them(tmp_path: Path) -> None:
    rows = [step(1).to_dict(), Selected(1, (1,), (1, 2), {"unique_coverage": 0.1}).to_dict()]
    rows[1].pop("scores")
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    text = report(tmp_path).read_text(encoding="utf-8")
    assert "Scores" not in text.replace("Examples scored", "")
    assert "Unique coverage." in text


def test_warnings_stand_first_and_many_are_folded(tmp_path: Path) -> None:
    with JsonlWriter(tmp_path / "events.jsonl") as writer:
        writer(step(20))
        for number in range(1, 12):
            writer(StepSkipped(number, reason="the loss was not finite", in_a_row=1, keys=("a/<1>", "a/2")))
    text = report(tmp_path).read_text(encoding="utf-8")
    assert text.index('id="warnings"') < text.index('id="training"')
    assert "<summary>3 more</summary>" in text
    assert text.count("the loss was not finite (pairs a/&lt;1&gt;, a/2)") == 11


# --- the gallery -------------------------------------------------------------------------------------------------


def curated_run(folder: Path, counts: list[int] | None, rows: bool = True, **changes: Any) -> Path:
    """A run's folder over a pool of 40 pairs whose row 3 is broken and whose row 5 has an odd caption."""
    broken = {3: tiny.pair(3) | {"png": b"rubbish"}, 5: tiny.pair(5) | {"txt": b"<b>" + b"long " * 40}}
    pool = tiny.write_pool(folder / "pool", 40, broken=broken)
    run = folder / "run"
    tiny.distillation(run, pool, folder / "reference", **changes).to_yaml(run / "config.yaml")
    with JsonlWriter(run / "events.jsonl") as writer:
        writer(RunStarted(0, steps=2, config_hash="abc", facts={"pairs": 40}))
        for number in (1, 2):
            candidates = tuple(range(16 if rows else 5000))  # an event of so many is logged without rows
            writer(Selected(number, tuple(range(number, number + 8)), candidates, {"unique_coverage": 0.5}))
            writer(step(number))
    if counts is not None:
        for number, older in ((1, [99] * 40), (2, counts)):
            checkpoint = run / "checkpoints" / f"step-{number:08d}"
            checkpoint.mkdir(parents=True)
            save_tensors(checkpoint / "loop.safetensors", {"counts": torch.tensor(older, dtype=torch.int32)})
            write_json(checkpoint / "state.json", {"step": number})
    return run


def groups(page: Path) -> dict[str, list[str]]:
    """Captions (with their notes) by title of the gallery."""
    parts = page.read_text(encoding="utf-8").split("<h3>")[1:]
    found = {}
    for part in parts:
        thumbs = re.findall(r'<div class="thumb.*?src="data:image/webp[^>]*>(.*?)</div>', part, flags=re.DOTALL)
        found[part.split("</h3>")[0]] = [re.sub(r"<em>(.*)</em>", r": \1", thumb) for thumb in thumbs]
    return found


def test_the_gallery_shows_drawn_and_undrawn_picked_and_rejected(tmp_path: Path) -> None:
    run = curated_run(tmp_path, [0, 0, 0, 30, 7, 9, *[1] * 34])
    page = report(run)
    shown = groups(page)
    assert list(shown) == ["Most drawn", "Never drawn", "Picked in step 2", "Rejected in step 2"]
    odd = "&lt;b&gt;" + ("long " * 40)[:86] + "…"
    assert shown["Most drawn"][:3] == [
        f"{odd}: drawn 9 ×",
        f"{tiny.caption(4)}: drawn 7 ×",
        f"{tiny.caption(6)}: drawn 1 ×",
    ]
    assert len(shown["Most drawn"]) == 12
    assert sorted(shown["Never drawn"]) == sorted(tiny.caption(row) for row in (0, 1, 2))
    assert shown["Picked in step 2"] == [odd if row == 5 else tiny.caption(row) for row in (2, 4, 5, 6, 7, 8, 9)]
    assert sorted(shown["Rejected in step 2"]) == sorted(tiny.caption(row) for row in (0, 1, *range(10, 16)))
    text = page.read_text(encoding="utf-8")
    assert "Some of 3 among 40 pairs." in text
    assert text.count('class="thumb noisy"') == 3 + 1 + 2 + 2  # every fourth pair: 4 8 12 (drawn), 0, 4 8, 0 12
    assert "The gallery is left out" not in text


def test_a_gallery_shows_what_it_can(tmp_path: Path) -> None:
    early = report(curated_run(tmp_path / "early", None))
    assert list(groups(early)) == ["Picked in step 2", "Rejected in step 2"]
    assert "Not shown: how often pairs were drawn, before the first checkpoint." in early.read_text(encoding="utf-8")
    large = report(curated_run(tmp_path / "large", [1] * 40, rows=False))
    assert list(groups(large)) == ["Most drawn"]
    assert "no rows of super-batches this large" in large.read_text(encoding="utf-8")
    static = config.StaticFilter(sub_batch=8)
    kept = report(curated_run(tmp_path / "static", [0] * 30 + [1] * 10, rows=False, curation=static))
    assert list(groups(kept)) == ["Most drawn", "Never drawn"]
    assert "Not shown" not in kept.read_text(encoding="utf-8")


def test_a_gallery_is_left_out_with_a_sentence(tmp_path: Path) -> None:
    run = curated_run(tmp_path, [1] * 40)
    (tmp_path / "pool" / "0001.tar").unlink()
    assert "left out: the shards hold 20 pairs now, and the run drew from 40." in report(run).read_text(
        encoding="utf-8"
    )
    (run / "checkpoints" / "step-00000002" / "loop.safetensors").write_bytes(b"torn")
    assert "The gallery is left out: " in report(run).read_text(encoding="utf-8")
    (tmp_path / "pool" / "0000.tar").unlink()
    assert "holds no tars." in report(run).read_text(encoding="utf-8")
    assert groups(run / "report.html") == {}


def test_an_uncurated_run_has_no_gallery(tmp_path: Path) -> None:
    iid = curated_run(tmp_path, [1] * 40, curation=config.Iid(sub_batch=8))
    assert 'id="gallery"' not in report(iid).read_text(encoding="utf-8")
