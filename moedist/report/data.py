"""What the page is told of its runs, as plain JSON."""

from __future__ import annotations

import base64
import datetime
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moedist.log.run_files import ExpertsFile
from moedist.report.run import Run, number
from moedist.report.sweep import Sweep

MAX_ROWS = 5000
"""Rows of a run that the page draws; of a longer run every second, third, ..."""
MAX_CELLS = 2_000_000
"""Numbers of maps of experts in a page, over all runs; beyond it each run shows some of its steps, evenly spread."""
ARRAYS = ("load", "kept", "weight_norm", "grad_norm")
"""Of ``experts.bin``; drops are what ``load`` has more than ``kept``."""
LAYERS, ATTENTION_LAYERS = "moe/layers/", "attention/layers/"
STEP, TOKENS = "train/step", "train/tokens"


def page_data(runs: Sequence[Run], sweeps: Sequence[Sweep] = ()) -> dict[str, Any]:
    """Everything that the page shows."""
    now = datetime.datetime.now().astimezone()
    return {
        "title": runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
        "made": now.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "runs": [run_data(run, label, MAX_CELLS // len(runs)) for run, label in zip(runs, labels(runs), strict=True)],
        "varied": list(dict.fromkeys(key for sweep in sweeps for key in sweep.keys)),
        "notes": [note for sweep in sweeps for note in sweep.absent],
    }


def labels(runs: Sequence[Run]) -> list[str]:
    """What tells the runs apart: their names, or their folders' names, or their folders."""
    ways = [[run.name for run in runs], [run.path.absolute().name for run in runs], [str(run.path) for run in runs]]
    return next((way for way in ways if len(set(way)) == len(way)), ways[-1])


def run_data(run: Run, label: str, max_cells: int) -> dict[str, Any]:
    """One run."""
    stride = max(1, math.ceil(len(run.rows) / MAX_ROWS))
    rows = [row for place, row in enumerate(run.rows) if place % stride == 0 or place == len(run.rows) - 1]
    notes = list(run.notes())
    if stride > 1:
        notes.append(f"Lines show one of every {stride} of the {len(run.rows):,} rows.")
    steps = spread(run.experts, max_cells)
    if len(steps) < len(run.experts.steps):
        notes.append(f"Maps show {len(steps)} of the {len(run.experts.steps):,} steps that experts.bin holds.")
    keys = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in (STEP, "replayed")]
    of_layers = (LAYERS, ATTENTION_LAYERS)
    scalars = {key: [short(row.get(key)) for row in rows] for key in keys if not key.startswith(of_layers)}
    return {
        "name": label,
        "path": str(run.path),
        "state": run.state,
        "step": run.step,
        "num_steps": run.num_steps,
        "notes": notes,
        "steps": [row[STEP] for row in rows],
        "scalars": {key: values for key, values in scalars.items() if any(value is not None for value in values)},
        "blocks": run.blocks,
        "columns": columns_data(rows, keys, LAYERS),
        "experts": experts_data(run.experts, steps),
        "attention": attention_data(run, rows, keys, max_cells),
        "config": texts(run.config),
        "environment": texts(run.environment),
    }


def texts(mapping: Mapping[str, Any]) -> dict[str, str]:
    """Values as people read them."""
    return {key: value if isinstance(value, str) else json.dumps(value, default=str) for key, value in mapping.items()}


def attention_data(
    run: Run, rows: Sequence[Mapping[str, Any]], keys: Sequence[str], max_cells: int
) -> Mapping[str, Any] | None:
    """What takes the place of the run's own layers where those of its attention are shown; None without any."""
    columns = columns_data(rows, keys, ATTENTION_LAYERS)
    if not columns:
        return None
    blocks = next(row[f"{ATTENTION_LAYERS}block"] for row in reversed(rows) if f"{ATTENTION_LAYERS}block" in row)
    experts = experts_data(run.attention_experts, spread(run.attention_experts, max_cells))
    return {"blocks": blocks, "columns": columns, "experts": experts}


def columns_data(rows: Sequence[Mapping[str, Any]], keys: Sequence[str], prefix: str) -> dict[str, Any]:
    """Columns over layers, a number for each layer in every row, by what follows ``prefix`` in their keys."""
    names = [key.removeprefix(prefix) for key in keys if key.startswith(prefix) and key != f"{prefix}block"]
    columns = {name: [column(row.get(f"{prefix}{name}")) for row in rows] for name in names}
    return {name: values for name, values in columns.items() if any(values)}


def spread(experts: ExpertsFile, max_cells: int) -> list[int]:
    """Steps of ``experts.bin`` that fit, evenly spread, the first and the last among them."""
    if not experts.steps:
        return []
    cells = len(ARRAYS) * experts.at(experts.steps[0])["load"].size
    room = max(2, max_cells // cells)
    if len(experts.steps) <= room:
        return list(experts.steps)
    places = np.linspace(0, len(experts.steps) - 1, room).round().astype(int)
    return [experts.steps[place] for place in dict.fromkeys(places.tolist())]


def experts_data(experts: ExpertsFile, steps: Sequence[int]) -> Mapping[str, Any] | None:
    """[S, L, E] arrays of these steps."""
    if not steps:
        return None
    arrays = {name: experts.stack(name, steps) for name in ARRAYS if name in experts.names}
    _, _, num_experts = arrays["load"].shape
    return {
        "steps": list(steps),
        "blocks": list(experts.blocks),
        "num_experts": num_experts,
        "arrays": {name: packed(array) for name, array in arrays.items()},
    }


def packed(array: np.ndarray) -> dict[str, str]:
    """An array as base64 of little-endian ``int32`` or ``float32``."""
    dtype = "int32" if np.issubdtype(array.dtype, np.integer) else "float32"
    content = np.ascontiguousarray(array, np.dtype(dtype).newbyteorder("<")).tobytes()
    return {"dtype": dtype, "base64": base64.b64encode(content).decode()}


def short(value: Any) -> float | None:
    """A number to seven digits; None for what is none."""
    found = number(value)
    return float(f"{found:.7g}") if isinstance(found, float) else found


def column(values: Any) -> list[float | None] | None:
    """A number for each layer."""
    return [short(value) for value in values] if isinstance(values, list) else None
