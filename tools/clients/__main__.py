# SPDX-License-Identifier: Apache-2.0
"""Call outside clients on this project's artefacts and compare what they compute with what this project computes.

    python -m tools.clients [--only NAME ...] [--output FILE]

Each client runs in a process and an environment of its own (`tools.clients.environments`) on artefacts made here
(`tools.clients.artefacts`). The result is one table in JSON; the exit status is 1 if a row is not ok.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from aced_sdk.files import alone, home
from tools.clients.environments import SCRIPTS, Client, NotInstallable, command
from tools.clients.expected import Expectations, difference

_SECONDS = 900
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def _client(name: str, *requirements: str, packages: tuple[str, ...] = (), script: str = "") -> Client:
    first = re.split(r"[\[=<>~]", requirements[0])[0]
    return Client(name, requirements, (first, *packages), SCRIPTS / (script or f"{name}.py"))


CLIENTS = (
    _client("clip_benchmark", "clip-benchmark==1.6.2", "numpy<2.4"),  # float() of an array of one, which 2.4 refuses
    _client("fastembed", "fastembed"),
    _client("infinity", "infinity-emb[torch,vision]", "aiohttp", packages=("transformers",)),
    _client("lmms_eval", "lmms-eval", "decord", packages=("transformers",)),
    _client("onnxruntime", "onnxruntime"),
    _client("open_clip", "open_clip_torch"),
    _client("openvino", "openvino"),
    _client("optimum_onnx", "optimum-onnx[onnxruntime]==0.1.0", packages=("transformers",)),
    _client("peft", "peft", "transformers>=5", packages=("transformers",)),
    _client("peft_transformers4", "peft", "transformers==4.57.*", packages=("transformers",), script="peft.py"),
    _client("sentence_transformers", "sentence-transformers", packages=("transformers",)),
    _client("timm", "timm"),
    _client("transformers4", "transformers==4.57.*", script="transformers.py"),
    _client("transformers5", "transformers>=5", script="transformers.py"),
    Client("transformers_js", ("@huggingface/transformers",), (), SCRIPTS / "transformers_js.mjs"),
)


def call(client: Client, environments: Path, artefacts: Path, expected: Expectations) -> list[dict[str, Any]]:
    """The rows of one client.

    Args:
        client: the client.
        environments: the folder of all environments.
        artefacts: the folder of all artefacts.
        expected: what this project computes.
    """
    row: dict[str, Any] = {"client": client.name, "version": None, "artefact": "", "compared": "", "how": ""}

    def without_result(status: str, reason: str) -> list[dict[str, Any]]:
        return [row | {"largest_difference": None, "status": status, "reason": clean(reason, artefacts)}]

    try:
        with alone(environments, "environments of clients", wait=True):
            words, folder = command(client, environments, artefacts)
    except NotInstallable as error:
        return without_result("not installable", str(error))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | _OFFLINE
    try:
        done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return without_result("failed", f"no result after {_SECONDS} s")
    try:
        found = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return without_result("failed", f"no result: {done.stderr.decode(errors='replace').strip()[-300:]}")
    row["version"] = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return [row | compare(one, expected, artefacts) for one in found["rows"]]


def compare(found: dict[str, Any], expected: Expectations, artefacts: Path) -> dict[str, Any]:
    """The end of a row, from what a client's script gave for it."""
    row = {key: found[key] for key in ("artefact", "compared", "how")} | {"largest_difference": None}
    if "error" in found:
        return row | {"status": "failed", "reason": clean(found["error"], artefacts)}
    value, bound = expected[found["artefact"], found["compared"]]
    distance = difference(found["found"], value)
    if distance == float("inf"):
        return row | {"status": "failed", "reason": "not a number, or another shape"}
    row["largest_difference"] = float(f"{distance:.1e}")
    return row | ({"status": "ok"} if distance <= bound else {"status": "failed", "reason": f"more than {bound:.0e}"})


def clean(reason: str, artefacts: Path) -> str:
    """A message without addresses and without this machine's paths."""
    for path, name in ((artefacts, "ARTEFACTS"), (home(), "ACED_HOME"), (Path(sys.prefix), "VENV"), (Path.home(), "~")):
        reason = reason.replace(str(path), name)
    reason = re.sub(r"\w+://[^\s'\"]+|host='[^']*'", "ADDRESS", reason)
    return reason if len(reason) <= 300 else f"{reason[:300]}..."


def table(head: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """One JSON object, a line for each row."""
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    return f'{json.dumps(head, indent=1)[:-2]},\n "rows": [\n{lines}\n ]\n}}\n'


def report(client: Client, rows: list[dict[str, Any]]) -> None:
    """Print how many rows of a client are ok, and each reason of the others with its rows."""
    print(f"{client.name} ({rows[0]['version']}): {sum(row['status'] == 'ok' for row in rows)} of {len(rows)} ok")
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row["status"] != "ok":
            where = ", ".join(filter(None, (row["artefact"], row["compared"], row["how"])))
            reasons.setdefault(f"{row['status']}: {row['reason']}", []).append(where)
    for reason, places in reasons.items():
        print(f"  {reason}", *places, sep="\n    ", flush=True)


def main() -> None:
    """Print what failed and how many rows are ok, and write the table."""
    parser = argparse.ArgumentParser(description="outside clients on this project's artefacts")
    names = [client.name for client in CLIENTS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--output", type=Path, help="write the table to this file")
    arguments = parser.parse_args()
    os.environ.update(_OFFLINE)  # before transformers is imported

    from benchmarks.machine import machine
    from tools.clients import artefacts

    start = time.monotonic()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch).resolve()
        expected = artefacts.make(folder)
        for client in CLIENTS:
            if client.name in arguments.only:
                found = call(client, home() / "clients", folder, expected)
                rows += found
                report(client, found)
    if arguments.output:
        head = {"benchmark": "clients", "seconds": round(time.monotonic() - start)} | machine("cpu")
        arguments.output.write_text(table(head, rows), encoding="utf-8")
    sys.exit(any(row["status"] != "ok" for row in rows))


if __name__ == "__main__":
    main()
