"""An answer as a picture: one HTML file with the charting library in it, which fetches nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moedist.config import ConfigError
from moedist.config.exit_codes import ExitCode

OURS_COLOR, THEIRS_COLOR, FLOOR_COLOR = "#2f6fb3", "#b8bfc9", "#c0504d"
HEIGHT = 120
"""Pixels of a case without its bars."""
BAR = 34


class PlotError(ConfigError):
    """What the environment lacks for a plot."""

    exit_code = ExitCode.ENVIRONMENT


def write_plot(path: Path, found: Mapping[str, Any]) -> None:
    """A bar of milliseconds per contender and case, ours coloured, with the floor as a line.

    Args:
        path: a new file.
        found: the answer of ``moedist bench layer``.

    Raises:
        PlotError: plotly is not installed, or the disk refuses.
        ConfigError: there is such a file.
    """
    try:
        from plotly.graph_objects import Bar, Figure
        from plotly.subplots import make_subplots
    except ImportError:
        remedy = "Install it: pip install 'moedist[report]'."
        raise PlotError("--plot", str(path), "needs plotly, which is not installed", remedy) from None
    if path.exists():
        raise ConfigError("--plot", str(path), "is there already", "Name a file that is not there yet.")
    cases = found["cases"]
    bars = [len(case["contenders"]) + 1 for case in cases]
    figure: Figure = make_subplots(
        rows=len(cases),
        cols=1,
        subplot_titles=[title(case, found) for case in cases],
        row_heights=[BAR * count + HEIGHT for count in bars],
        vertical_spacing=0.5 * HEIGHT / sum(BAR * count + HEIGHT for count in bars) if len(cases) > 1 else 0,
    )
    for row, case in enumerate(cases, start=1):
        entries = [*reversed(case["contenders"])]
        names = [entry["name"] for entry in entries] + ["products"]
        figure.add_trace(
            Bar(
                orientation="h",
                y=names,
                x=[entry["ms"] for entry in entries] + [case["products_ms"]],
                text=[
                    f"{entry['ms']:.3g} ms, {entry['share_of_f2']:.0%} of F2, "
                    f"{'' if entry['quotable'] else 'not to be quoted: '}spread {entry['spread']:.0%}"
                    for entry in entries
                ]
                + [f"{case['products_ms']:.3g} ms"],
                marker_color=[OURS_COLOR if name.startswith("moedist") else THEIRS_COLOR for name in names],
                hoverinfo="text",
                showlegend=False,
            ),
            row=row,
            col=1,
        )
        figure.add_vline(case["floor"]["f2_ms"], line_color=FLOOR_COLOR, annotation_text="F2", row=row, col=1)
        figure.update_xaxes(title_text="ms, forward and backward", rangemode="tozero", row=row, col=1)
    figure.update_layout(
        template="plotly_white", height=sum(BAR * count + HEIGHT for count in bars), font_size=13, margin_l=170
    )
    try:
        figure.write_html(path, include_plotlyjs=True)
    except OSError as error:
        remedy = "Name a file in a folder with room."
        raise PlotError("--plot", str(path), f"cannot be written ({error.strerror})", remedy) from error


def title(case: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """What a figure must be read with."""
    factor = "dropless" if case["capacity_factor"] is None else f"capacity factor {case['capacity_factor']:g}"
    return f"{case['config']}, {case['routing']}, {factor}, {found['ranks']} x {found['device']}, {case['dtype']}"
