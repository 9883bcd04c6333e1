# SPDX-License-Identifier: Apache-2.0
"""Interrupt runs in every way and resume them: `make faults`, or `python -m tools.faults --times 50`.

| fault | what happens to a run |
|---|---|
| killed | SIGKILL at a random moment |
| terminated | SIGTERM at a random moment |
| full disk | from a random step on, no file may grow beyond a random size |
| flipped bit | one bit of a random place in a file of the newest checkpoint; each file in turn |

The run is then resumed with `resume="auto"`. The student must have the weights of an uninterrupted run, bit for bit.
At most two checkpoint intervals of steps are taken again, because training continues while a checkpoint is written.
Otherwise, and after an error without a remedy, the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from aced_sdk.engine import checkpoints, step_of
from aced_sdk.errors import AcedError
from aced_sdk.reporting import read_events
from benchmarks.machine import emit, machine
from tools.faults.runs import EVERY, NAMED, STEPS, World, last_step, said, weights

FILES = ("weights.safetensors", "optimizer.safetensors", "loop.safetensors", "state.json")
Fault = Callable[[World, Path, random.Random, int], None]


def signalled(number: signal.Signals) -> Fault:
    """A signal at a random moment."""

    def fault(world: World, directory: Path, dice: random.Random, turn: int) -> None:
        process = world.start(directory)
        process.join(dice.uniform(0, world.seconds))
        if process.is_alive():
            os.kill(process.pid, number)
        process.join()
        if process.exitcode not in (0, -number, 128 + number):
            raise RuntimeError(f"exit code {process.exitcode}: {said(directory)[-500:]}")
        if process.exitcode == 128 + number and step_of(checkpoints(directory)[-1]) != last_step(directory):
            raise RuntimeError("the last step is not in the checkpoint")

    return fault


def full_disk(world: World, directory: Path, dice: random.Random, turn: int) -> None:
    """No file may grow beyond some size."""
    process = world.start(directory, limit=(dice.randrange(1, STEPS), dice.randrange(1, 4_000_000)))
    process.join()
    if process.exitcode not in (0, NAMED):
        raise RuntimeError(f"exit code {process.exitcode}: {said(directory)[-500:]}")


def flipped_bit(world: World, directory: Path, dice: random.Random, turn: int) -> None:
    """One bit of a file in the newest checkpoint of a run that was stopped after at least two."""
    process = world.start(directory, stop=EVERY * dice.randrange(2, STEPS // EVERY))
    process.join()
    path = checkpoints(directory)[-1] / FILES[turn % len(FILES)]
    content = bytearray(path.read_bytes())
    content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    path.write_bytes(content)


FAULTS: dict[str, Fault] = {
    "killed": signalled(signal.SIGKILL),
    "terminated": signalled(signal.SIGTERM),
    "full disk": full_disk,
    "flipped bit": flipped_bit,
}


def attempt(world: World, fault: Fault, dice: random.Random, number: int) -> tuple[str, int]:
    """One run with a fault, resumed: how it ended, and how many steps were taken again."""
    directory = world.folder / "run"
    shutil.rmtree(directory, ignore_errors=True)
    directory.with_suffix(".txt").unlink(missing_ok=True)
    try:
        fault(world, directory, dice, number)
        before = last_step(directory)
        world.run(directory)
        first = [row["step"] for row in read_events(directory / "events.jsonl") if row["event"] == "run_started"][-1]
    except (RuntimeError, AcedError, OSError) as error:
        return f"{type(error).__name__}: {error}", 0
    lost = max(0, before - first)
    if weights(directory) != world.digest:
        return "other weights", lost
    if lost > 2 * EVERY + (EVERY if fault is flipped_bit else 0):  # the damaged checkpoint is one more
        return f"{lost} steps were lost", lost
    return "identical", lost


def main() -> int:
    """Run all faults and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=50, help="runs of each fault")
    parser.add_argument("--only", nargs="*", default=[], choices=FAULTS, help="faults")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    asked = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder))
        for name, fault in FAULTS.items():
            if asked.only and name not in asked.only:
                continue
            dice, ends, most = random.Random(f"{asked.seed} {name}"), Counter[str](), 0
            for number in range(asked.times):
                end, lost = attempt(world, fault, dice, number)
                ends[end] += 1
                most = max(most, lost)
            wrong = {end: count for end, count in ends.items() if end != "identical"}
            rows.append({"fault": name, "runs": asked.times, "identical": ends["identical"], "most_steps_lost": most})
            rows[-1] |= {"wrong": wrong}
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    facts = {"seed": asked.seed, "steps": STEPS, "checkpoint_every": EVERY, "seconds_of_a_run": round(world.seconds, 2)}
    emit(machine("cpu") | facts | {"rows": rows}, asked.output)
    return int(any(row["wrong"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
