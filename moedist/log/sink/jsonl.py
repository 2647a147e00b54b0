"""Metrics as JSON lines: ``<run>/metrics.jsonl``, one object per log step, never rewritten."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moedist.log.sink.contract import RunInfo, Sink, SinkConfig, Value, step_of


@dataclasses.dataclass(frozen=True)
class JsonlConfig(SinkConfig):
    """JSON lines below the run folder. NaN and infinities are the strings ``"NaN"``, ``"Infinity"``, ``"-Infinity"``,
    which JSON has no numbers for; Python's ``float`` reads them back.
    """

    def open(self, run: RunInfo, say: Callable[[str], None]) -> Sink:
        return JsonlSink(run.directory / "metrics.jsonl", say)


class JsonlSink:
    """Appends records, each flushed; rows of steps that the file already holds are marked ``"replayed": true``.

    A process killed while writing leaves half a line: opening moves it to ``metrics.jsonl.partial``, so that every line
    of the file is an object. A full disk costs rows and one warning, never the run.
    """

    def __init__(self, path: Path, say: Callable[[str], None]):
        self._path, self._say = path, say
        self._warned = False
        self._mend()
        self._held = set(_steps(path))
        self._file = path.open("ab", buffering=0)

    def write(self, record: Mapping[str, Value]) -> None:
        replayed = {"replayed": True} if step_of(record) in self._held else {}
        line = json.dumps(json_safe({**record, **replayed}), allow_nan=False).encode() + b"\n"
        begin = os.fstat(self._file.fileno()).st_size
        try:
            written = self._file.write(line)
            if written != len(line):  # a disk that fills up takes the first part without an error
                raise OSError(f"{written} of {len(line)} bytes written")
        except OSError as error:
            self._file.truncate(begin)
            if not self._warned:
                self._warned = True
                self._say(
                    f"Warning: {self._path} misses rows from step {step_of(record)} on: {error}. Free some "
                    "space; the run goes on."
                )

    def say(self, line: str) -> None:
        """Text is for people; this file holds metrics only."""

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
