"""The W&B dashboard of a run as code: which panels, of which keys; only those that the run has."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from moedist.log.metrics import EXPERTS
from moedist.log.run_files import ExpertsFile, read_metrics
from moedist.log.series import HISTOGRAMS, Row, Series, layer_key

X_AXIS = "train/step"
RUN_PANELS: dict[str, dict[str, tuple[str, ...]]] = {
    "Loss": {
        "Loss, nats per token": ("train/loss", "eval/loss"),
        "Balance losses in the objective": ("moe/balance_loss_scaled", "moe/z_loss_scaled"),
        "Gradient norm": ("train/grad_norm",),
        "Learning rates": ("train/lr_router", "train/lr_experts", "train/lr_other"),
    },
    "Balance": {
        "MaxVio, worst layer": ("moe/max_vio", "moe/max_vio_micro"),
        "Load: variation": ("moe/load_cv",),
        "Load entropy": ("moe/load_entropy",),
        "Dead experts": ("moe/dead_experts",),
        "Balance loss, unscaled": ("moe/balance_loss",),
        "Bias drift": ("moe/bias_drift",),
    },
    "Drops": {
        "Drop rate": ("moe/drop_rate",),
        "Capacity used": ("moe/capacity_used",),
        "Dropped pairs by reason": ("moe/dropped_full", "moe/dropped_exhausted", "moe/dropped_barred"),
    },
    "Router": {
        "Router entropy": ("moe/router_entropy",),
        "Largest probability": ("moe/top_probability",),
        "z-loss, unscaled": ("moe/z_loss",),
        "Norms of experts": ("moe/expert_weight_norm", "moe/expert_grad_norm"),
    },
    "Throughput": {
        "Tokens per second": ("train/tokens_per_s",),
        "MFU": ("train/mfu",),
        "TFLOP/s": ("train/tflops",),
        "Seconds of a step": ("time/compute", "time/exchange", "time/optimizer", "time/data", "time/other"),
        "Waiting for data": ("train/data_wait",),
        "Imbalance of ranks": ("time/compute_imbalance", "moe/exchange_imbalance"),
        "Exchanged bytes": ("moe/exchange_bytes",),
        "Memory, GiB": ("train/memory_gib",),
    },
}
"""Panels of numbers of the whole run."""
SWEPT = ("moe.num_experts", "moe.router.top_k", "moe.capacity.factor", "moe.balance.switch.coefficient", "mesh.ep")
"""Keys of the configuration that a comparison of runs begins with."""
OUTCOMES = ("eval/loss", "train/loss", "moe/drop_rate", "moe/max_vio", "train/tokens_per_s")
"""What it ends with."""


@dataclasses.dataclass(frozen=True)
class Panel:
    """One chart.

    Attributes:
        title: for people.
        kind: ``lines`` over steps, ``heat`` (a histogram over steps: expert x step), ``table`` (layer x step), or
            ``runs``: parallel coordinates, a line per run.
        keys: of the tracker.
        config_keys: of the configuration; with ``runs``.
    """

    title: str
    kind: Literal["lines", "heat", "table", "runs"]
    keys: tuple[str, ...]
    config_keys: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Section:
    """Panels under one heading."""

    name: str
    panels: tuple[Panel, ...]


def row_of_run(run: Path, max_scalar_keys: int) -> Row:
    """What the tracker has of a run folder: every key that any of its steps has."""
    rows, experts = read_metrics(run), ExpertsFile(run)
    record = {key: value for row in rows for key, value in row.items() if key != "replayed"}
    arrays = experts.at(experts.steps[-1]) if experts.steps else {}
    return Series(max_scalar_keys).row(record | {f"{EXPERTS}/{name}": array for name, array in arrays.items()})


def plan_dashboard(row: Row, config_keys: Sequence[str]) -> list[Section]:
    """Sections of panels for runs like the one that ``row`` is of.

    Args:
        row: see `row_of_run`.
        config_keys: dotted keys of the run's configuration.
    """
    sections = [Section(name, tuple(_of_run(row, panels))) for name, panels in RUN_PANELS.items()]
    sections.append(Section("Layers", tuple(_of_layers(row))))
    for name in HISTOGRAMS:
        heat = [_heat(row, block, name) for block in row.blocks]
        sections.append(Section(f"{name.capitalize()} of experts", tuple(panel for panel in heat if panel.keys)))
    swept = tuple(key for key in SWEPT if key in config_keys)
    outcomes = tuple(key for key in OUTCOMES if key in row.scalars)
    sections.append(Section("Runs compared", (Panel("Choices and outcomes", "runs", outcomes, swept),)))
    return [section for section in sections if section.panels]


def _of_run(row: Row, panels: dict[str, tuple[str, ...]]) -> Iterator[Panel]:
    for title, keys in panels.items():
        if known := tuple(key for key in keys if key in row.scalars):
            yield Panel(title, "lines", known)


def _of_layers(row: Row) -> Iterator[Panel]:
    """A chart of every quantity of layers that has series, and a table of every other."""
    first = layer_key(row.blocks[0], "") if row.blocks else None
    names = [key.removeprefix(first) for key in row.scalars if first is not None and key.startswith(first)]
    for name in (name for name in names if "/" not in name):
        yield Panel(f"{name} by layer", "lines", tuple(layer_key(block, name) for block in row.blocks))
    for key in row.tables:
        yield Panel(f"{key.rpartition('/')[2]} by layer", "table", (key,))


def _heat(row: Row, block: int, name: str) -> Panel:
    key = layer_key(block, name)
    return Panel(f"Layer {block:02d}: {name}, expert x step", "heat", (key,) if key in row.histograms else ())


def build_workspace(sections: Sequence[Section], entity: str, project: str, name: str) -> Any:
    """A workspace of W&B's own library; ``save()`` sends it. Needs ``pip install 'moedist[dashboard]'``."""
    from wandb_workspaces import workspaces

    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=[
            workspaces.Section(name=section.name, panels=[_chart(panel) for panel in section.panels], is_open=True)
            for section in sections
        ],
        settings=workspaces.WorkspaceSettings(x_axis=X_AXIS),
    )


def _chart(panel: Panel) -> Any:
    from wandb_workspaces.reports import v2

    if panel.kind == "table":
        return v2.WeavePanelSummaryTable(table_name=panel.keys[0])
    if panel.kind == "runs":
        columns = [v2.ParallelCoordinatesPlotColumn(metric=v2.Config(key)) for key in panel.config_keys]
        columns += [v2.ParallelCoordinatesPlotColumn(metric=v2.SummaryMetric(key)) for key in panel.keys]
        return v2.ParallelCoordinatesPlot(title=panel.title, columns=columns)
    return v2.LinePlot(title=panel.title, x=X_AXIS, y=list(panel.keys))
