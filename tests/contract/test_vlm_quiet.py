# SPDX-License-Identifier: Apache-2.0
"""Messages of DeepSpeed, peft and transformers that a user can do nothing about do not reach the terminal."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import test_vlm

import export
import vlm

SCRIPT = """
import sys
from pathlib import Path
import test_vlm, vlm
from aced_sdk.config import Engine
folder = Path(sys.argv[1])
model, processor = vlm.build(vision=folder / "s", language=folder / "l")
config = test_vlm.config(1, 1, Engine(kind=sys.argv[2]))
tuned = vlm.tune(model, processor, test_vlm.samples(), config, directory=folder / "t")
vlm.save(tuned.model, processor, folder / "saved", merge=False)
vlm.caption(*vlm.load(folder / "saved"), [test_vlm.samples()[0].images[0]])
"""


@pytest.mark.parametrize("kind", ["single", "deepspeed"])
def test_a_tuning_writes_its_own_lines_alone(tmp_path: Path, kind: str) -> None:
    test_vlm.student(tmp_path / "s")
    test_vlm.language(tmp_path / "l")
    here = Path(__file__).parent
    path = os.pathsep.join(map(str, (here.parents[1], here.parent, here)))
    environment = os.environ | {"PYTHONPATH": path, "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), kind]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert ended.returncode == 0, ended.stderr
    lines = (ended.stdout + ended.stderr).splitlines()
    parts = ("tune: stage", "part ", "projector ", "adapter ", "vision tower ", "language model ")
    assert [line for line in lines if not line.startswith(parts)] == []
    assert sum(line.startswith("tune: stage") for line in lines) == 2


def test_exports_write_no_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    student = test_vlm.student(tmp_path / "s")
    language = test_vlm.language(tmp_path / "l")
    capfd.readouterr()
    export.to_transformers(student, tmp_path / "transformers")
    vlm.save(*vlm.build(vision=student, language=language), tmp_path / "vlm")
    export.vlm_vision_to_onnx(tmp_path / "vlm", tmp_path / "onnx", precisions=("fp32",))
    assert capfd.readouterr() == ("", "")
