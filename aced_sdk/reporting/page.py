# SPDX-License-Identifier: Apache-2.0
"""Building blocks of self-contained HTML pages: one file, no script, nothing fetched when it is opened."""

from __future__ import annotations

import base64
import io
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from aced_sdk.errors import ConfigError, DataError
from aced_sdk.files import one_line, printable, whole_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image

Band = Sequence[tuple[float, float, float]]

_TEMPLATES = Path(__file__).parent / "templates"

PALETTE = ("#0b7285", "#d9480f", "#5f3dc4", "#2b8a3e", "#868e96", "#c2255c", "#1864ab", "#e67700")
"""Line colours in their order; told apart also by those who see fewer colours, with the marks beside them."""

_ALARM = "#c92a2a"
_MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")


def write_page(target: Path, template: str, *, folders: Sequence[Path] = (), **values: Any) -> Path:
    """Render a template and write the page, whole or not at all.

    Args:
        target: the HTML file.
        template: file name of a Jinja template; it usually extends `page.html.j2`.
        folders: where to look for templates before this package's own.
        values: what the template shows; text is escaped, `Markup` is not.

    Returns:
        `target`.

    Raises:
        ConfigError: if it cannot be written.
    """
    environment = Environment(
        loader=FileSystemLoader([*folders, _TEMPLATES]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "count": count, "duration": duration}
    text = environment.get_template(template).render(values)
    try:
        with whole_file(target) as temporary:
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # names of files need not be UTF-8
    except OSError as error:
        cause = f"cannot write {printable(target)}: {error.strerror}"
        raise ConfigError(cause, remedy="check permissions and space, or remove what has that name") from error
    return target


def percent(share: float | None, digits: int = 1) -> str:
    """A share in 0..1 as a percentage; a dash for None."""
    return "–" if share is None else f"{100 * share:.{digits}f} %"


def count(number: float | None) -> str:
    """A whole number with a thin space between thousands; a dash for None."""
    return "–" if number is None else f"{round(number):,}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def duration(seconds: float | None) -> str:
    """Seconds as a person says them: `8.2 s`, `3 min 05 s`, `2 h 10 min`; a dash for None."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def image_uri(picture: Image.Image | str | Path) -> str:
    """A picture (or the file of one) as a `data:` address holding a PNG.

    Raises:
        DataError: if it cannot be read, or PNG has no form for it.
    """
    from aced_sdk.processing.plain import PictureError, open_picture

    try:
        return _data_uri(open_picture(picture), "png", optimize=True)
    except (PictureError, OSError) as error:
        name = printable(picture) if isinstance(picture, str | Path) else "the picture"
        raise DataError(f"{name} cannot be shown: {printable(error)}", remedy="leave it out") from error


def thumbnail_uri(picture: Image.Image, side: int = 144) -> str:
    """A picture as a `data:` address holding a WebP whose longer side is at most `side` pixels: a few kilobytes.

    Raises:
        ValueError: if the picture has no RGB form.
    """
    small = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
    small.thumbnail((side, side))
    return _data_uri(small, "webp", quality=75)


def _data_uri(picture: Image.Image, kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, **options)
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode()


def figure_svg(figure: Figure, label: str) -> Markup:
    """A matplotlib figure as inline SVG that scales with the page.

    Args:
        figure: made from `matplotlib.figure.Figure`; pyplot and its global state are not needed.
        label: what it shows, for those who cannot see it.
    """
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Type", "Format"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    svg = text[text.index("<svg") :]
    return Markup('<svg role="img" aria-label="{}"').format(label) + Markup(svg.removeprefix("<svg"))


@contextmanager
def _own_style() -> Iterator[None]:
    """Matplotlib's defaults.

    When it is imported, it reads a style from the working folder, which may be a stranger's.
    """
    spec = find_spec("matplotlib")
    if "matplotlib" not in sys.modules and os.path.lexists("matplotlibrc") and spec and spec.origin:
        with chdir(Path(spec.origin).parent / "mpl-data"):  # where its defaults are
            import matplotlib  # noqa: F401
    try:
        from matplotlib import rc_context, rcParamsDefault
    except ValueError as error:  # MPLBACKEND names none
        cause = f"matplotlib cannot be imported: {printable(error)}"
        raise ConfigError(cause, remedy="unset MPLBACKEND") from error

    with rc_context(rcParamsDefault):
        yield


@_own_style()
def line_chart(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    *,
    label: str,
    x: str,
    y: str,
    colours: Mapping[str, str] | None = None,
    dashed: Sequence[str] = (),
    bands: Mapping[str, Sequence[Band]] | None = None,
    marks: Mapping[float, str] | None = None,
    as_percent: bool = False,
    from_zero: bool = True,
) -> Markup:
    """Lines over one axis as inline SVG.

    Args:
        lines: name to points (x, y).
        label: description of the chart.
        x: label of the horizontal axis, with its unit.
        y: label of the vertical axis, with its unit.
        colours: name to colour; a name without one takes the next of `PALETTE`.
        dashed: names of lines to draw dashed, such as a base rate.
        bands: name of a line to the areas (x, low, high) to shade around it.
        marks: upright lines: x to a word written beside it.
        as_percent: y values are shares in 0..1 and are shown times 100.
        from_zero: the vertical axis begins at zero.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figure = Figure(figsize=(5.6, 3.5), layout="constrained")
    axes = figure.add_subplot()
    unit = 100 if as_percent else 1
    for number, (name, points) in enumerate(lines.items()):
        xs, ys = [point[0] for point in points], [point[1] * unit for point in points]
        colour = (colours or {}).get(name, PALETTE[number % len(PALETTE)])
        for band in (bands or {}).get(name, ()):
            low, high = [point[1] * unit for point in band], [point[2] * unit for point in band]
            axes.fill_between([point[0] for point in band], low, high, color=colour, alpha=0.16, linewidth=0)
        few = len(points) <= 40
        axes.plot(
            xs,
            ys,
            label=_label(name),
            color=colour,
            linestyle="--" if name in dashed else "-",
            linewidth=1.8,
            marker=_MARKS[number % len(_MARKS)] if few and name not in dashed else None,
            markersize=4,
        )
    axes.set_xlabel(_label(x), fontsize=9.5, color="#495057")
    axes.set_ylabel(_label(y), fontsize=9.5, color="#495057")
    axes.tick_params(labelsize=9, colors="#495057", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(_short_number))
    axes.yaxis.set_major_formatter(FuncFormatter(_short_number))
    if from_zero:
        axes.set_ylim(bottom=0)
    for place, word in (marks or {}).items():
        axes.axvline(place, color=_ALARM, linewidth=1.2, linestyle=":")
        axes.annotate(
            _label(word), (place, 1), xycoords=("data", "axes fraction"), xytext=(3, -9), textcoords="offset points",
            fontsize=8.5, color=_ALARM,
        )  # fmt: skip
    axes.grid(axis="y", color="#e9ecef", linewidth=0.9)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#ced4da")
    if len(lines) > 1:
        figure.legend(loc="outside upper left", ncols=min(len(lines), 4), fontsize=9, frameon=False, handlelength=1.6)
    return figure_svg(figure, label)


def _label(name: str) -> str:
    """A name as matplotlib draws it: no formula, no control characters."""
    return one_line(name).replace("$", r"\$")


def _short_number(value: float, _position: int | None = None) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"
