# SPDX-License-Identifier: Apache-2.0
"""The `aced` command: the verbs by name, JSON on stdout, and a sentence with exit code 1 for what a user can mend."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from test_evaluation import classification
from tiny import distillation, encoder, write_pool
from typer.testing import CliRunner

from aced_sdk import cli, towers
from aced_sdk.config import DistillConfig
from aced_sdk.errors import DataError, EngineError, Interrupted
from aced_sdk.reporting import read_events

VERBS = ("distill", "resume", "cache", "evaluate", "plan", "report", "export", "caption", "answer")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cli")
    reference = towers.save(encoder(1), root / "reference")
    config = distillation(root / "run", write_pool(root / "pool", pairs=32), reference)
    config.replace(schedule=config.schedule.replace(steps=2)).to_yaml(root / "config.yaml")
    return root


def called(*words: str | Path) -> str:
    result = CliRunner().invoke(cli.app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.stdout


def process(*words: str | Path, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from aced_sdk.cli import main; import sys; sys.path.pop(0); main()"]
    return subprocess.run([*command, *map(str, words)], capture_output=True, text=True, check=False, cwd=folder)


def test_the_command_has_every_verb() -> None:
    done = process("--help")
    assert done.returncode == 0
    for verb in VERBS:
        assert f" {verb} " in done.stdout


def test_the_command_prints_its_version() -> None:
    assert called("--version").strip() == f"aced-sdk {version('aced-sdk')}"


def test_a_mistake_is_a_sentence_and_exit_code_1(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("student: {architecture: ViT-B-32}\nshedule: {steps: 3}\n")
    done = process("plan", tmp_path / "config.yaml")
    assert done.returncode == 1
    assert done.stderr.startswith("ConfigError: ")
    assert "Remedy:" in done.stderr
    assert "Traceback" not in done.stderr
    assert process("plan").returncode == 2


def test_errors_of_packages_that_cannot_import_this_one_read_alike(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Foreign(Exception):
        remedy = "mend it"

    stopped = Interrupted("SIGTERM ended the run", remedy="resume it", exit_code=143)
    for error, code in ((Foreign("it is broken"), 1), (DataError("bad", remedy="mend"), 1), (stopped, 143)):

        def fail(error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(cli, "app", fail)
        monkeypatch.setattr(cli, "entry_points", lambda group: [])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert caught.value.code == code
        assert capsys.readouterr().err.startswith(f"{type(error).__name__}: ")

    def interrupt() -> None:
        sys.exit(130)  # as typer does after Ctrl-C

    monkeypatch.setattr(cli, "app", interrupt)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 130
    assert "aced resume DIRECTORY" in capsys.readouterr().err

    def crash() -> None:
        raise KeyError("a defect")

    monkeypatch.setattr(cli, "app", crash)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 1
    assert "KeyError: 'a defect'" in capsys.readouterr().err


def test_plan_distill_resume_report_and_evaluate(world: Path) -> None:
    assert "examples trained" in called("plan", world / "config.yaml")
    done = json.loads(called("distill", world / "config.yaml").splitlines()[-1])
    assert (done["step"], done["trained"], done["scored"]) == (2, 16, 32)
    again = json.loads(called("resume", world / "run").splitlines()[-1])
    assert again["step"] == 2
    page = Path(called("report", world / "run").strip())
    assert "<html" in page.read_text()
    classification(world / "tasks")
    words = ["evaluate", world / "run" / "student", "--data-root", world / "tasks", "--tasks", "shapes"]
    figures = json.loads(called(*words))
    assert 0 <= figures["tasks"]["shapes"]["acc1"] <= figures["tasks"]["shapes"]["acc5"] <= 1


def test_distill_resumes_or_starts(world: Path) -> None:
    config = DistillConfig.from_yaml(world / "config.yaml").replace(directory=world / "again")
    config.to_yaml(world / "again.yaml")
    refused = CliRunner().invoke(cli.app, ["distill", str(world / "again.yaml"), "--resume", "must"])
    assert isinstance(refused.exception, EngineError)
    assert not (world / "again").exists()
    for _ in range(2):
        done = json.loads(called("distill", world / "again.yaml", "--resume", "auto").splitlines()[-1])
        assert done["step"] == 2
    steps = [row["step"] for row in read_events(world / "again" / "events.jsonl") if row["event"] == "step_done"]
    assert steps == [1, 2]
    assert "holds a run already" in str(CliRunner().invoke(cli.app, ["distill", str(world / "again.yaml")]).exception)


@pytest.mark.parametrize("words", [["--local_rank", "0", "--version"], ["--version", "--local-rank=0"]])
def test_the_option_of_launchers_is_taken_anywhere(words: list[str]) -> None:
    done = process(*words)
    assert (done.returncode, done.stdout.split()[0]) == (0, "aced-sdk"), done.stderr


@pytest.mark.parametrize("words", [["--local_rank"], ["--local_rank", "1"], ["--local-rank=x"]])
def test_an_invalid_option_of_launchers_is_named(words: list[str]) -> None:
    done = process("--version", *words)
    assert done.returncode == 1
    assert done.stderr.startswith("EngineError: ")


def test_cache_tells_its_folder_and_counts(world: Path) -> None:
    words = ["cache", world / "reference", world / "pool", "--directory", world / "embeddings"]
    assert json.loads(called(*words)) == {"directory": str(world / "embeddings"), "pairs": 32, "usable": 32}


def test_a_module_of_ones_own_is_imported_first(world: Path, tmp_path: Path) -> None:
    (tmp_path / "my_parts.py").write_text(
        "from typing import ClassVar, Literal\n"
        "from aced_sdk.config import Curation\n"
        "from aced_sdk.curation import Selector\n"
        "class Mine(Curation):\n"
        "    target: ClassVar[str] = 'my_parts:MySelector'\n"
        "    method: Literal['mine'] = 'mine'\n"
        "class MySelector(Selector): pass\n"
    )
    values = yaml.safe_load((world / "config.yaml").read_text())
    values |= {"curation": {"method": "mine", "sub_batch": 8}, "directory": str(tmp_path / "run")}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(values))
    unknown = process("plan", "own.yaml", folder=tmp_path)
    assert (unknown.returncode, "aced --import MODULE" in unknown.stderr) == (1, True)
    done = process("--import", "json", "--import", "my_parts", "distill", "own.yaml", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    again = process("--import", "my_parts", "resume", "run", folder=tmp_path)
    assert json.loads(again.stdout.splitlines()[-1])["step"] == 2
    for name in ("my_part", ".my_parts", "my_parts.inner"):
        missing = process("--import", name, "plan", "own.yaml", folder=tmp_path)
        assert missing.returncode == 1
        assert missing.stderr.startswith("ConfigError: there is no module '")
        assert "[field: --import]" in missing.stderr
