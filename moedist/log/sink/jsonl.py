"""Metrics as files of the run folder, only ever appended to: ``metrics.jsonl``, one object per log step, and
``experts.bin``, the arrays over layers and experts (`moedist.log.run_files` reads both)."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moedist.config import require
from moedist.log import metrics
from moedist.log.run_files import ATTENTION_EXPERTS, EXPERTS, METRICS, append_frame
from moedist.log.sink.contract import RunInfo, Sink, SinkConfig, Value, step_of

FRAMES = 500
"""How many steps of a run ``experts.bin`` holds, unless its interval is given: some tens of megabytes at 48 x 128."""
FILES = {metrics.MOE: EXPERTS, metrics.ATTENTION: ATTENTION_EXPERTS}
"""Where the arrays of each family of routed layers go."""
DIGITS = 6
"""Significant digits of the numbers in a column; those of the whole run are kept whole."""


@dataclasses.dataclass(frozen=True)
class JsonlConfig(SinkConfig):
    """JSON lines below the run folder, and the arrays over experts beside them. NaN and infinities are the strings
    ``"NaN"``, ``"Infinity"``, ``"-Infinity"``, which JSON has no numbers for; Python's ``float`` reads them back.

    Attributes:
        experts_every: steps between two frames of ``experts.bin``, at log steps; None for a five-hundredth of the run.
    """

    experts_every: int | None = None

    def __post_init__(self) -> None:
        require(
            self.experts_every is None or self.experts_every >= 1,
            "experts_every",
            self.experts_every,
            "is no number of steps",
            "Set 1 or more, or null.",
        )

    def open(self, run: RunInfo, say: Callable[[str], None]) -> Sink:
        every = self.experts_every or max(1, run.num_steps // FRAMES)
        return JsonlSink(run.directory, say, every, run.num_steps)


class JsonlSink(Sink):
    """Appends records, each flushed; rows of steps that the file already holds are marked ``"replayed": true``.

    Such a step has its arrays in ``experts.bin`` twice too, and its reader takes the last.

    A process killed while writing leaves half a line: opening moves it to ``metrics.jsonl.partial``, so that every line
    of the file is an object. A full disk costs rows and one warning, never the run.
    """

    def __init__(self, folder: Path, say: Callable[[str], None], experts_every: int = 1, num_steps: int | None = None):
        self._path, self._say, self._every, self._num_steps = folder / METRICS, say, experts_every, num_steps
        self._warned = False
        self._mend()
        self._held = set(_steps(self._path))
        self._file = self._path.open("ab", buffering=0)
        self._frames_done = -1

    def write(self, record: Mapping[str, Value]) -> None:
        replayed = {"replayed": True} if step_of(record) in self._held else {}
        row = {key: _short(value) for key, value in record.items() if not isinstance(value, np.ndarray)}
        line = json_line({**row, **replayed})
        begin = os.fstat(self._file.fileno()).st_size
        try:
            written = self._file.write(line)
            if written != len(line):  # a disk that fills up takes the first part without an error
                raise OSError(f"{written} of {len(line)} bytes written")
        except OSError as error:
            self._file.truncate(begin)
            self._warn(self._path, record, error)
        try:
            self._write_experts(record)
        except OSError as error:
            self._warn(self._path.with_name(EXPERTS), record, error)

    def _write_experts(self, record: Mapping[str, Value]) -> None:
        """A frame at the first log step of every interval, and at the last step."""
        step = step_of(record)
        due = step // self._every
        if due == self._frames_done and step != self._num_steps:
            return
        for family, name in FILES.items():
            blocks, prefix = record.get(f"{family}/layers/block"), f"{family}/experts/"
            named = ((key, value) for key, value in record.items() if key.startswith(prefix))
            arrays = {key.removeprefix(prefix): value for key, value in named if isinstance(value, np.ndarray)}
            if isinstance(blocks, list):
                self._frames_done = due
                append_frame(self._path.with_name(name), step, blocks, arrays)

    def _warn(self, path: Path, record: Mapping[str, Value], error: OSError) -> None:
        if not self._warned:
            self._warned = True
            self._say(
                f"Warning: {path} misses rows from step {step_of(record)} on: {error}. Free some "
                "space; the run goes on."
            )

    def close(self, status: str) -> None:
        self._file.close()

    def _mend(self) -> None:
        """Ends the file with a whole line: completes it where only the newline is missing, else moves it aside."""
        if not self._path.exists():
            return
        text = self._path.read_bytes()
        whole, _, rest = text.rpartition(b"\n")
        if not rest:
            return
        if _is_object(rest):
            with self._path.open("ab") as file:
                file.write(b"\n")
            return
        with self._path.with_name(self._path.name + ".partial").open("ab") as file:
            file.write(rest + b"\n")
        os.truncate(self._path, len(text) - len(rest))
        self._say(f"{self._path} ended in half a row (a killed run); moved it to {self._path.name}.partial.")


def _short(value: Value) -> Value:
    """A column with few digits; other values as they are."""
    if not isinstance(value, list):
        return value
    return [float(f"{number:.{DIGITS}g}") if isinstance(number, float) else number for number in value]


def json_line(row: Mapping[str, Value]) -> bytes:
    """One line of the file; the look at every number is for rows that need it."""
    try:
        return json.dumps(row, allow_nan=False).encode() + b"\n"
    except ValueError:
        return json.dumps(json_safe(row), allow_nan=False).encode() + b"\n"


def json_safe(value: Any) -> Any:
    """``value`` with NaN and infinities as strings, at any depth."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {key: json_safe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_safe(item) for item in value]
    return value


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _steps(path: Path) -> list[int]:
    """The steps whose rows a file of whole lines holds."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        return [json.loads(line).get("train/step") for line in file if _is_object(line)]
