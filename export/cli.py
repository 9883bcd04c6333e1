# SPDX-License-Identifier: Apache-2.0
"""The `aced export` command."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from export.onnx.report import ExportReport


class Target(StrEnum):
    """What `aced export` writes."""

    onnx = "onnx"
    transformers = "transformers"
    timm = "timm"
    vlm_vision = "vlm-vision"


class PartName(StrEnum):
    """What a graph computes."""

    vision = "vision"
    text = "text"
    both = "both"
    patches = "patches"


class PrecisionName(StrEnum):
    """A number format."""

    fp32 = "fp32"
    fp16 = "fp16"
    int8 = "int8"


_TAKEN: dict[Target, frozenset[str]] = {
    Target.onnx: frozenset(
        {"part", "precision", "opset", "min_cosine", "int8_cosine", "calibration", "pictures", "texts"}
        | {"preprocess_in_graph", "task", "max_zero_shot_drop", "measure"}
    ),
    Target.transformers: frozenset({"part", "onnx"}),
    Target.timm: frozenset(),
    Target.vlm_vision: frozenset({"precision", "opset", "int8_cosine", "calibration"}),
}
"""Of each layout, the options that mean something for it; any other is refused."""


def register(app: typer.Typer) -> None:
    """Add `export` to the `aced` command."""
    app.command("export")(_export)


def _export(
    context: typer.Context,
    student: Annotated[
        Path | None, typer.Argument(help="saved student folder; for vlm-vision a vision-language model's")
    ] = None,
    directory: Annotated[Path | None, typer.Argument(help="folder to write")] = None,
    to: Annotated[Target, typer.Option(help="layout of the folder")] = Target.onnx,
    part: Annotated[list[PartName] | None, typer.Option(help="may be repeated; vision and text if left out")] = None,
    precision: Annotated[
        list[PrecisionName] | None,
        typer.Option(help="may be repeated; if left out all, for vlm-vision fp32"),
    ] = None,
    opset: Annotated[int, typer.Option(help="ONNX operator set")] = 20,
    min_cosine: Annotated[float, typer.Option(help="fp16 and int8 below this cosine to torch are refused")] = 0.99,
    int8_cosine: Annotated[
        float | None,
        typer.Option(help="what int8 keeps on calibration inputs; 0.999, of a vlm-vision 0.99"),
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="folder of pictures like those of your use", exists=True, file_okay=False)
    ] = None,
    pictures: Annotated[
        Path | None, typer.Option(help="folder of pictures to compare on as well", exists=True, file_okay=False)
    ] = None,
    texts: Annotated[
        Path | None, typer.Option(help="file of texts to compare on as well, one a line", exists=True, dir_okay=False)
    ] = None,
    onnx: Annotated[Path | None, typer.Option(help="ONNX export to lay into a transformers folder")] = None,
    preprocess_in_graph: Annotated[bool, typer.Option(help="pixel_values are uint8 [N, H, W, 3]")] = False,
    task: Annotated[list[Path] | None, typer.Option(help="task folder to compare on, may be repeated")] = None,
    max_zero_shot_drop: Annotated[
        float | None, typer.Option(help="fp16 and int8 that lose more of a task, as a share, are refused")
    ] = None,
    measure: Annotated[bool, typer.Option(help="take times")] = True,
    verify: Annotated[
        Path | None, typer.Option(help="check this ONNX folder again instead; with STUDENT also against torch")
    ] = None,
) -> None:
    """Export a student: ONNX with verified parity, a folder of transformers or timm, or the vision tower of its VLM."""
    given = {
        name
        for name in context.params
        if (source := context.get_parameter_source(name)) and source.name == "COMMANDLINE"
    }
    if verify is not None:
        _refuse(given - {"verify", "student"}, "--verify")
        _verify(verify, student)
        return
    if student is None or directory is None:
        raise typer.BadParameter("give STUDENT and DIRECTORY, or --verify FOLDER")
    _refuse(given - {"student", "directory", "to"} - _TAKEN[to], f"--to {to}")
    limit: Any = {} if int8_cosine is None else {"int8_cosine": int8_cosine}
    if to in (Target.transformers, Target.timm):
        import export

        if to is Target.timm:
            facts = export.to_timm(student, directory).model_dump()
        else:
            if part and not (len(part) == 1 and part[0] in (PartName.vision, PartName.both)):
                raise typer.BadParameter("--part is vision or both with --to transformers")
            whole: Any = part[0].value if part else "both"
            facts = export.to_transformers(student, directory, whole, onnx).model_dump()
        for name, value in facts.items():
            typer.echo(f"{name:28} {value:.1e}" if isinstance(value, float) else f"{name:28} {value}")
    elif to is Target.vlm_vision:
        from export.onnx.vlm_vision import vlm_vision_to_onnx

        wanted: Any = [p.value for p in precision or [PrecisionName.fp32]]
        tower = vlm_vision_to_onnx(
            student, directory, precisions=wanted, calibration=_files(calibration), opset=opset, **limit
        )
        for graph in tower.graphs:
            typer.echo(f"{graph.precision:8}{graph.bytes / 1e6:8.1f} MB  max abs {graph.max_abs:.1e}")
    else:
        from aced_sdk.files import read_text
        from export.onnx.save import to_onnx

        report = to_onnx(
            student,
            directory,
            [p.value for p in part or (PartName.vision, PartName.text)],
            [p.value for p in precision or PrecisionName],
            opset=opset,
            min_cosine=min_cosine,
            calibration=_files(calibration),
            pictures=_files(pictures),
            texts=read_text(texts).splitlines() if texts else (),
            preprocess_in_graph=preprocess_in_graph,
            tasks=task or (),
            max_zero_shot_drop=max_zero_shot_drop,
            measure=measure,
            **limit,
        )
        _print(report)
    typer.echo(f"written to {directory}")


def _refuse(options: set[str], beside: str) -> None:
    if options:
        names = ", ".join(sorted(f"--{name.replace('_', '-')}" for name in options))
        raise typer.BadParameter(f"{names} means nothing with {beside}; leave it out")


def _files(folder: Path | None) -> list[Path]:
    found = sorted(path for path in folder.iterdir() if path.is_file()) if folder else []
    if folder and not found:
        raise typer.BadParameter(f"the folder {folder} holds no files; put pictures there")
    return found


def _print(report: ExportReport) -> None:
    typer.echo(f"{'part':8}{'format':8}{'MB':>8}{'max abs':>10}{'min cosine':>12}{'ms at 1':>9}{'ms at 32':>10}")
    for graph in report.graphs:
        times = [f"{graph.latency_ms[n]:.2f}" if n in graph.latency_ms else "-" for n in (1, 32)]
        typer.echo(
            f"{graph.part:8}{graph.precision:8}{graph.bytes / 1e6:8.1f}{graph.max_abs:10.1e}"
            f"{graph.min_cosine:12.5f}{times[0]:>9}{times[1]:>10}"
        )
    for part_name, own in report.torch_latency_ms.items():
        typer.echo(f"{part_name:8}{'torch':8}{'':30}{own[1]:9.2f}{own[32]:10.2f}")
    for graph in report.graphs:
        if graph.quantised:
            kept, nodes = len(graph.quantised.kept_float), graph.quantised.nodes
            typer.echo(f"{graph.part} int8: {graph.quantised.method}, {nodes} nodes, {kept} kept in float for accuracy")
    for precision_name, changes in report.changes().items():
        for name, change in changes.items():
            typer.echo(f"{name} {precision_name}: {report.tasks[precision_name][name]:.4f} ({change:+.4f} to torch)")


def _verify(folder: Path, student: Path | None) -> None:
    from export.runtime.parity import kind_of

    if kind_of(folder) == "onnx_vlm_vision":
        from export.onnx.vlm_vision import check_vlm_vision

        check_vlm_vision(folder)
        typer.echo(f"{folder} is whole")
        return
    if student is not None:
        from export.onnx.save import verify

        _print(verify(folder, student))
    else:
        from export.runtime.parity import verify_folder

        typer.echo(f"{'part':8}{'format':8}{'max abs':>10}{'on export':>11}{'min cosine':>12}{'on export':>11}")
        for one in verify_folder(folder):
            typer.echo(
                f"{one.part:8}{one.precision:8}{one.max_abs:10.1e}{one.reported_max_abs:11.1e}"
                f"{one.min_cosine:12.5f}{one.reported_min_cosine:11.5f}"
            )
    typer.echo(f"{folder} is whole and agrees with its student")
