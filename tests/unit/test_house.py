# SPDX-License-Identifier: Apache-2.0
"""The house's own rules: style, types, layers, what an import costs, what is documented, what is pinned."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
import tomllib
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PACKAGES = ("aced_sdk", "vlm", "export")
HEAVY = (
    "torch",
    "transformers",
    "open_clip",
    "timm",
    "deepspeed",
    "peft",
    "onnx",
    "onnxruntime",
    "matplotlib",
    "numpy",
)


def run(root: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=root, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)


def sources(root: Path) -> list[Path]:
    folders = (*PACKAGES, "examples", "benchmarks", "tools", "tests")
    return [path for folder in folders for path in sorted((root / folder).rglob("*.py"))]


def test_ruff_is_content(root: Path) -> None:
    done = run(root, sys.executable, "-m", "ruff", "check", ".")
    assert done.returncode == 0, done.stdout + done.stderr


def test_types_are_strict_and_clean(root: Path) -> None:
    done = run(root, sys.executable, "-m", "mypy")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_prose_of_aced_sdk_is_plain(root: Path) -> None:
    done = run(root, sys.executable, "-m", "tools.prose", "aced_sdk")
    assert done.returncode == 0, done.stdout + done.stderr


def test_arrows_between_the_rooms_point_one_way(root: Path) -> None:
    done = run(root, str(Path(sys.executable).with_name("lint-imports")), "--no-cache")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("package", PACKAGES)
def test_an_import_is_light_and_changes_nothing(root: Path, package: str) -> None:
    code = (
        "import logging, os, sys\n"
        "before = (dict(os.environ), list(logging.root.handlers), logging.root.level)\n"
        f"import {package}\n"
        "assert before == (dict(os.environ), list(logging.root.handlers), logging.root.level), 'side effects'\n"
        f"print(*sorted({set(HEAVY)} & sys.modules.keys()))"
    )
    done = run(root, sys.executable, "-c", code)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_exists_and_is_documented(package: str) -> None:
    module = import_module(package)
    assert module.__doc__
    names = [name for name in module.__all__ if not name.startswith("_")]
    assert names
    assert set(names) <= set(dir(module))
    bare = []
    for name in names:
        value = getattr(module, name)
        if (inspect.isclass(value) or inspect.isfunction(value)) and not (value.__doc__ or "").strip():
            bare.append(name)
    assert bare == []


def test_each_file_names_its_licence_and_says_what_it_is(root: Path) -> None:
    bare = []
    for path in sources(root):
        lines = path.read_text(encoding="utf-8").splitlines()
        head = [line for line in lines[:3] if not line.startswith("#!")]
        if head[:1] != ["# SPDX-License-Identifier: Apache-2.0"] or not head[1].startswith('"""'):
            bare.append(str(path.relative_to(root)))
    assert bare == []


def test_files_stay_readable(root: Path) -> None:
    long = {str(path.relative_to(root)): n for path in sources(root) if (n := len(path.open().readlines())) > 450}
    assert long == {}


def test_nothing_unpickles_or_runs_code_of_a_model(root: Path) -> None:
    forbidden = re.compile(r"trust_remote_code\s*=\s*True|weights_only\s*=\s*False|\bimport pickle\b|allow_pickle=True")
    found = []
    for path in sources(root):
        if path.is_relative_to(root / "tests"):
            continue  # an attack in a test has to be made somehow
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if forbidden.search(line) or ("torch.load(" in line and "weights_only=True" not in line):
                found.append(f"{path.relative_to(root)}:{number}")
    assert found == []


# --- what is pinned ----------------------------------------------------------------------------------------------


def constraints(root: Path) -> dict[str, str]:
    lines = (root / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!]+", pin) for pin in pins), "only NAME==VERSION lines"
    return {canonicalize_name(pin.split("==")[0]): pin.split("==")[1] for pin in pins}


def needed(name: str, extras: frozenset[str]) -> set[tuple[str, frozenset[str]]]:
    """What a distribution asks for here, with these extras; nothing for one that is for another platform."""
    try:
        texts = distribution(name).requires or []
    except PackageNotFoundError:
        return set()
    found = set()
    for requirement in map(Requirement, texts):
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in (*extras, "")):
            found.add((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    return found


def test_constraints_pin_all_that_an_install_brings(root: Path) -> None:
    seen: set[tuple[str, frozenset[str]]] = set()
    todo = {("aced-sdk", frozenset({"dev"}))}
    while todo:
        one = todo.pop()
        seen.add(one)
        todo |= {other for other in needed(*one) if not re.match(r"nvidia-|cuda-|triton", other[0])} - seen
    wanted = {name for name, _ in seen} - {"aced-sdk", "setuptools"}
    assert len(wanted) > 30
    assert wanted - constraints(root).keys() == set()


def test_no_floor_stands_above_its_pin_and_torch_follows_its_rule(root: Path) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [text for texts in project["optional-dependencies"].values() for text in texts]
    asked = [Requirement(text) for text in (*project["dependencies"], *extras)]
    pinned = constraints(root)
    assert all(pinned[canonicalize_name(r.name)] in r.specifier for r in asked if r.name != "aced-sdk")
    torch = next(r for r in asked if r.name == "torch")
    assert "2.13.0" not in torch.specifier  # that release has a build for which no torchvision exists
    assert all(specifier.operator in (">=", "!=") for r in asked for specifier in r.specifier)


# --- the commands ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["demo", "test", "lint", "bench", "clients", "docs", "faults"])
def test_each_target_makes_its_environment_first(root: Path, target: str, tmp_path: Path) -> None:
    environment = os.environ | {"CI": "true"}
    done = subprocess.run(
        ["make", "--dry-run", "--always-make", f"VENV={tmp_path / 'venv'}", target],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=True,
    )
    lines = done.stdout.splitlines()
    install = next(
        number for number, line in enumerate(lines) if "pip install" in line and "-c constraints.txt" in line
    )
    assert "-m venv" in "".join(lines[:install])
    assert any(str(tmp_path / "venv") in line for line in lines[install + 1 :])


def test_ci_runs_the_tests(root: Path) -> None:
    script = root / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert run(root, "bash", "-n", str(script)).returncode == 0
    assert "make test" in script.read_text(encoding="utf-8")
