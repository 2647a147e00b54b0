"""Metrics for Trackio: a dashboard on this machine without an account (``trackio show --project moedist``)."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moedist.log.earlier import earlier_records
from moedist.log.run_files import read_metrics
from moedist.log.series import Row, Series, Tables
from moedist.log.sink.contract import RunInfo, Sink, SinkConfig, Value, need_package, step_of


@dataclasses.dataclass(frozen=True)
class TrackioConfig(SinkConfig):
    """Trackio's local database; nothing leaves the machine. Needs ``pip install 'moedist[trackio]'``.

    Attributes:
        project: where the run stands.
        dir: folder of the database; None for Trackio's own, which all its projects share (TRACKIO_DIR).
    """

    project: str = "moedist"
    dir: str | None = None

    def check(self) -> None:
        need_package("trackio", extra="trackio")

    def open(self, run: RunInfo, say: Callable[[str], None]) -> Sink:
        return TrackioSink(self, run, say)


class TrackioSink(Sink):
    """Series over ``train/step``; load and kept of each layer as histograms, one bar per expert; columns without room
    as tables at the end. Steps that an earlier process of the run has sent are not sent again; those that it lost are
    sent first.
    """

    def __init__(self, config: TrackioConfig, run: RunInfo, say: Callable[[str], None]):
        if config.dir is not None:
            os.environ["TRACKIO_DIR"] = str(Path(config.dir).expanduser().absolute())  # read when it is imported
        with _quiet():
            import trackio
            from trackio.sqlite_storage import SQLiteStorage

            self._library: Any = trackio
            name = f"{run.name}-{run.run_id}"
            self._run: Any = trackio.init(
                project=config.project,
                name=name,
                group=run.group_id,
                config={**run.config, "environment": dict(run.environment)},
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
            logs = SQLiteStorage.get_logs(config.project, name)
        self._held = {log["train/step"] for log in logs if "train/step" in log}
        self._series, self._tables = Series(run.max_scalar_keys), Tables(read_metrics(run.directory))
        for record in earlier_records(run):
            self._send(step_of(record), Series(run.max_scalar_keys).row(record))
        say(f"Trackio: trackio show --project {config.project}" + (f" (in {config.dir})" if config.dir else ""))

    def write(self, record: Mapping[str, Value]) -> None:
        row, step = self._series.row(record), step_of(record)
        self._tables.add(step, row)
        self._send(step, row)

    def _send(self, step: int, row: Row) -> None:
        if step not in self._held:
            bars = {key: self._bars(count_E) for key, count_E in row.histograms.items()}
            self._run.log({**row.scalars, **bars}, step=step)

    def alert(self, title: str, text: str) -> None:
        with _quiet():
            self._run.alert(title=title, text=text)

    def close(self, status: str) -> None:
        with _quiet():
            tables = {
                key: self._library.Table(columns=list(part.columns), data=part.rows)
                for key, part in self._tables.flush().items()
            }
            if tables:
                self._run.log(tables)
            self._run.finish()

    def _bars(self, count_E: np.ndarray) -> Any:
        return self._library.Histogram(np_histogram=(count_E, np.arange(len(count_E) + 1)))


def _quiet() -> contextlib.AbstractContextManager[Any]:
    """Keeps the library's own lines from the run's."""
    return contextlib.redirect_stdout(io.StringIO())
