"""Metrics for TensorBoard, below ``<run>/tensorboard``: ``tensorboard --logdir runs`` shows them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moedist.log.earlier import earlier_records
from moedist.log.series import Row, Series
from moedist.log.sink.contract import RunInfo, Sink, SinkConfig, Value, need_package, step_of

FOLDER = "tensorboard"
PROOF = "train/loss"
"""A series that every record has: the steps that it holds are held."""


@dataclasses.dataclass(frozen=True)
class TensorboardConfig(SinkConfig):
    """TensorBoard's event files. Needs ``pip install 'moedist[tensorboard]'``."""

    def check(self) -> None:
        need_package("tensorboard", extra="tensorboard")

    def open(self, run: RunInfo, say: Callable[[str], None]) -> Sink:
        return TensorboardSink(run, say)


class TensorboardSink(Sink):
    """Series over ``train/step``; load and kept of each layer as histograms, one bar per expert.

    Steps that an earlier process of the run has written are not written again; those that it lost are written first.
    Columns that found no room as series are in ``metrics.jsonl`` only: TensorBoard has no tables.
    """

    def __init__(self, run: RunInfo, say: Callable[[str], None]):
        from torch.utils.tensorboard import SummaryWriter

        folder = run.directory / FOLDER
        self._held, self._say, self._told = held_steps(folder), say, False
        self._series = Series(run.max_scalar_keys)
        self._writer: Any = SummaryWriter(str(folder), flush_secs=10)
        for record in earlier_records(run):
            self._write(step_of(record), Series(run.max_scalar_keys).row(record))

    def write(self, record: Mapping[str, Value]) -> None:
        row, step = self._series.row(record), step_of(record)
        if row.tables and not self._told:
            self._told = True
            self._say(
                f"TensorBoard has no tables: {len(row.tables)} quantities of layers are in metrics.jsonl only; raise "
                "log.max_scalar_keys for more series."
            )
        self._write(step, row)

    def _write(self, step: int, row: Row) -> None:
        if step in self._held:
            return
        for key, value in row.scalars.items():
            if isinstance(value, str):
                self._writer.add_text(key, value, step)
            else:
                self._writer.add_scalar(key, value, step)
        for key, count_E in row.histograms.items():
            self._writer.add_histogram_raw(key, **bars(count_E), global_step=step)

    def alert(self, title: str, text: str) -> None:
        self._writer.add_text("alert", f"{title}: {text}")

    def close(self, status: str) -> None:
        self._writer.close()


def bars(count_E: np.ndarray) -> dict[str, Any]:
    """Counts by expert as TensorBoard's histogram of expert ids: bar e reaches up to e + 1."""
    ids_E = np.arange(len(count_E)) + 0.5
    return {
        "min": 0.0,
        "max": float(len(count_E)),
        "num": int(count_E.sum()),
        "sum": float((count_E * ids_E).sum()),
        "sum_squares": float((count_E * ids_E**2).sum()),
        "bucket_limits": [float(expert + 1) for expert in range(len(count_E))],
        "bucket_counts": count_E.tolist(),
    }


def held_steps(folder: Path) -> set[int]:
    """The steps that event files below a folder hold; none where there is no such folder."""
    if not folder.is_dir():
        return set()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {event.step for event in events.Scalars(PROOF)} if PROOF in events.Tags()["scalars"] else set()
