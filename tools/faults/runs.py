# SPDX-License-Identifier: Apache-2.0
"""Small runs in processes of their own, for `tools.faults`."""

from __future__ import annotations

import io
import multiprocessing
import os
import resource
import signal
import tarfile
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from aced_sdk.config import (
    Data,
    Distillation,
    DistillConfig,
    Engine,
    Frozen,
    Joint,
    Objective,
    Schedule,
    Student,
)
from aced_sdk.engine import Event
from aced_sdk.errors import AcedError, Interrupted
from aced_sdk.files import tensor_digest
from aced_sdk.reporting import read_events
from aced_sdk.towers import build, save
from aced_sdk.verbs import distill

ARCHITECTURE: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
STEPS, EVERY = 24, 4
NAMED = 3  # exit code after an error with a remedy
PROCESSES = multiprocessing.get_context("forkserver")
# What a run imports on its way: imported once, before the processes are forked.
PROCESSES.set_forkserver_preload([__name__, "open_clip", "transformers", "torch._dynamo"])


class World:
    """A pool, a reference with its cached embeddings, and an uninterrupted run.

    Attributes:
        folder: where all is.
        digest: of the weights of the uninterrupted run.
        seconds: how long that run took.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with tarfile.open(folder / "pool.tar", "w") as tar:
            for number in range(64):
                pixels = np.random.default_rng(number).integers(0, 256, (18, 20, 3), dtype=np.uint8)
                picture = io.BytesIO()
                Image.fromarray(pixels).save(picture, "png")
                for name, content in (("png", picture.getvalue()), ("txt", f"picture {number}".encode())):
                    member = tarfile.TarInfo(f"{number:04d}.{name}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        save(build(Student(architecture=ARCHITECTURE), 1), folder / "reference")
        self.run(folder / "first")  # writes the cache
        started = time.monotonic()
        self.run(folder / "whole")
        self.seconds = time.monotonic() - started
        self.digest = weights(folder / "whole")

    def config(self, directory: Path) -> DistillConfig:
        """Joint selection of 8 of 16 pairs, with distillation."""
        return DistillConfig(
            student=Student(architecture=ARCHITECTURE),
            data=Data(shards=(str(self.folder / "pool.tar"),)),
            reference=Frozen(model=str(self.folder / "reference"), cache=self.folder / "cache"),
            curation=Joint(sub_batch=8, super_batch=16, num_chunks=4),
            objective=Objective(distillation=(Distillation(weight=2.0),)),
            schedule=Schedule(steps=STEPS),
            engine=Engine(kind="single", device="cpu", checkpoint_every=EVERY, threads=1),
            directory=directory,
        )

    def start(self, directory: Path, stop: int = 0, limit: tuple[int, int] = (0, 0)) -> Any:
        """Start a process that runs or resumes; see `child`."""
        process = PROCESSES.Process(target=child, args=(self.config(directory), directory, stop, limit))
        process.start()
        return process

    def run(self, directory: Path) -> None:
        """Run or resume to the end.

        Raises:
            RuntimeError: if that fails.
        """
        process = self.start(directory)
        process.join()
        if process.exitcode:
            raise RuntimeError(f"exit code {process.exitcode}: {said(directory)[-500:]}")


def child(config: DistillConfig, directory: Path, stop: int, limit: tuple[int, int]) -> None:
    """Run or resume in a process of its own.

    Args:
        config: the run.
        directory: its folder.
        stop: end the process with SIGKILL at the end of this step; 0: never.
        limit: step and bytes: from that step on no file may grow larger; step 0: never.
    """
    output = os.open(directory.with_suffix(".txt"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream in (1, 2):
        os.dup2(output, stream)
    torch.set_num_threads(1)

    def listen(event: Event) -> None:
        if event.name == "step_done" and event.step == limit[0]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit[1], limit[1]))
        if event.name == "checkpoint_saved" and event.step == stop:
            os.kill(os.getpid(), signal.SIGKILL)

    code = 0
    try:
        distill(config, [listen], resume="auto")
    except Interrupted as error:
        code = error.exit_code
    except AcedError as error:
        code = NAMED
        os.write(2, f"{error}\n".encode())
    except BaseException:  # noqa: BLE001, it is listed
        code = 1
        os.write(2, traceback.format_exc().encode())
    os._exit(code)


def said(directory: Path) -> str:
    """What the processes of a run wrote."""
    return directory.with_suffix(".txt").read_text(errors="replace")


def weights(directory: Path) -> str:
    """Digest of the saved student's weights."""
    return tensor_digest(load_file(directory / "student" / "open_clip_model.safetensors"))


def last_step(directory: Path) -> int:
    """The last step that a run logged."""
    events = directory / "events.jsonl"
    rows = read_events(events) if events.is_file() else ()
    return max((row["step"] for row in rows if row["event"] == "step_done"), default=0)
