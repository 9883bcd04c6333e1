# SPDX-License-Identifier: Apache-2.0
"""Tuning in two real processes, at ZeRO stages 0 to 3: the steps of one process, and checkpoints that go on in one."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import vlm
from aced_sdk.config import Engine
from aced_sdk.engine import Event, checkpoints
from tests.contract.test_vlm import language, student
from vlm.data.rows import Row, shares
from vlm.model.adapters import base_of

COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220)}
STAGES = (0, 1, 2, 3)
NOTHING_WHOLE = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}  # else stage 3 leaves tiny ones whole
SECONDS = 90  # a hang is a failure
# Forked from a process that has imported and computed nothing: threads do not outlive a fork, and imports take long.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["deepspeed", "peft", "vlm.model.building", "vlm.tuning", __name__])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    student(folder / "student")
    language(folder / "language")
    language(folder / "experts", family="mixtral", num_local_experts=4, num_experts_per_tok=2)
    for name, colour in COLOURS.items():
        Image.new("RGB", (24, 24), colour).save(folder / f"{name}.png")
    return folder


def samples(folder: Path) -> list[vlm.Sample]:
    """One picture, two pictures and none, of different lengths."""
    files = {name: folder / f"{name}.png" for name in COLOURS}
    out = [vlm.Sample(name, (("what colour is it ?", name),), (file,)) for name, file in files.items()]
    out += [vlm.Sample(f"{name}?", (("is this red ?", "no"),), (file,)) for name, file in files.items()]
    out.append(vlm.Sample("both", (("is this green ?", "yes"),), (files["red"], files["green"])))
    out += [vlm.Sample(f"words{n}", (("what is a picture ?", "a picture of red " * (n + 1)),), ()) for n in range(4)]
    return out


def tuned(folder: Path, out: Path, options: dict[str, Any], rank: int, hear: Any) -> vlm.TuneResult:
    """A run of Align, then Adapt, as the options say; rank 0 saves what came out."""
    model, processor = vlm.build(vision=folder / "student", language=folder / options.get("language", "language"))
    common: dict[str, Any] = {"batch_size": options.get("batch", 5), "micro_batch": options.get("micro")}
    rate = options.get("rate", 1e-2)
    lora = None if options.get("whole") else vlm.Lora(rank=2, dora=options.get("dora", False))
    stages = [
        vlm.Align(steps=2, learning_rate=rate, **common),
        vlm.Adapt(steps=4, learning_rate=rate, lora=lora, **common),
    ]
    engine = Engine(
        kind=options.get("kind", "deepspeed"),
        precision=options.get("precision", "fp32"),
        zero_stage=options["zero"],
        deepspeed=NOTHING_WHOLE if options["zero"] == 3 else None,
        device="cpu",
        threads=1,
        checkpoint_every=2,
    )
    data = samples(folder)
    if options.get("words"):  # so many that most steps begin with rows without a picture
        more = [(("what is a picture ?", "red"),), (("what is red ?", "a colour"),)]
        data += [vlm.Sample(f"more{n}", more[n % 2], ()) for n in range(12)]
    if options.get("torn") == rank:
        data = [
            replace(sample, images=tuple(folder / "gone" / Path(str(i)).name for i in sample.images)) for sample in data
        ]
    config = vlm.TuneConfig(stages=stages, engine=engine, conversations_per_row=2)
    callbacks = [lambda event: hear(event, model)]
    result = vlm.tune(model, processor, data, config, directory=out / "run", callbacks=callbacks)
    if rank == 0 and lora:
        vlm.save(result.model, processor, out / "saved", merge=False)
    return result


def child(folder: Path, out: Path, rank: int, processes: int, port: int, options: dict[str, Any]) -> None:
    """What every process does: tune, and keep what came out."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    sys.stderr = sys.stdout = (out / f"said-{rank}.txt").open("w", buffering=1)
    torch.set_num_threads(1)
    heard = []

    def hear(event: Event, model: Any) -> None:
        heard.append(sum(parameter.numel() for parameter in model.model.language_model.parameters()))
        if event.name == "step_done" and event.step == options.get("signal_at"):
            os.kill(os.getpid(), options["signal"])
        if event.name == "step_done" and event.step == options.get("stop"):
            raise KeyboardInterrupt(f"stopped in process {rank}")

    try:
        result = tuned(folder, out, options, rank, hear)
        weights = dict(base_of(result.model).state_dict())
        torch.save({"weights": weights, "losses": result.losses, "heard": heard}, out / f"rank-{rank}.pt")
    except BaseException:  # noqa: BLE001 - told in the file
        traceback.print_exc()
        os._exit(7)
    sys.stdout.flush()
    os._exit(0)


def launch(folder: Path, out: Path, processes: int, **options: Any) -> list[tuple[int | None, str]]:
    """Tune in so many processes; their exit codes and output. A hang fails."""
    out.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [FORKS.Process(target=child, args=(folder, out, n, processes, port, options)) for n in range(processes)]
    for process in started:
        process.start()
    end = time.monotonic() + SECONDS
    for process in started:
        process.join(max(0.0, end - time.monotonic()))
    for process in started:
        process.kill()
    return [(process.exitcode, (out / f"said-{n}.txt").read_text()) for n, process in enumerate(started)]


def kept(out: Path, rank: int = 0) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(out / f"rank-{rank}.pt", weights_only=True)
    return loaded


def events(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "run" / "events.jsonl").read_text().splitlines()]


def good(results: list[tuple[int | None, str]]) -> None:
    for code, text in results:
        assert code == 0, text[-3000:]


@pytest.fixture(scope="module")
def alone(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one plain process makes, LoRA and whole."""
    made = {}
    for whole in (False, True):
        out = tmp_path_factory.mktemp("alone")
        good(launch(folder, out, 1, zero=0, kind="single", whole=whole))
        made["whole" if whole else "lora"] = kept(out)
    return made


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["weights"].keys() == expected["weights"].keys()
    for ours, theirs in zip(found["losses"], expected["losses"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    for name, tensor in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], tensor, atol=2e-5, rtol=1e-4, msg=name)


def saved_is_trained(out: Path, weights: dict[str, torch.Tensor]) -> None:
    """Checkpoint and adapter have every trained parameter, bit for bit."""
    checkpoint = load_file(checkpoints(out / "run" / "stage-1-adapt")[-1] / "weights.safetensors")
    adapter = load_file(out / "saved" / "adapter" / "adapter_model.safetensors")
    trained = {name: tensor for name, tensor in weights.items() if ".default." in name}
    assert checkpoint.keys() == {f"model.{name}" for name in trained}
    assert adapter.keys() == {adapter_name(name) for name in trained}
    for name, tensor in trained.items():
        assert torch.equal(checkpoint[f"model.{name}"], tensor), name
        assert torch.equal(adapter[adapter_name(name)], tensor), name


def adapter_name(name: str) -> str:
    """What peft's files call a parameter."""
    return "base_model.model." + name.replace("modules_to_save.default.", "").replace(".default.", ".")


def test_shares_of_a_step_are_even_and_whole() -> None:
    rows = [Row([n], [n], [0], [0], [], 1) for n in range(5)]
    for micro in (None, 1, 2, 9):
        for world in (1, 2, 3, 7):
            parts = [shares(rows, micro, rank, world) for rank in range(world)]
            assert len({len(part) for part in parts}) == 1
            assert sorted(row.ids[0] for part in parts for batch in part for row in batch) == list(range(5))
            assert all(len(batch) <= (micro or 5) for part in parts for batch in part)


@pytest.mark.parametrize("zero", STAGES)
def test_two_processes_take_the_steps_of_one(folder: Path, alone: dict[str, Any], tmp_path: Path, zero: int) -> None:
    good(launch(folder, tmp_path, 2, zero=zero, micro=2))
    first, second = kept(tmp_path, 0), kept(tmp_path, 1)
    same(first, alone["lora"])
    for name, tensor in first["weights"].items():
        assert torch.equal(second["weights"][name], tensor), name
    assert second["heard"] == []
    assert {numel > 0 for numel in first["heard"]} == {zero < 3}  # between steps no process holds a whole weight
    saved_is_trained(tmp_path, first["weights"])
    assert [e["step"] for e in events(tmp_path) if e["event"] == "step_done"] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("zero", STAGES)
def test_a_whole_language_model_in_two_processes(
    folder: Path, alone: dict[str, Any], tmp_path: Path, zero: int
) -> None:
    good(launch(folder, tmp_path, 2, zero=zero, micro=1, whole=True))
    same(kept(tmp_path), alone["whole"])


@pytest.mark.parametrize("held", ["language", "experts"])
def test_micro_batches_without_pictures_before_those_with_them(folder: Path, tmp_path: Path, held: str) -> None:
    """Stage 3 clears a gradient in a step's first backward: the projector and each expert take part in every one."""
    options: dict[str, Any] = {"language": held, "whole": True, "words": True, "micro": 1, "batch": 7}
    good(launch(folder, tmp_path / "alone", 1, zero=0, kind="single", **options))
    good(launch(folder, tmp_path / "shared", 2, zero=3, **options))
    same(kept(tmp_path / "shared"), kept(tmp_path / "alone"))


@pytest.mark.parametrize("zero", [2, 3])
def test_a_run_of_two_stopped_in_one_process_goes_on_alone(
    folder: Path, alone: dict[str, Any], tmp_path: Path, zero: int
) -> None:
    (first, told), (second, heard) = launch(folder, tmp_path, 2, zero=zero, stop=5)
    assert (first, second) == (7, 7)
    assert "KeyboardInterrupt: stopped in process 0" in told
    assert "rank 0 failed: KeyboardInterrupt: stopped in process 0" in heard
    good(launch(folder, tmp_path, 1, zero=0, kind="single"))
    found, expected = kept(tmp_path), alone["lora"]
    assert found["losses"][1] == pytest.approx(expected["losses"][1][2:], rel=1e-5)
    for name, tensor in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], tensor, atol=2e-5, rtol=1e-4, msg=name)
    saved_is_trained(tmp_path, found["weights"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_one_process_ends_both_and_the_run_is_resumed(
    folder: Path, alone: dict[str, Any], tmp_path: Path, number: signal.Signals
) -> None:
    (first, heard), (second, told) = launch(folder, tmp_path, 2, zero=1, signal=number, signal_at=5)
    if number == signal.SIGKILL:
        assert (first, second) == (-number, 7)
        assert "rank 0 ended without a message" in told
    else:
        assert (first, second) == (7, 7)
        for text in (heard, told):
            assert "Interrupted: SIGTERM ended the run after step 3" in text  # of the second stage
    good(launch(folder, tmp_path, 1, zero=0, kind="single"))
    found, left = kept(tmp_path), 4 if number == signal.SIGKILL else 5
    assert found["losses"][1] == pytest.approx(alone["lora"]["losses"][1][left - 2 :], rel=1e-5)


def test_a_picture_that_one_process_cannot_read_ends_both(folder: Path, tmp_path: Path) -> None:
    (first, heard), (second, told) = launch(folder, tmp_path, 2, zero=1, torn=1)
    assert (first, second) == (7, 7)
    assert "rank 1 failed: Unusable" in heard
    assert "No such file or directory" in heard
    assert "No such file or directory" in told
