# SPDX-License-Identifier: Apache-2.0
"""The `aced` command: one subcommand per verb of the Python API.

It starts alike under plain python, deepspeed, torchrun, accelerate, srun and mpirun. `distill`, `resume`, `cache`
and `index` run on all ranks; the other commands run on rank 0, while the other ranks wait.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import traceback
from enum import StrEnum
from importlib.metadata import entry_points, version
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aced_sdk.errors import ConfigError, EngineError
from aced_sdk.files import one_line
from aced_sdk.reporting.progress import first_rank

if TYPE_CHECKING:
    from aced_sdk.engine import Launch

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
_OVER_RANKS = ("distill", "resume", "cache", "index")
_LAUNCHED = ("RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")  # set by a launcher


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


class Resume(StrEnum):
    """What `aced distill` does if the run's directory contains a run."""

    never = "never"
    auto = "auto"
    must = "must"


@app.command()
def distill(
    config: ConfigFile,
    resume: Annotated[
        Resume, typer.Option(help="never: refuse a directory with a run; auto: resume or start; must: resume")
    ] = Resume.never,
) -> None:
    """Distil a student and save it in the run's directory."""
    import aced_sdk

    mode: Any = resume.value
    run = aced_sdk.distill(aced_sdk.DistillConfig.from_yaml(config), resume=mode)
    _print({"directory": str(run.directory), "step": run.step} | run.metrics)


@app.command()
def resume(directory: RunFolder) -> None:
    """Resume a run from its newest checkpoint."""
    import aced_sdk

    run = aced_sdk.resume(directory)
    _print({"directory": str(run.directory), "step": run.step} | run.metrics)


@app.command()
def cache(
    model: Annotated[str, typer.Argument(help="folder or hub name of a dual encoder")],
    shards: Annotated[list[str], typer.Argument(help="tars, folders of tars, or brace patterns")],
    directory: Annotated[Path | None, typer.Option(help="output folder; default: in the cache home")] = None,
) -> None:
    """Embed a pool with a frozen model."""
    import aced_sdk

    made = aced_sdk.cache_embeddings(model=model, data=shards, directory=directory)
    _print({"directory": str(made.directory), "pairs": len(made.usable), "usable": int(made.usable.sum())})


@app.command()
def index(
    shards: Annotated[list[str], typer.Argument(help="tars, folders of tars, or brace patterns")],
    beside: Annotated[bool, typer.Option(help="keep the indexes beside the shards, not in the cache home")] = False,
    workers: Annotated[int, typer.Option(min=1, max=256, help="threads per process")] = 8,
) -> None:
    """Index the shards of a pool, so that it opens quickly. The processes of a launch share the work."""
    import aced_sdk

    pool = aced_sdk.index(shards, beside, workers)
    _print({"shards": len(pool.shards), "pairs": len(pool), "fingerprint": pool.fingerprint})


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


def _print(values: dict[str, Any]) -> None:
    """Print JSON on rank 0."""
    if first_rank():
        typer.echo(json.dumps(values))


def _launch() -> Launch | None:
    """Remove `--local_rank` from the command line and read the launch; None for a single process.

    Raises:
        EngineError: if the launch variables are contradictory.
    """
    local_rank, rest, words = None, list[str](), iter(sys.argv[1:])
    for word in words:
        name, equals, value = word.partition("=")
        if name not in ("--local_rank", "--local-rank"):
            rest.append(word)
        elif (local_rank := value if equals else next(words, None)) is None:
            raise EngineError(f"{name} has no value", remedy=f"write {name} NUMBER, or leave it out", field=name)
    sys.argv[1:] = rest
    if local_rank is None and not any(name in os.environ for name in _LAUNCHED):
        return None
    from aced_sdk.engine import read_launch

    launch = read_launch(local_rank=local_rank)
    os.environ["LOCAL_RANK"] = str(launch.local_rank)  # for later calls of `read_launch`
    return launch if launch.world_size > 1 else None


def _run_over_ranks(launch: Launch) -> None:
    import torch

    from aced_sdk.engine import Ranks

    try:
        ranks = Ranks(launch, torch.device("cpu"))
    except EngineError as error:  # no other rank can be reached, so each reports its own
        _report(error)
        raise
    with ranks.guarded(_report):
        ranks.agree_on_versions()
        words = zip(sys.argv, sys.argv[1:], strict=False)  # each word with the one before it
        command = next((word for before, word in words if not word.startswith("-") and before != "--import"), "")
        if command in _OVER_RANKS:
            _run()
        else:
            ranks.only_first(_run)
    torch.distributed.destroy_process_group()


def _run() -> None:
    """Run the command; return if it succeeds."""
    try:
        app()
    except SystemExit as ended:
        if ended.code:
            raise


def main() -> None:
    """Run the command line. vlm and export add their commands if they are installed."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # an ASCII terminal cannot print all names
    for entry in entry_points(group="aced.commands"):
        entry.load()(app)
    launch = None
    try:
        launch = _launch()
        _run() if launch is None else _run_over_ranks(launch)
    except SystemExit as ended:
        if ended.code == _INTERRUPTED:
            typer.echo("interrupted; `aced resume DIRECTORY` continues a run from its last checkpoint", err=True)
        raise
    except Exception as error:  # noqa: BLE001, it is printed
        if launch is None:
            _report(error)
        sys.exit(getattr(error, "exit_code", 1))  # after a signal, that of the run's config


def _report(error: BaseException) -> None:
    """Print an error: one line if the user can fix it, else the traceback."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:  # standard output or a temporary folder
        error = ConfigError("no space is left on the disk that is written to", remedy="free some space")
    # Errors of other packages that add commands have these attributes too.
    if hasattr(error, "remedy"):
        typer.echo(f"{type(error).__name__}: {one_line(error, 4000)}", err=True)
    elif isinstance(error, Exception):
        traceback.print_exception(error)


if __name__ == "__main__":
    main()
