"""A run's numbers for tests: records and rows with a key for each layer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moedist.log.metrics import EXPERTS, LAYERS
from moedist.log.run_files import ExpertsFile, read_metrics
from moedist.log.series import BLOCK, histograms, of_layers

TIMED = ("train/tokens_per_s", "train/tflops", "train/mfu", "train/memory_gib", "train/data_wait")


def flat(record: Mapping[str, Any]) -> dict[str, Any]:
    """``moe/layer_01/max_vio`` from a column, and as lists ``moe/layer_01/load`` and ``kept`` from arrays."""
    found: dict[str, Any] = {}
    blocks = record.get(BLOCK, [])
    for key, value in record.items():
        if isinstance(value, np.ndarray):
            found |= {key: bars.tolist() for key, bars in histograms(blocks, {key: value})}
        elif key.startswith(f"{LAYERS}/") and key != BLOCK:
            found |= of_layers(key, blocks, value)
        else:
            found[key] = value
    return found


def read_rows(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of ``metrics.jsonl``, with what ``experts.bin`` has of their steps."""
    experts = ExpertsFile(run_dir)
    arrays = {step: {f"{EXPERTS}/{k}": v for k, v in experts.at(step).items()} for step in experts.steps}
    return [flat(row | arrays.get(row["train/step"], {})) for row in read_metrics(run_dir)]


def of_no_clock(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a step that is done again must say again."""
    return {k: v for k, v in row.items() if k not in (*TIMED, "replayed") and not k.startswith("time/")}
