# SPDX-License-Identifier: Apache-2.0
"""Launches of several real processes: one failure gives one message, and every process ends with an error code."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from tiny import distillation, encoder, write_pool

from aced_sdk import cli, towers
from aced_sdk.engine import Ranks, ranks, read_launch
from aced_sdk.errors import ConfigError, DataError

SECONDS = 60  # a hang is a failure
TIMEOUT = 2.0  # engine.timeout_seconds of the ranks below
MESSAGE = re.compile(r"^(?:\w+\.)*\w+Error: .*$", re.MULTILINE)
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "aced_sdk.engine", "aced_sdk.cli", __name__])


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def place(rank: int, world: int, port: int) -> dict[str, str]:
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in values.items()}


def work(fault: str, culprit: int) -> None:
    """The work of all ranks; one of them fails."""
    launch = read_launch()
    found = Ranks(launch, torch.device("cpu"), TIMEOUT)
    found.barrier()
    mine = found.rank == culprit

    def read() -> None:
        if mine:
            raise DataError("the shard is broken", remedy="mend it")

    if fault == "data":
        found.together(read)
    elif fault == "all":
        raise ConfigError("the config is wrong", remedy="mend it", field="seed")
    elif fault == "pool":
        found.agree({"pool": "other" if mine else "one", "seed": "0"}, "use the same shards")
    elif mine and fault == "defect":
        raise KeyError("a defect")
    elif mine and fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif mine and fault == "hangs":
        time.sleep(SECONDS)
    found.barrier()


def plan(folder: Path) -> None:
    """The work of rank 0 alone, which fails."""
    with (folder / "planned.txt").open("a") as stream:
        stream.write("planned\n")
    raise DataError("the shard is broken", remedy="mend it")


def child(folder: Path, rank: int, world: int, port: int, fault: str, culprit: int) -> None:
    """One process of a launch: the `aced` command with the command `cache` replaced by `work`."""
    os.environ.update(place(rank, world, port))
    said = (folder / f"said-{rank}.txt").open("w")
    os.dup2(said.fileno(), 2)
    sys.stderr = said
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command("cache")(lambda: work(fault, culprit))
    app.command("plan")(lambda: plan(folder))
    cli.app, cli.entry_points = app, lambda group: ()  # type: ignore[assignment, misc]
    sys.argv = ["aced", "plan" if fault == "plan" else "cache"]
    if fault == "version" and rank == culprit:
        ranks._version = lambda name: "0.0"
    try:
        cli.main()
        code: Any = 0
    except SystemExit as ended:
        code = ended.code
    said.flush()
    os._exit(int(code or 0))


def launched(folder: Path, fault: str, culprit: int = 1, world: int = 3, port: int = 0) -> tuple[list[Any], list[str]]:
    """Exit codes of a launch, and what each process wrote to standard error."""
    port = port or free_port()
    started = [FORKS.Process(target=child, args=(folder, n, world, port, fault, culprit)) for n in range(world)]
    for process in started:
        process.start()
    end = time.monotonic() + SECONDS
    for process in started:
        process.join(max(0.0, end - time.monotonic()))
    codes = [process.exitcode for process in started]
    for process in started:
        process.kill()
    return codes, [(folder / f"said-{n}.txt").read_text() for n in range(world)]


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("data", r"DataError: the shard is broken\. Remedy: mend it"),
        ("defect", r"KeyError: 'a defect'"),
        ("pool", r"EngineError: rank 1 has another pool than rank 0: other instead of one"),
        ("version", r"EngineError: rank 1 has another version of aced-sdk than rank 0: 0\.0 instead of \d"),
    ],
)
def test_the_rank_that_failed_reports_it_and_all_end(tmp_path: Path, fault: str, told: str) -> None:
    codes, said = launched(tmp_path, fault)
    assert codes == [1, 1, 1], said
    assert [bool(MESSAGE.findall(text)) for text in said] == [False, True, False], said
    (message,) = MESSAGE.findall(said[1])
    assert re.match(told, message)


def test_rank_0_alone_plans_and_its_failure_ends_all(tmp_path: Path) -> None:
    codes, said = launched(tmp_path, "plan")
    assert codes == [1, 1, 1], said
    assert [len(MESSAGE.findall(text)) for text in said] == [1, 0, 0], said
    assert (tmp_path / "planned.txt").read_text() == "planned\n"


def test_a_failure_of_all_ranks_is_reported_once(tmp_path: Path) -> None:
    codes, said = launched(tmp_path, "all")
    assert codes == [1, 1, 1], said
    assert len(MESSAGE.findall("".join(said))) == 1, said


@pytest.mark.parametrize(("fault", "culprit"), [("killed", 0), ("killed", 1), ("hangs", 1)])
def test_a_rank_that_is_gone_or_hangs_is_named_by_another(tmp_path: Path, fault: str, culprit: int) -> None:
    codes, said = launched(tmp_path, fault, culprit)
    assert codes[culprit] == (-signal.SIGKILL if fault == "killed" else 1), said
    assert [code for rank, code in enumerate(codes) if rank != culprit] == [1, 1], said
    (message,) = MESSAGE.findall("".join(said))
    assert message.startswith(f"EngineError: rank {culprit} ended without a message, or did not answer")
    assert "engine.timeout_seconds" in message


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = int(taken.getsockname()[1])
        process = FORKS.Process(target=child, args=(tmp_path, 0, 2, port, "data", 0))
        process.start()
        process.join(SECONDS)
    process.kill()
    (message,) = MESSAGE.findall((tmp_path / "said-0.txt").read_text())
    assert message.startswith(f"EngineError: port {port} of 127.0.0.1 is in use")
    assert process.exitcode == 1


# -- launchers ----------------------------------------------------------------------------------------------------


def test_every_launcher_starts_the_command(root: Path, tmp_path: Path) -> None:
    """Several ranks do not distil, which rank 0 alone reports before anything is written; rank 0 alone plans."""
    reference = towers.save(encoder(1), tmp_path / "reference")
    given = distillation(tmp_path / "run", write_pool(tmp_path / "pool", pairs=32), reference)
    given.to_yaml(tmp_path / "config.yaml")
    scripts = Path(sys.executable).parent
    config = str(tmp_path / "config.yaml")
    torchrun = [str(scripts / "torchrun"), "--nproc-per-node", "2", "--master-port", str(free_port())]
    deepspeed = [str(scripts / "deepspeed"), "--num_gpus", "2", "--master_port", str(free_port())]
    accelerate = [str(scripts / "accelerate"), "launch", "--cpu", "--num_processes", "1"]
    module = ["--module", "aced_sdk.cli"]
    slurm = [
        {"SLURM_PROCID": str(n), "SLURM_LOCALID": str(n), "SLURM_STEP_NUM_TASKS": "2", "MASTER_ADDR": "127.0.0.1"}
        for n in range(2)
    ]
    plain, port = [sys.executable, "-m", "aced_sdk.cli"], str(free_port())
    commands: list[tuple[list[str], dict[str, str]]] = [
        ([*torchrun, *module, "plan", config], {}),
        ([*deepspeed, *module, "distill", config], {}),
        ([*accelerate, *module, "--version"], {}),
        *(([*plain, "distill", config], values | {"MASTER_PORT": port}) for values in slurm),
    ]
    installed = [(command, more) for command, more in commands if shutil.which(command[0])]
    environment = {"PYTHONPATH": str(root), "ACED_HOME": str(tmp_path / "home")}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": tmp_path}
    started = [subprocess.Popen(command, env=os.environ | environment | more, **pipes) for command, more in installed]
    said = {tuple(process.args): process.communicate(timeout=SECONDS * 3) for process in started[:-2]}
    tasks = [process.communicate(timeout=SECONDS * 3) for process in started[-2:]]
    for process in started[:-2]:
        output, errors = said[tuple(process.args)]
        if "distill" in process.args:
            assert process.returncode != 0, errors
            assert (output + errors).count("UnsupportedError: 2 ranks were launched") == 1, errors
        else:
            assert process.returncode == 0, errors
            assert len(re.findall("examples trained|^aced-sdk ", output, re.MULTILINE)) == 1, output + errors
    assert [process.returncode for process in started[-2:]] == [1, 1], tasks
    assert ["UnsupportedError: 2 ranks were launched" in errors for _, errors in tasks] == [True, False], tasks
    assert not (tmp_path / "run").exists()


def test_ranks_share_the_indexing_of_a_pool(root: Path, tmp_path: Path) -> None:
    pool = write_pool(tmp_path / "pool", pairs=40, shards=5)
    environment = os.environ | {"PYTHONPATH": str(root), "ACED_HOME": str(tmp_path / "home")}
    torchrun = str(Path(sys.executable).parent / "torchrun")
    command = [
        torchrun,
        "--nproc-per-node",
        "2",
        "--master-port",
        str(free_port()),
        "--module",
        "aced_sdk.cli",
    ]
    done = subprocess.run(
        [*command, "index", str(pool)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS * 2,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert json.loads(line)["pairs"] == 40
    assert len(list((tmp_path / "home").rglob("*.index"))) == 5
