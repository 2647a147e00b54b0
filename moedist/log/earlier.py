"""What earlier processes of a run have logged, for sinks that lost some of it when such a process was killed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moedist.log.metrics import EXPERTS
from moedist.log.run_files import ExpertsFile, read_metrics
from moedist.log.sink.contract import RunInfo, Value, step_of

NOT_FINITE = ("NaN", "Infinity", "-Infinity")
"""How ``metrics.jsonl`` writes numbers that JSON has not."""


def earlier_records(run: RunInfo) -> Iterator[dict[str, Value]]:
    """The records of the steps that this run has behind it, in their order, as ``metrics.jsonl`` has them: columns with
    fewer digits than sinks got, and arrays where ``experts.bin`` has them. A run without that file has none.
    """
    rows = {step_of(row): row for row in read_metrics(run.directory)}
    steps = [step for step in sorted(rows) if run.began_step < step <= run.resumed_step]
    experts = ExpertsFile(run.directory)
    for step in steps:
        record: dict[str, Value] = {key: _number(value) for key, value in rows[step].items() if key != "replayed"}
        arrays_LE = experts.at(step) if step in experts.steps else {}
        yield record | {f"{EXPERTS}/{name}": array_LE for name, array_LE in arrays_LE.items()}


def _number(value: Any) -> Any:
    """``value`` with numbers for what stands for them, in columns too."""
    if isinstance(value, list):
        return [_number(each) for each in value]
    return float(value) if value in NOT_FINITE else value
