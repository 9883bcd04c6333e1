# SPDX-License-Identifier: Apache-2.0
"""The ordering benchmark's own arithmetic: what rows are, what they cost, how figures are put together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from benchmarks.ordering.protocol import claims, compute_jobs, main_jobs, summary, sweep_jobs
from benchmarks.ordering.rows import CHOICES, ROWS, Job, Knobs, figures, method
from benchmarks.ordering.world import WorldConfig, share_in_order

WORLD = WorldConfig(seed=0)
CHOSEN = {row: Knobs.of(choices[0]) for row, choices in CHOICES.items()}


@pytest.mark.parametrize("row", ROWS)
def test_every_row_has_three_settings_that_make_different_runs(row: str) -> None:
    jobs = [Job(row, WORLD, 10, "validation", Knobs.of(choice)) for choice in CHOICES[row]]
    assert len(jobs) == 3
    assert len({job.result for job in jobs}) == 3
    if "learning_rate" in CHOICES[row][0]:
        return  # the same method at three rates
    assert len({str(method(row, job.knobs)) for job in jobs}) == 3


def test_rows_differ_in_curation_or_objective_alone() -> None:
    kinds = {row: method(row, Knobs()) for row in ROWS if row != "trusted"}
    assert len({str(kind) for kind in kinds.values()}) == len(kinds)
    assert kinds["aced"][0] == kinds["h_acid"][0]
    assert kinds["aced"][1] == kinds["softmax_kd"][1]


def test_costs_count_scoring_and_the_second_batch() -> None:
    costs = {row: Job(row, WORLD, 10).cost() for row in ROWS}
    assert costs["iid"] == costs["static_kd"] == costs["i_acid_kd"] == costs["trusted"] == 3
    assert costs["h_acid"] == costs["aced"] == costs["h_acid_independent"] == 8
    assert costs["aced_iid_distill"] == 11
    assert Job("aced", WORLD, 10, knobs=Knobs(f=0.9)).cost() == 13
    assert 3 < Job("aced_cheap", WORLD, 10).cost() < 5


def test_equal_compute_is_equal() -> None:
    jobs = compute_jobs(CHOSEN, 600, [WORLD])
    costs = {row: runs[0].steps * runs[0].cost() for row, runs in jobs.items()}
    assert costs == pytest.approx(dict.fromkeys(jobs, 600 * 8.0), rel=1e-3)


def test_every_world_gets_every_row_and_sweeps_share_runs_with_the_table() -> None:
    worlds = [replace(WORLD, seed=seed) for seed in range(3)]
    jobs = main_jobs(CHOSEN, 600, worlds)
    assert {len(runs) for runs in jobs.values()} == {3}
    assert len({job.result for runs in jobs.values() for job in runs}) == 3 * len(ROWS)
    sweeps = sweep_jobs(CHOSEN, 600, worlds[:2])
    assert sweeps["f"]["0.8"]["aced"] == sweeps["length"]["600"]["aced"] == jobs["aced"][:2]
    assert sweeps["noise"]["0.3"]["aced"][0].world.noise == 0.3
    assert sweeps["reference"]["small"]["aced"][0].result != jobs["aced"][0].result


def result(score: float, **more: Any) -> dict[str, Any]:
    values = {"trained": 10, "scored": 50, "seconds": 1.0, "noisy_selected": None, "unique_coverage": None}
    return {"figures": {"score": score}} | values | more


def test_a_summary_is_mean_and_sample_deviation_in_per_cent() -> None:
    told = summary([result(0.1, noisy_selected=0.2), result(0.3, noisy_selected=0.4)])
    assert told["score"]["mean"] == pytest.approx(20)
    assert told["score"]["std"] == pytest.approx(200**0.5)
    assert told["noisy_selected"] == pytest.approx(0.3)
    assert told["unique_coverage"] is None


def test_claims_are_not_granted_for_small_leads() -> None:
    def row(*scores: float) -> dict[str, Any]:
        return summary([result(score / 100) for score in scores])

    variants = {name: row(5.0, 6.0, 7.0) for name in ROWS}
    variants["aced"] = row(18.0, 19.0, 20.0)
    variants["h_acid"] = row(5.5, 6.5, 7.5)
    curves = {"aced": [[{"step": 1, "score": 0.07}, {"step": 4, "score": 0.2}]] * 3}
    told = claims(variants, curves)
    assert told["aced_over_iid_ratio"] == pytest.approx(19 / 6)
    assert told["aced_over_softmax_kd"]["over_two_deviations"]
    close = told["order"]["i_acid < h_acid"]
    assert close["points"] == pytest.approx(0.5)
    assert close["seeds_won"] == 3
    assert not close["over_two_deviations"]
    assert told["aced_at_a_quarter_of_the_steps"]["score"] == pytest.approx(7)


def test_figures_are_means_of_their_tasks_and_do_without_stamps() -> None:
    metrics = {
        "unseen_style_twemoji": {"acc1": 0.0, "acc5": 0.2},
        "unseen_style_openmoji": {"acc1": 0.0, "acc5": 0.1},
        "unseen_concept": {"acc1": 0.0, "acc5": 0.3},
        "retrieval_unseen_concept": {"merged_image_to_text_r5": 0.4, "merged_text_to_image_r5": 0.2},
    }
    told = figures(metrics)
    assert told["zero_shot"] == pytest.approx(0.15)
    assert told["retrieval"] == pytest.approx(0.3)
    assert told["score"] == pytest.approx((0.15 + 0.3 + 0.3) / 3)
    stamps = {"tux_paint_photos": {"acc5": 0.1}, "tux_paint_drawings": {"acc5": 0.3}}
    assert figures(metrics | stamps)["other_domain"] == pytest.approx(0.2)


def test_auc_is_the_share_of_pairs_in_the_right_order() -> None:
    rng = np.random.default_rng(0)
    scores, bad = rng.normal(size=60), rng.random(60) < 0.4
    pairs = [(good > wrong) for good in scores[~bad] for wrong in scores[bad]]
    assert share_in_order(scores, bad) == pytest.approx(np.mean(pairs))
    assert share_in_order(scores, np.zeros(60, bool)) is None  # a world without noise has nothing to tell apart
