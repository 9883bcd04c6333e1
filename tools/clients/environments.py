# SPDX-License-Identifier: Apache-2.0
"""One small environment per client, made once, under `ACED_HOME/clients/NAME`.

A client gets the versions that it asks for, as pip resolves them. The site-packages of the project's own environment
are last on its path, and pip does not install again what fits of them: torch and its CUDA libraries, several gigabytes,
exist once. A client that needs another torch cannot be installed.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path

SCRIPTS = Path(__file__).with_name("scripts")
_SECONDS = 900
_ONE_COPY = ("torch", "torchvision")


class NotInstallable(Exception):
    """The registry or the machine lacks what a client needs; the message says what."""


@dataclass(frozen=True)
class Client:
    """A client and what it is called with.

    Attributes:
        name: of its environment, and of its script without another `script`.
        requirements: what is installed; the newest release where no version is named.
        packages: distributions whose versions are reported.
        script: a Python script, or one for Node (.mjs) of a client from npm.
    """

    name: str
    requirements: tuple[str, ...]
    packages: tuple[str, ...]
    script: Path

    @property
    def node(self) -> bool:
        """Whether it runs under Node."""
        return self.script.suffix == ".mjs"


def command(client: Client, home: Path, artefacts: Path) -> tuple[list[str], Path]:
    """Make a client's environment if it is not there, or was made from other versions.

    Args:
        client: the client.
        home: the folder of all environments.
        artefacts: the folder that the client is called on.

    Returns:
        The command that runs its script, and the folder to run it in.

    Raises:
        NotInstallable: if its packages cannot be had.
    """
    folder = home / client.name
    state = json.dumps([client.requirements, sys.version, sys.prefix, [] if client.node else _installed()])
    ready = folder / ".ready"
    if not ready.is_file() or ready.read_text(encoding="utf-8") != state:
        shutil.rmtree(folder, ignore_errors=True)
        (_make_node if client.node else _make_python)(folder, client.requirements)
        ready.write_text(state, encoding="utf-8")
    if client.node:
        return ["node", str(client.script), str(artefacts)], folder
    python = folder / Path(sysconfig.get_path("scripts", "venv", {"base": str(folder)})).name / "python"
    inside = Path(__file__).with_name("inside.py")
    return [str(python), "-P", str(inside), str(client.script), str(artefacts), *client.packages], artefacts


def _installed() -> list[str]:
    """The project's own packages, on which pip's choice depends."""
    return sorted({f"{one.metadata['Name']}=={one.version}" for one in distributions()})


def _make_python(folder: Path, requirements: tuple[str, ...]) -> None:
    _call([sys.executable, "-m", "venv", "--without-pip", str(folder)])
    packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))
    (packages / "zz_project.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    constraints = folder / "constraints.txt"
    constraints.write_text("".join(f"{name}=={found}\n" for name in _ONE_COPY if (found := _version(name))))
    python = Path(sysconfig.get_path("scripts", "venv", {"base": str(folder)})) / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-cache-dir", "--no-compile", "--quiet"]
    _call([*pip, "--upgrade", "--constraint", str(constraints), *requirements])


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _make_node(folder: Path, requirements: tuple[str, ...]) -> None:
    if not shutil.which("node") or not shutil.which("npm"):
        raise NotInstallable("Node.js with npm is not installed")
    folder.mkdir(parents=True)
    # the libraries of its graphs are inside the packages; scripts would fetch others from elsewhere
    quiet = ["--ignore-scripts", "--no-audit", "--no-fund", "--loglevel", "error"]
    _call(["npm", "install", *requirements, *quiet], folder)


def _call(words: list[str], folder: Path | None = None) -> None:
    try:
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise NotInstallable(f"the installation took more than {_SECONDS} s") from None
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line.lower()]
        raise NotInstallable(errors[-1] if errors else done.stderr[-300:])
