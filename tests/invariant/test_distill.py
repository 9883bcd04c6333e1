# SPDX-License-Identifier: Apache-2.0
"""Equal configs make equal students: broken off and resumed, on either engine, and as plain torch would make them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from tiny import ARCHITECTURE, distillation, encoder, write_pool
from torch import Tensor

import aced_sdk as aced
from aced_sdk import towers
from aced_sdk.config import DistillConfig
from aced_sdk.data import FullOrder, Pool, SuperBatch
from aced_sdk.engine.events import CheckpointSaved, Event, StepDone
from aced_sdk.errors import ConfigError, UnsupportedError
from aced_sdk.training.events import RunEnded, Selected
from aced_sdk.training.parts import Trainee
from aced_sdk.training.scoring import cheap_places, score

DROPPED = ARCHITECTURE | {"vision_cfg": ARCHITECTURE["vision_cfg"] | {"patch_dropout": 0.5}}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pool of 80 pairs, two of them unusable, and a reference."""
    root = tmp_path_factory.mktemp("world")
    broken = {11: {"png": b"?", "txt": b"x"}, 50: {"txt": b"y"}}
    write_pool(root / "pool", pairs=80, broken=broken)
    towers.save(encoder(1, embed_dim=24), root / "reference")
    return root


def config(world: Path, directory: Path, **changes: Any) -> DistillConfig:
    made = distillation(directory, world / "pool", world / "reference")
    data = made.data.replace(max_unusable_fraction=0.1)
    reference = made.reference and made.reference.replace(cache=world / "cache")
    return made.replace(**({"data": data, "reference": reference} | changes))


def engine(kind: str = "single", **changes: Any) -> aced.Engine:
    return aced.Engine(**({"kind": kind, "device": "cpu", "checkpoint_every": 2, "threads": 1} | changes))


def weights(run: aced.Run | aced.DualEncoder) -> dict[str, Tensor]:
    student = run.student if isinstance(run, aced.Run) else run
    return {name: tensor.detach().clone() for name, tensor in student.model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor], atol: float = 0.0) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, atol=atol, rtol=0, msg=lambda text, n=name: f"{n}: {text}")


def without_key_biases(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Softmax cancels the keys' biases: their gradients are rounding noise, which Adam blows up to whole steps."""
    return {
        name: torch.cat([t.chunk(3)[0], t.chunk(3)[2]]) if name.endswith("in_proj_bias") else t
        for name, t in found.items()
    }


def told(directory: Path) -> list[dict[str, Any]]:
    """The event log, without what a clock or a disk decides, the marks of a start, and what was met reading ahead."""
    rows = [json.loads(line) for line in (directory / "events.jsonl").read_text().splitlines()]
    own = ("run_started", "warned", "checkpoint_saved")  # a checkpoint is written while steps are taken
    clocks = ("seconds", "data_seconds", "directory")
    return [{k: v for k, v in row.items() if k not in clocks} for row in rows if row["event"] not in own]


def break_off_at(step: int) -> Any:
    def callback(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == step:
            raise KeyboardInterrupt

    return callback


@pytest.mark.parametrize(
    ("kind", "step"),
    [
        *(("aced", step) for step in (1, 3, 6)),
        *((kind, 3) for kind in ("iid", "independent", "static", "dropout", "bf16", "deepspeed", "zero-2")),
        *((kind, 3) for kind in ("micro", "micro-dropout", "second batch", "cheap scoring")),
    ],
)
def test_broken_off_and_resumed_is_as_never_broken_off(world: Path, tmp_path: Path, kind: str, step: int) -> None:
    changes: dict[str, dict[str, Any]] = {
        "aced": {},
        "iid": {"curation": aced.Iid(sub_batch=8), "objective": aced.Objective(), "reference": None},
        "independent": {"curation": aced.Independent(sub_batch=8, super_batch=24)},
        "static": {"curation": aced.StaticFilter(sub_batch=8, keep_fraction=0.5)},
        "dropout": {"student": aced.Student(architecture=DROPPED)},
        "bf16": {"engine": engine(precision="bf16")},
        "deepspeed": {"engine": engine("deepspeed")},
        "zero-2": {"engine": engine("deepspeed", zero_stage=2)},
        "micro": {"engine": engine(micro_batch=2)},
        "micro-dropout": {"engine": engine(micro_batch=2), "student": aced.Student(architecture=DROPPED)},
        "second batch": {"objective": aced.Objective(distillation=(aced.Distillation(batch="iid"),))},
        "cheap scoring": {"curation": aced.Joint(sub_batch=8, super_batch=16, num_chunks=4, scoring_size=8)},
    }
    whole = aced.distill(config(world, tmp_path / "whole", **changes[kind]))
    with pytest.raises(KeyboardInterrupt):
        aced.distill(config(world, tmp_path / "broken", **changes[kind]), callbacks=[break_off_at(step)])
    heard: list[Event] = []
    resumed = aced.resume(tmp_path / "broken", callbacks=[heard.append])
    assert heard[0].step == (step - 1) // 2 * 2
    same(weights(whole), weights(resumed))
    assert resumed.metrics == whole.metrics
    assert (resumed.step, whole.step) == (6, 6)
    assert told(tmp_path / "broken") == told(tmp_path / "whole")
    same(weights(towers.load(tmp_path / "broken" / "student")), weights(whole))


def test_a_resumed_run_may_have_been_moved_and_its_end_is_its_end(world: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        aced.distill(config(world, tmp_path / "run"), callbacks=[break_off_at(4)])
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    moved = aced.resume(tmp_path / "elsewhere")
    assert moved.directory == tmp_path / "elsewhere"
    assert not (tmp_path / "run").exists()
    again = aced.resume(tmp_path / "elsewhere")
    same(weights(moved), weights(again))
    assert again.step == 6


def test_equal_seeds_make_equal_students_and_other_seeds_others(world: Path, tmp_path: Path) -> None:
    one = aced.distill(config(world, tmp_path / "one"))
    two = aced.distill(config(world, tmp_path / "two", data=config(world, tmp_path).data.replace(workers=1)))
    other = aced.distill(config(world, tmp_path / "other", seed=1))
    same(weights(one), weights(two))
    assert told(tmp_path / "one") == told(tmp_path / "two")
    rows = map(json.loads, (tmp_path / "one" / "events.jsonl").read_text().splitlines())
    assert [row["step"] for row in rows if row["event"] == "checkpoint_saved"] == [2, 4, 6]
    assert not torch.equal(weights(one)["visual.proj"], weights(other)["visual.proj"])


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_deepspeed_makes_the_student_that_one_process_makes(world: Path, tmp_path: Path, stage: int) -> None:
    plain = aced.distill(config(world, tmp_path / "single"))
    other = aced.distill(config(world, tmp_path / "deepspeed", engine=engine("deepspeed", zero_stage=stage)))
    same(without_key_biases(weights(plain)), without_key_biases(weights(other)), atol=1e-6)
    assert plain.metrics == other.metrics
    assert (tmp_path / "deepspeed" / "student" / "aced.json").is_file()


def test_zero_stage_3_is_refused_before_anything_is_made(world: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="stage 3") as caught:
        aced.distill(config(world, tmp_path / "run", engine=engine("deepspeed", zero_stage=3)))
    assert caught.value.field == "engine.zero_stage"


def test_prepared_pictures_make_the_student_that_decoded_ones_make(world: Path, tmp_path: Path) -> None:
    decoded = config(world, tmp_path / "decoded")
    prepared = config(world, tmp_path / "prepared", data=decoded.data.replace(prepared=tmp_path / "p"))
    first, second = aced.distill(decoded), aced.distill(prepared)
    same(weights(first), weights(second))
    assert first.metrics == second.metrics
    assert list((tmp_path / "p").glob("*/images.npy"))  # the second did read prepared pictures


def test_iid_is_what_a_plain_torch_loop_does(world: Path, tmp_path: Path) -> None:
    made = config(world, tmp_path / "run", curation=aced.Iid(sub_batch=16), objective=aced.Objective(), reference=None)
    made = made.replace(data=made.data.replace(lanes=1))
    run = aced.distill(made)

    torch.manual_seed(0)
    start = encoder(0)  # only its first weights, preprocessing and tokenizer
    towers.save(start, tmp_path / "start")
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'start'}", output_dict=False)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'start'}")
    model.train()
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 1e-4},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    pool = Pool([world / "pool"])
    order = FullOrder([range(len(pool))], 1, seed=0).rows(np.zeros(1, np.int64), np.zeros((1, 1), np.int64), 200)
    usable = [int(row) for row in order[0] if row not in (11, 50)]
    rates = [1.0] + [0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / 5)).item()) for step in range(5)]
    for step in range(6):
        rows = usable[16 * step : 16 * step + 16]
        images = torch.stack([preprocess(pool.image(row, 10**6)) for row in rows])
        image, text, scale, bias = model(images, tokenizer([pool.text(row) for row in rows]))
        logits = scale * image @ text.T + bias
        loss = -F.logsigmoid((2 * torch.eye(16) - 1) * logits).sum() / 16
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * rates[step]
        optimizer.step()
    same(*(without_key_biases(found) for found in (dict(model.state_dict()), weights(run))), atol=2e-5)
    assert float((weights(run)["visual.proj"] - start.model.state_dict()["visual.proj"]).abs().max()) > 1e-3


def test_scored_and_trained_examples_are_counted_apart(world: Path, tmp_path: Path) -> None:
    heard: list[Event] = []
    run = aced.distill(config(world, tmp_path / "aced"), callbacks=[heard.append])
    assert (run.metrics["trained"], run.metrics["scored"]) == (48, 96)
    steps = [event for event in heard if isinstance(event, StepDone)]
    assert [(event.trained, event.scored) for event in steps] == [(8 * n, 16 * n) for n in range(1, 7)]
    assert all(set(event.parts) == {"contrastive", "softmax"} for event in steps)
    for event in heard:
        if isinstance(event, Selected):
            assert len(event.picked) == len(set(event.picked)) == 8
            assert set(event.picked) < set(event.candidates)
            assert not {11, 50} & set(event.candidates)
            noisy = [row % 4 == 0 for row in event.picked]
            assert event.statistics["noisy_selected"] == pytest.approx(sum(noisy) / 8)
    assert isinstance(heard[-1], RunEnded)
    kept = [event.step for event in heard if isinstance(event, CheckpointSaved)]
    assert kept == [2, 4, 6]
    assert sorted(path.name for path in (tmp_path / "aced" / "checkpoints").iterdir()) == [
        "step-00000004",
        "step-00000006",
    ]
    easy = config(world, tmp_path / "easy")
    run = aced.distill(easy.replace(curation=easy.curation.replace(score="easy_reference")))
    assert (run.metrics["trained"], run.metrics["scored"]) == (48, 0)
    manifest = towers.read_manifest(tmp_path / "easy" / "student")
    assert (manifest.facts["trained"], manifest.facts["scored"], manifest.facts["curation"]) == (48, 0, "joint")


def test_the_scores_of_candidates_and_picked_are_told(world: Path, tmp_path: Path) -> None:
    curation = aced.Joint(sub_batch=8, super_batch=24, num_chunks=4, gain=100.0)
    heard: list[Event] = []
    aced.distill(config(world, tmp_path / "run", curation=curation), callbacks=[heard.append])
    told = [event.scores for event in heard if isinstance(event, Selected)]
    assert len(told) == 6
    for scores in told:
        assert set(scores) == {"candidates", "picked"}
        assert all(list(quantiles) == sorted(quantiles) and len(quantiles) == 5 for quantiles in scores.values())
    assert sum(scores["picked"][2] > scores["candidates"][2] for scores in told) >= 5  # greedy draws take high scores


def test_a_collapse_is_told_once_however_often_a_run_is_resumed(world: Path, tmp_path: Path) -> None:
    # Greedy enough to take the same third of the candidates in every pass over the pool.
    easy = {"score": "easy_reference", "gain": 1e4, "num_chunks": 1}
    curation = aced.Joint(sub_batch=26, super_batch=78, collapse_margin=0.85, **easy)
    made = config(world, tmp_path / "run", curation=curation, objective=aced.Objective())
    with pytest.raises(KeyboardInterrupt):
        aced.distill(made, callbacks=[break_off_at(5)])
    aced.resume(tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    warned = [row for row in rows if row["event"] == "warned" and "collapsed" in row["cause"]]
    assert [row["step"] for row in warned] == [4]  # the first with as many draws as there are pairs
    assert "curation.gain" in warned[0]["remedy"]
    quiet = made.replace(curation=curation.replace(collapse_margin=0.0), directory=tmp_path / "quiet")
    heard: list[Event] = []
    aced.distill(quiet, callbacks=[heard.append])
    assert not [event for event in heard if event.name == "warned" and "collapsed" in event.cause]  # type: ignore[attr-defined]


@pytest.mark.parametrize(("share", "cheap"), [(0.5, [1, 3, 5, 7]), (0.25, [3, 7]), (0.01, [])])
def test_cheap_scoring_trains_its_share_at_the_scoring_size(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, cheap: list[int]
) -> None:
    scored, trained = [], []
    encode, forward = towers.DualEncoder.encode_image, Trainee.forward
    monkeypatch.setattr(
        towers.DualEncoder, "encode_image", lambda self, x, *a: (scored.append(tuple(x.shape)), encode(self, x, *a))[1]
    )
    monkeypatch.setattr(Trainee, "forward", lambda self, x, t: (trained.append(tuple(x.shape)), forward(self, x, t))[1])
    curation = aced.Joint(sub_batch=8, super_batch=16, num_chunks=4, scoring_size=8, scoring_fraction=share)
    assert cheap_places(curation, 16).nonzero().flatten().tolist() == cheap + [8 + place for place in cheap]
    made = config(world, tmp_path / "run", curation=curation, schedule=aced.Schedule(steps=1))
    assert aced.distill(made).metrics["scored"] == 16
    assert [shape for shape in scored if shape[0] > 1] == [(16, 3, 8, 8)]  # a picture alone is a check of the size
    sizes = [(8 - len(cheap), 3, 16, 16), (len(cheap), 3, 8, 8)]
    assert trained == [shape for shape in sizes if shape[0]]


def test_a_distinct_caption_is_embedded_once_for_all_its_pairs(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, student = config(world, tmp_path / "run"), encoder(0)
    tokens = student.tokenize(["red cat", "blue boat", "red cat", "red cat", "tree"])
    batch = SuperBatch(torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8), tokens, torch.arange(5))
    with torch.no_grad():
        expected = student(batch.images, batch.tokens)
    texts: list[int] = []
    encode = towers.DualEncoder.encode_text
    monkeypatch.setattr(
        towers.DualEncoder, "encode_text", lambda self, t, *a: (texts.append(len(t)), encode(self, t, *a))[1]
    )
    found = score(batch, student, made, torch.device("cpu"))
    assert texts == [3]
    torch.testing.assert_close(found.image, expected.image, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.text, expected.text, rtol=0, atol=1e-6)
    assert (found.scale, found.bias) == (expected.scale.item(), expected.bias.item())


def test_several_teachers_each_teach_their_term(world: Path, tmp_path: Path) -> None:
    towers.save(encoder(9), tmp_path / "second")
    reference = config(world, tmp_path).reference
    assert isinstance(reference, aced.Frozen)
    second = aced.Frozen(model=str(tmp_path / "second"), cache=tmp_path / "cache")

    def parts(name: str, teachers: tuple[aced.Frozen, ...], *terms: aced.Distillation) -> dict[str, float]:
        heard: list[Event] = []
        made = config(world, tmp_path / name, teacher=teachers, objective=aced.Objective(distillation=terms))
        aced.distill(made.replace(schedule=aced.Schedule(steps=1)), callbacks=[heard.append])
        return next(event for event in heard if isinstance(event, StepDone)).parts

    one, two = aced.Distillation(), aced.Distillation(teacher=1, weight=3.0)
    both = parts("both", (reference, second), one, two)
    turned = parts("turned", (second, reference), one, two)
    assert both["softmax"] == turned["softmax_2"] != both["softmax_2"] == turned["softmax"]


def test_a_static_filter_draws_only_the_top_share(world: Path, tmp_path: Path) -> None:
    made = config(world, tmp_path / "run", curation=aced.StaticFilter(sub_batch=8, keep_fraction=0.2))
    heard: list[Event] = []
    aced.distill(made.replace(schedule=aced.Schedule(steps=4)), callbacks=[heard.append])
    state = towers.read_manifest(tmp_path / "run" / "student").facts
    assert (state["trained"], state["scored"]) == (32, 0)
    facts = next(event for event in heard if event.name == "run_started").to_dict()["facts"]
    assert facts["pairs"] == 16  # a fifth of 78 usable pairs


def test_a_super_batch_larger_than_the_pool_is_refused(world: Path, tmp_path: Path) -> None:
    curation = aced.Joint(sub_batch=20, super_batch=80, num_chunks=4)
    with pytest.raises(ConfigError, match="draws 80 candidates, and 78 pairs can be drawn from"):
        aced.distill(config(world, tmp_path / "run", curation=curation))
