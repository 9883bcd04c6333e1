# SPDX-License-Identifier: Apache-2.0
"""Run a client's script inside the client's environment: `python -P inside.py SCRIPT ARTEFACTS PACKAGE...`.

Prints one JSON line: the versions of the packages, and for each check of the script what was found or the error.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

OURS = ("aced_sdk", "export", "vlm")


class Check(NamedTuple):
    """One comparison.

    Attributes:
        artefact: the folder that the client opens.
        compared: what is compared, a key of the expected values.
        how: the client's interface.
        compute: gives the client's value: a number, a text, an array, or lists of them.
    """

    artefact: str
    compared: str
    how: str
    compute: Callable[[], Any]


def main() -> None:
    """Run the checks; an error of one does not end the others."""
    script, folder, *packages = sys.argv[1:]
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what clients print is no result
    sys.modules.update(dict.fromkeys(OURS))  # type: ignore[arg-type] # an import of this project fails
    sys.path.append(str(Path(__file__).parents[2]))
    rows: list[dict[str, Any]] = []
    try:
        for check in runpy.run_path(script)["checks"](Path(folder)):
            row = {"artefact": check.artefact, "compared": check.compared, "how": check.how}
            try:
                rows.append(row | {"found": plain(check.compute())})
            except Exception:  # noqa: BLE001
                rows.append(row | {"error": _last_error()})
    except Exception:  # noqa: BLE001
        rows.append({"artefact": "", "compared": "", "how": "", "error": _last_error()})
    out.write(json.dumps({"versions": {name: version(name) for name in packages}, "rows": rows}) + "\n")
    out.close()
    os._exit(0)  # threads of a client may never end


def plain(value: Any) -> Any:
    """Lists, numbers and texts of tensors, arrays and sequences."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
    if hasattr(value, "tolist"):
        return value.tolist()
    return [plain(part) for part in value] if isinstance(value, list | tuple) else value


def _last_error() -> str:
    traceback.print_exc()
    kind, error, _ = sys.exc_info()
    return f"{kind.__name__ if kind else ''}: {' '.join(str(error).split())}"


if __name__ == "__main__":
    main()
