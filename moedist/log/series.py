"""A record as the series of trackers that keep one per key, within a bound on their number."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from moedist.log.metrics import FAMILIES, LAYERS, MOE
from moedist.log.sink.contract import Value

Scalar = float | int | str | bool

BLOCK = f"{LAYERS}/block"
MAX_ROWS = 10_000
"""Of a table: where W&B stops to draw one."""
RUN_KEYS = 50
"""Room that is kept for numbers of the whole run, before any layer gets a key of its own."""
HISTOGRAMS = ("load", "kept")
"""Arrays over experts that every layer has as a histogram."""
FIRST = ("drop_rate", "max_vio", "load_entropy", "router_entropy", "dead_experts", "balance_loss", "z_loss")
"""Quantities of layers in the order in which they get keys; the others follow in the order of the record."""


@dataclasses.dataclass(frozen=True)
class Row:
    """What a tracker gets of one record.

    Attributes:
        scalars: one series each.
        histograms: one bar per expert by global id: ``moe/layer_00/load``.
        tables: columns over layers that found no room as series: ``moe/layers/max_vio``.
        blocks_by_family: the blocks that the columns of each family of routed layers are of.
    """

    scalars: dict[str, Scalar]
    histograms: dict[str, np.ndarray]
    tables: dict[str, Sequence[float]]
    blocks_by_family: Mapping[str, Sequence[int]]

    @property
    def blocks(self) -> Sequence[int]:
        """Those of MoE layers."""
        return self.blocks_by_family[MOE]


class Series:
    """Cuts records into rows of at most ``max_scalar_keys`` series, the same ones at every step.

    Numbers of the whole run come first. A quantity of layers (``moe/layer_00/max_vio``) gets keys for all layers or for
    none: where they don't fit, its columns go into a table, so nothing is dropped. Where all of them fit, arrays over
    experts (``moe/layer_00/expert_003/load``) get what is left, each for all layers and experts or for none.
    """

    def __init__(self, max_scalar_keys: int):
        self.max_scalar_keys = max_scalar_keys
        self._chosen: set[str] | None = None

    def row(self, record: Mapping[str, Value]) -> Row:
        """One record."""
        blocks = {family: blocks_of(record, family) for family in FAMILIES}
        lists = {key: value for key, value in record.items() if isinstance(value, list)}
        columns = {key: value for key, value in lists.items() if not key.endswith("/layers/block")}
        arrays = {key: value for key, value in record.items() if isinstance(value, np.ndarray)}
        scalars = {key: value for key, value in record.items() if isinstance(value, (float, int, str, bool))}
        if self._chosen is None and any(blocks.values()):
            self._chosen = self._choose(columns, arrays)
        chosen = self._chosen or set()
        for key in [key for key in columns if key in chosen]:
            scalars |= of_layers(key, blocks[family_of(key)], columns[key])
        for key in [key for key in arrays if key in chosen]:
            scalars |= of_experts(key, blocks[family_of(key)], arrays[key])
        return Row(
            scalars=scalars,
            histograms={k: v for family, own in blocks.items() for k, v in histograms(own, arrays, family)},
            tables={key: column for key, column in columns.items() if key not in chosen},
            blocks_by_family=blocks,
        )

    def _choose(self, columns: Mapping[str, Sequence[float]], arrays: Mapping[str, np.ndarray]) -> set[str]:
        """The columns and arrays that get keys."""
        room = self.max_scalar_keys - RUN_KEYS
        order = {f"{LAYERS}/{name}": place for place, name in enumerate(FIRST)}
        chosen = set()
        for key in sorted(columns, key=lambda key: order.get(key, len(order))):
            if len(columns[key]) <= room:
                chosen.add(key)
                room -= len(columns[key])
        for key, array in arrays.items() if chosen == columns.keys() else ():
            if array.size <= room:
                chosen.add(key)
                room -= array.size
        return chosen


@dataclasses.dataclass(frozen=True)
class Table:
    """A quantity of all layers over steps: ``train/step`` and a column per layer; a row per step."""

    columns: Sequence[str]
    rows: list[list[float]]


class Tables:
    """Columns over layers that found no room as series, collected into a table per quantity.

    Trackers draw the first `MAX_ROWS` rows of a table, so a longer one goes on as another,
    ``moe/layers/max_vio.part2``.

    Args:
        rows: of earlier processes of the run, as ``metrics.jsonl`` has them.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]] = ()):
        self._earlier = list(rows)
        self._columns: dict[str, dict[int, Sequence[float]]] = {}
        self._blocks: Mapping[str, Sequence[int]] = {}
        self._changed_since = 0
        self.waiting = 0

    def add(self, step: int, row: Row) -> None:
        """A step's columns; of a step that comes twice the last."""
        if not row.tables:
            return
        if not self._columns:
            for key in row.tables:
                self._columns[key] = {each["train/step"]: each[key] for each in self._earlier if key in each}
            self._earlier.clear()
        self._blocks = row.blocks_by_family
        for key, column in row.tables.items():
            self._columns.setdefault(key, {})[step] = column
        self.waiting += 1

    def flush(self) -> dict[str, Table]:
        """The tables that have changed since the last flush, whole."""
        found = {}
        for key, column_of in self._columns.items():
            names = ["train/step", *(f"layer_{block:02d}" for block in self._blocks[family_of(key)])]
            rows = [[step, *map(float, column_of[step])] for step in sorted(column_of)]
            for begin in range(0, len(rows), MAX_ROWS):
                part = rows[begin : begin + MAX_ROWS]
                if part[-1][0] > self._changed_since:
                    name = key if begin == 0 else f"{key}.part{begin // MAX_ROWS + 1}"
                    found[name] = Table(names, part)
        self._changed_since = max((step for column_of in self._columns.values() for step in column_of), default=0)
        self.waiting = 0
        return found


def family_of(key: str) -> str:
    """``moe`` of ``moe/layers/max_vio``."""
    return key.partition("/")[0]


def blocks_of(record: Mapping[str, Value], family: str = MOE) -> list[int]:
    """The blocks of a record's columns; empty for a model without such layers."""
    blocks = record.get(f"{family}/layers/block", [])
    assert isinstance(blocks, list)
    return blocks


def layer_key(block: int, name: str, family: str = MOE) -> str:
    """``moe/layer_07/max_vio``."""
    return f"{family}/layer_{block:02d}/{name}"


def of_layers(key: str, blocks: Sequence[int], column: Sequence[float]) -> dict[str, Scalar]:
    """A column as series: ``moe/layers/max_vio`` becomes ``moe/layer_00/max_vio`` and so on."""
    family, _, name = key.split("/", 2)
    return {layer_key(block, name, family): value for block, value in zip(blocks, column, strict=True)}


def of_experts(key: str, blocks: Sequence[int], array_LE: np.ndarray) -> dict[str, Scalar]:
    """An array as series: ``moe/experts/load`` becomes ``moe/layer_00/expert_000/load`` and so on."""
    family, _, name = key.split("/", 2)
    return {
        layer_key(block, f"expert_{expert:03d}/{name}", family): value
        for block, row_E in zip(blocks, array_LE.tolist(), strict=True)
        for expert, value in enumerate(row_E)
    }


def histograms(
    blocks: Sequence[int], arrays: Mapping[str, np.ndarray], family: str = MOE
) -> Iterator[tuple[str, np.ndarray]]:
    """`HISTOGRAMS` of every layer: ``moe/layer_00/load``."""
    for name in HISTOGRAMS:
        if (array_LE := arrays.get(f"{family}/experts/{name}")) is not None:
            yield from ((layer_key(block, name, family), row_E) for block, row_E in zip(blocks, array_LE, strict=True))
