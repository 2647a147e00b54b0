"""Runs below a folder, with how they stand and their last figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moedist.config import ConfigError
from moedist.report.run import Run, is_run, read_run

FIGURES = {
    "train loss": ("train/loss", ".3f"),
    "eval loss": ("eval/loss", ".3f"),
    "drop rate": ("moe/drop_rate", ".2%"),
    "MaxVio": ("moe/max_vio", ".2f"),
    "tokens/s": ("train/tokens_per_s", ",.0f"),
}
"""Columns: metric and format."""


def find_runs(folder: Path) -> list[Run]:
    """The run that a folder is, or those below it, those of sweeps among them, by name.

    Raises:
        ConfigError: it is no folder.
    """
    if not folder.is_dir():
        raise ConfigError(
            "FOLDER", str(folder), "is no folder", "Name the folder that holds your runs, or make one: moedist train."
        )
    found = [folder] if is_run(folder) else [*folder.iterdir(), *folder.glob("*/*")]
    return [read_run(path) for path in sorted(found) if path.is_dir() and is_run(path)]


def facts(run: Run) -> dict[str, Any]:
    """A run for scripts."""
    return {
        "path": str(run.path),
        "name": run.name,
        "state": run.state,
        "step": run.step,
        "num_steps": run.num_steps,
        **{key: run.last(key) for key, _ in FIGURES.values()},
    }


def table(runs: Sequence[Run], folder: Path) -> Iterator[str]:
    """Runs for people, a line each."""
    rows = [("run", "state", "step", *FIGURES)]
    for run in runs:
        inside = run.path.relative_to(folder) if run.path != folder else run.path
        of = "" if run.num_steps is None else f"/{run.num_steps:,}"
        figures = [(run.last(key), form) for key, form in FIGURES.values()]
        shown = ["" if value is None else format(value, form) for value, form in figures]
        rows.append((str(inside), run.state, f"{run.step:,}{of}", *shown))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        cells[:2] = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
        yield "  ".join(cells).rstrip()
