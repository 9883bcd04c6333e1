# SPDX-License-Identifier: Apache-2.0
"""The `aced` command: one subcommand per verb of the Python API. It can be launched by deepspeed, torchrun or srun."""

from __future__ import annotations

import errno
import json
import os
import sys
from importlib.metadata import entry_points, version
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated

import typer

from aced_sdk.errors import ConfigError
from aced_sdk.files import one_line

app = typer.Typer(
    name="aced",
    help="Distil efficient vision encoders with active data curation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
ConfigFile = Annotated[Path, typer.Argument(help="a DistillConfig as YAML")]
_INTERRUPTED = 130  # typer's exit code after Ctrl-C
RunFolder = Annotated[Path, typer.Argument(help="folder of a run")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"aced-sdk {version('aced-sdk')}")
        raise typer.Exit


@app.callback()
def _options(
    _wanted: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version and exit")
    ] = False,
    modules: Annotated[
        list[str] | None,
        typer.Option(
            "--import",
            metavar="MODULE",
            help="import a module of your own first; from the working folder or installed; repeatable",
        ),
    ] = None,
) -> None:
    from aced_sdk.config.base import import_named

    if modules:
        sys.path.append(os.getcwd())
    for module in modules or ():
        try:
            import_named(module, "name a module in the working folder or an installed one")
        except ConfigError as error:
            raise error.under("--import") from None


@app.command()
def distill(config: ConfigFile) -> None:
    """Distil a student and save it in the run's directory."""
    import aced_sdk

    run = aced_sdk.distill(aced_sdk.DistillConfig.from_yaml(config))
    typer.echo(json.dumps({"directory": str(run.directory), "step": run.step} | run.metrics))


@app.command()
def resume(directory: RunFolder) -> None:
    """Resume a run from its newest checkpoint."""
    import aced_sdk

    run = aced_sdk.resume(directory)
    typer.echo(json.dumps({"directory": str(run.directory), "step": run.step} | run.metrics))


@app.command()
def cache(
    model: Annotated[str, typer.Argument(help="folder or hub name of a dual encoder")],
    shards: Annotated[list[str], typer.Argument(help="tars, folders of tars, or brace patterns")],
    directory: Annotated[Path | None, typer.Option(help="output folder; default: in the cache home")] = None,
) -> None:
    """Embed a pool with a frozen model."""
    import aced_sdk

    made = aced_sdk.cache_embeddings(model=model, data=shards, directory=directory)
    typer.echo(
        json.dumps({"directory": str(made.directory), "pairs": len(made.usable), "usable": int(made.usable.sum())})
    )


@app.command()
def evaluate(
    student: Annotated[Path, typer.Argument(help="folder of a student")],
    data_root: Annotated[Path, typer.Option(help="folder with one folder per task")],
    tasks: Annotated[str, typer.Option(help="comma-separated task names")] = "stable_eval",
) -> None:
    """Evaluate zero-shot classification and retrieval on held-out tasks."""
    import aced_sdk

    typer.echo(json.dumps(aced_sdk.evaluate(student, tasks.split(","), data_root).to_dict()))


@app.command()
def plan(config: ConfigFile) -> None:
    """Estimate the cost of a run without starting it."""
    import aced_sdk

    typer.echo(str(aced_sdk.plan(aced_sdk.DistillConfig.from_yaml(config))))


@app.command()
def report(directory: RunFolder) -> None:
    """Write report.html from a run's event log."""
    import aced_sdk

    typer.echo(one_line(aced_sdk.report(directory), 4096))


def main() -> None:
    """Run the command line. vlm and export add their commands if they are installed."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # an ASCII terminal cannot print all names
    for entry in entry_points(group="aced.commands"):
        entry.load()(app)
    try:
        app()
    except SystemExit as ended:
        if ended.code == _INTERRUPTED:
            typer.echo("interrupted; `aced resume DIRECTORY` continues a run from its last checkpoint", err=True)
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:  # standard output or a temporary folder
            error = ConfigError("no space is left on the disk that is written to", remedy="free some space")
        # Errors of other packages that add commands have these attributes too.
        if not hasattr(error, "remedy"):
            raise
        typer.echo(f"{type(error).__name__}: {one_line(error, 4000)}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
