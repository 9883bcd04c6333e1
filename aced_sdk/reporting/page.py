# SPDX-License-Identifier: Apache-2.0
"""Functions for self-contained HTML pages: one file, no scripts, no network access."""

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
"""Line colours in order. Together with the markers they are distinguishable with colour blindness."""

_ALARM = "#c92a2a"
_MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")


def write_page(target: Path, template: str, *, folders: Sequence[Path] = (), **values: Any) -> Path:
    """Render a template and write the page atomically.

    Args:
        target: the HTML file.
        template: file name of a Jinja template; it usually extends `page.html.j2`.
        folders: folders of templates, searched before this package's templates.
        values: variables of the template; text is escaped, `Markup` is not.

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
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # file names may not be UTF-8
    except OSError as error:
        cause = f"cannot write {printable(target)}: {error.strerror}"
        raise ConfigError(cause, remedy="check permissions and space, or remove what has that name") from error
    return target


def percent(share: float | None, digits: int = 1) -> str:
    """Format a fraction in 0..1 as a percentage; None as a dash."""
    return "–" if share is None else f"{100 * share:.{digits}f} %"


def count(number: float | None) -> str:
    """Format a whole number with thin spaces between thousands; None as a dash."""
    return "–" if number is None else f"{round(number):,}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def duration(seconds: float | None) -> str:
    """Format seconds as `8.2 s`, `3 min 05 s` or `2 h 10 min`; None as a dash."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def image_uri(picture: Image.Image | str | Path) -> str:
    """Encode a picture or picture file as PNG in a `data:` URI.

    Raises:
        DataError: if the picture cannot be read or saved as PNG.
    """
    from aced_sdk.processing.plain import PictureError, open_picture

    try:
        return _data_uri(open_picture(picture), "png", optimize=True)
    except (PictureError, OSError) as error:
        name = printable(picture) if isinstance(picture, str | Path) else "the picture"
        raise DataError(f"{name} cannot be shown: {printable(error)}", remedy="leave it out") from error


def thumbnail_uri(picture: Image.Image, side: int = 144) -> str:
    """Encode a picture as a WebP thumbnail in a `data:` URI; its longer side is at most `side` pixels.

    Raises:
        ValueError: if the picture cannot be converted to RGB.
    """
    small = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
    small.thumbnail((side, side))
    return _data_uri(small, "webp", quality=75)


def _data_uri(picture: Image.Image, kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, **options)
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode()


def figure_svg(figure: Figure, label: str) -> Markup:
    """Convert a matplotlib figure to inline SVG that scales with the page.

    Args:
        figure: a `matplotlib.figure.Figure`; pyplot is not needed.
        label: description for screen readers.
    """
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Type", "Format"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    svg = text[text.index("<svg") :]
    return Markup('<svg role="img" aria-label="{}"').format(label) + Markup(svg.removeprefix("<svg"))


@contextmanager
def _own_style() -> Iterator[None]:
    """Use matplotlib's default style.

    On import, matplotlib reads a style file from the working folder, which may be untrusted.
    """
    spec = find_spec("matplotlib")
    if "matplotlib" not in sys.modules and os.path.lexists("matplotlibrc") and spec and spec.origin:
        with chdir(Path(spec.origin).parent / "mpl-data"):  # the folder of its default style
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
    """Draw a line chart as inline SVG.

    Args:
        lines: name to points (x, y).
        label: description for screen readers.
        x: label of the horizontal axis, with its unit.
        y: label of the vertical axis, with its unit.
        colours: name to colour; default: the next of `PALETTE`.
        dashed: names of dashed lines, such as a base rate.
        bands: name of a line to shaded areas (x, low, high) around it.
        marks: vertical lines, x to a label.
        as_percent: y values are fractions in 0..1, shown as percentages.
        from_zero: start the vertical axis at zero.
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
    """Escape a name for matplotlib: no formulas, no control characters."""
    return one_line(name).replace("$", r"\$")


def _short_number(value: float, _position: int | None = None) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"
