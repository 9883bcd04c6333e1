# SPDX-License-Identifier: Apache-2.0
"""The whole product on real data: distil, plug into a language model, export, show. Stopped, it goes on from there."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from aced_sdk.errors import ConfigError
from aced_sdk.files import ReadError, alone, home, printable, read_json, write_json
from aced_sdk.reporting import Stages
from aced_sdk.reporting.run_bar import RunBar
from examples.quickstart import stages
from examples.quickstart.box.fetch import locked
from examples.quickstart.page import render_page
from examples.quickstart.settings import Settings, methods

T = TypeVar("T")
NAMES = ["data", "reference", "distil", "vlm", "onnx", "page"]
VERSIONS = ("aced-sdk", "torch", "open_clip_torch", "transformers", "peft", "deepspeed", "onnxruntime", "timm")


def run_demo(settings: Settings) -> dict[str, Any]:
    """Run what is left of the demo; returns what summary.json holds.

    Raises:
        ConfigError: if the directory holds a demo of other settings, or one that is running.
        AcedError: whatever a stage may meet.
    """
    directory = settings.directory
    with alone(directory, "the demo"), Stages(NAMES, title="demo", plain=True) as show:
        _claim(settings)
        done = _Done(directory / "stages")
        # The first two have their own caches; they are quick where those are filled.
        with show.stage("data", unit="parts"), RunBar("data") as inner:
            box, models = done.timed("data", lambda: stages.get_data(settings, inner.watch))
        # Demos of other settings share what this one keeps there.
        with show.stage("reference", unit="parts"), RunBar("reference") as inner, locked(home()):
            reference = done.timed("reference", lambda: stages.get_reference(settings, box, models, inner.watch))
        total = settings.steps * len(settings.seeds) * (len(methods(settings)) + 1)
        with show.stage("distil", total) as bar:
            figures = done.once("distil", lambda: stages.distil(settings, box, reference, bar.advance))
        with show.stage("vlm", settings.align_steps + settings.adapt_steps) as bar:
            vlm = done.once("vlm", lambda: stages.tune_vlm(settings, box, models, bar.advance))
        with show.stage("onnx", 6, "parts") as bar:
            onnx = done.once("onnx", lambda: stages.export_onnx(settings, box, bar.advance))
        with show.stage("page", unit="parts"):
            summary = _summary(settings, figures, vlm, onnx, done.seconds())
            write_json(directory / "summary.json", summary)
            from examples.quickstart.pictures import collect

            render_page(summary, collect(settings, box, vlm, onnx), directory / "report.html")
    return summary


def _claim(settings: Settings) -> None:
    path = settings.directory / "settings.yaml"
    if path.is_file() and Settings.from_yaml(path) != settings:
        raise ConfigError(
            f"{settings.directory} holds a demo of other settings",
            remedy="remove the folder, or give another directory",
            field="directory",
        )
    settings.to_yaml(path)


class _Done:
    """Results of finished stages, a JSON file each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def once(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        path = self.folder / f"{name}.json"
        if path.is_file():
            return _value(path, "result", dict[str, Any])
        started = time.perf_counter()
        result = work()
        # Through JSON in both cases, so that a resumed demo sees what an unbroken one does.
        write_json(path, {"seconds": time.perf_counter() - started, "result": result})
        return _value(path, "result", dict[str, Any])

    def timed(self, name: str, work: Callable[[], T]) -> T:
        started = time.perf_counter()
        result = work()
        path = self.folder / f"{name}.json"
        if not path.is_file():
            write_json(path, {"seconds": time.perf_counter() - started})
        return result

    def seconds(self) -> dict[str, float]:
        values = {path.stem: _value(path, "seconds", float) for path in self.folder.glob("*.json")}
        ordered = {name: round(values[name], 1) for name in NAMES if name in values}
        return ordered | {"total": round(sum(values.values()), 1)}


def _value(path: Path, name: str, kind: type[T]) -> T:
    """A value of a stage's file.

    Raises:
        ConfigError: if the file is damaged.
    """
    try:
        value = TypeAdapter(kind).validate_python(read_json(path)[name])
        if isinstance(value, float) and not math.isfinite(value):
            raise TypeError
        return value
    except (ReadError, LookupError, TypeError, ValidationError) as error:
        cause = error.cause if isinstance(error, ReadError) else f"{printable(path)} holds no '{name}'"
        raise ConfigError(cause, remedy="delete the file: its stage is done again", field="directory") from None


def _part(stage: str, found: dict[str, Any], *names: str) -> dict[str, Any]:
    try:
        return {name: found[name] for name in names}
    except KeyError as error:
        cause = f"the results of the stage '{stage}' hold no {error}"
        raise ConfigError(cause, remedy="delete the stage's file: it is done again", field="directory") from None


def _summary(
    settings: Settings, figures: dict[str, Any], vlm: dict[str, Any], onnx: dict[str, Any], seconds: dict[str, float]
) -> dict[str, Any]:
    return {
        "methods": figures,
        "vlm": _part("vlm", vlm, "accuracy", "blind_accuracy", "kinds", "samples"),
        "onnx": _part("onnx", onnx, "max_abs_diff", "zero_shot_torch", "zero_shot_onnx", "zero_shot_by_precision"),
        "seconds": seconds,
        "seed": settings.seeds[0],
        "seeds": list(settings.seeds),
        "versions": {name: version(name) for name in VERSIONS},
    }
