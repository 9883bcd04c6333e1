# SPDX-License-Identifier: Apache-2.0
"""lmms-eval runs a saved model on a local task, found by its entry point, and gives the score of vlm.evaluate."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_vlm import config, language, samples, student

import vlm
from aced_sdk.errors import UnsupportedError

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval is not installed; it brings packages of its own"
)
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.pictures
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  max_new_tokens: {tokens}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
metadata:
  - version: 0.0
"""
UTILS = """
from PIL import Image

def pictures(doc):
    return [Image.open(doc["image"]).convert("RGB")]
"""


def lmms_eval(model: Path, data: list[vlm.Sample], folder: Path, tokens: int) -> float:
    """The exact match of a task with these questions."""
    rows = []
    for sample in data:
        path = folder / f"{len(rows)}.png"
        sample.images[0].save(path)
        rows.append({"image": str(path), "question": sample.turns[0][0], "answer": sample.turns[0][1]})
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "task").mkdir()
    (folder / "task" / "own.yaml").write_text(TASK.format(name="own", data=folder / "data.jsonl", tokens=tokens))
    (folder / "task" / "utils.py").write_text(UTILS)
    root = Path(vlm.__file__).parents[1]
    # stands for this package's own metadata, which an installed checkout may have from an earlier day
    declared = tomllib.loads((root / "pyproject.toml").read_text())["project"]["entry-points"]["lmms_eval.models"]
    plugin = folder / "path" / "plugin-1.0.dist-info"
    plugin.mkdir(parents=True)
    (plugin / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1.0\n")
    points = "".join(f"{name} = {where}\n" for name, where in declared.items())
    (plugin / "entry_points.txt").write_text(f"[lmms_eval.models]\n{points}")
    paths = [str(folder / "path"), str(root), os.environ.get("PYTHONPATH", "")]
    arguments = ["--model", "aced_vlm", "--model_args", f"pretrained={model}", "--tasks", "own", "--batch_size", "4"]
    arguments += ["--include_path", str(folder / "task"), "--output_path", str(folder / "out"), "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-m", "lmms_eval", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HOME": str(folder / "home")},
    )
    found = list((folder / "out").rglob("*_results.json"))
    assert found, done.stdout[-2000:] + done.stderr[-3000:]
    return float(json.loads(found[0].read_text())["results"]["own"]["exact_match,none"])


def test_lmms_eval_gives_the_score_of_evaluate(tmp_path: Path) -> None:
    llava, processor = vlm.build(student(tmp_path / "student"), language(tmp_path / "language"))
    result = vlm.tune(llava, processor, samples(), config(align=60, adapt=40), directory=tmp_path / "run")
    folder = vlm.save(result.model, processor, tmp_path / "model")
    wrong = [replace(one, turns=((one.turns[0][0], "a picture"),)) for one in samples(1)]
    scores = vlm.evaluate(result.model, processor, [*samples(), *wrong], blind=False, max_new_tokens=4)
    assert 0 < scores.total.exact < 1  # or equality would say little
    assert lmms_eval(folder, [*samples(), *wrong], tmp_path, tokens=4) == pytest.approx(scores.total.exact)


def test_requests_keep_their_order_length_and_stops_and_sampling_is_refused(tmp_path: Path) -> None:
    from vlm.lmms import AcedVlm  # needs lmms-eval

    llava, processor = vlm.build(student(tmp_path / "student"), language(tmp_path / "language"))
    model = AcedVlm(str(vlm.save(llava, processor, tmp_path / "model")), device="cpu", batch_size=2)
    images = [sample.images for sample in samples(1)]
    model.task_dict = {"own": {"test": images}}

    def ask(number: int, **options: object) -> SimpleNamespace:
        return SimpleNamespace(args=("<image>\nwhat is it ?", options, lambda doc: doc, number, "own", "test"))

    plain = [vlm.answer(llava, processor, [images[n]], ["what is it ?"], longest)[0] for n, longest in ((0, 3), (4, 6))]
    assert model.generate_until([ask(0, max_new_tokens=3), ask(4, max_new_tokens=6, until=None)]) == plain
    stop = plain[1].split()[1]
    assert model.generate_until([ask(4, max_new_tokens=6, until=[stop])]) == [plain[1].split(stop)[0].strip()]
    for options in ({"do_sample": True}, {"temperature": 0.7}, {"num_beams": 3}):
        with pytest.raises(UnsupportedError, match="sampling or beams"):
            model.generate_until([ask(0, **options)])
