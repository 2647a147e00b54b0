from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch

from moedist.log.metrics import MoEStep, moe_metrics
from moedist.log.run_files import ExpertsFile
from moedist.log.series import RUN_KEYS, Series
from moedist.log.sink.jsonl import JsonlSink


def step_of_size(num_layers: int, num_experts: int) -> MoEStep:
    """Everything that a layer can tell, in numbers of many digits."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator)

    count_LME = (draw(num_layers, 5, num_experts) * 1000).long()
    return MoEStep(
        blocks=range(num_layers),
        loss_names=["switch", "z_loss"],
        loss_LJ=draw(num_layers, 2),
        scaled_LJ=draw(num_layers, 2),
        router_L={"router_entropy": draw(num_layers), "top_probability": draw(num_layers)},
        micro_vio_L=draw(num_layers),
        room_L=torch.full((num_layers,), 10**6),
        count_LME=count_LME,
        last_seen_LE=torch.ones(num_layers, num_experts, dtype=torch.int64),
        bias_LE=draw(num_layers, num_experts),
        norm_LE={"weight_norm": draw(num_layers, num_experts), "grad_norm": draw(num_layers, num_experts)},
    )


def record_of_size(num_layers: int, num_experts: int) -> dict:
    return {"train/step": 1} | moe_metrics(step_of_size(num_layers, num_experts), step=1, dead_window=100)


@pytest.mark.pitfall("32")
@pytest.mark.parametrize(
    ("num_layers", "num_experts", "as_series", "as_tables", "per_expert"),
    [(48, 128, 3, 14, 0), (16, 64, 9, 8, 0), (2, 8, 17, 0, 7), (2, 16, 17, 0, 3), (1, 4, 17, 0, 7)],
)
def test_keys_stay_within_the_bound_and_nothing_is_dropped(
    num_layers: int, num_experts: int, as_series: int, as_tables: int, per_expert: int
):
    record, series = record_of_size(num_layers, num_experts), Series(200)
    row = series.row(record)
    of_run = [key for key in row.scalars if "/layer_" not in key]
    of_experts = [key for key in row.scalars if re.search(r"/expert_\d+/", key)]
    assert len(of_run) <= RUN_KEYS and len(row.scalars) - len(of_run) + RUN_KEYS <= 200
    assert len(row.tables) == as_tables and len(of_experts) == per_expert * num_layers * num_experts
    assert len(row.scalars) - len(of_run) - len(of_experts) == as_series * num_layers
    assert len(row.histograms) == 2 * num_layers
    assert all(len(column) == num_layers for column in row.tables.values())
    columns = [key for key, value in record.items() if isinstance(value, list) and key != "moe/layers/block"]
    assert as_series + as_tables == len(columns) == 17
    again = series.row({key: value for key, value in record.items() if key != "moe/drop_rate"} | {"eval/loss": 1.0})
    assert again.tables.keys() == row.tables.keys() and again.scalars.keys() >= row.scalars.keys() - {"moe/drop_rate"}


def test_a_key_is_named_by_its_block_and_expert():
    record = {"moe/layers/block": [1, 3], "moe/layers/max_vio": [0.5, 1.5]}
    record["moe/experts/load"] = np.array([[1, 2], [3, 4]])
    row = Series(200).row(record)
    assert row.scalars == {
        "moe/layer_01/max_vio": 0.5,
        "moe/layer_03/max_vio": 1.5,
        "moe/layer_01/expert_000/load": 1,
        "moe/layer_01/expert_001/load": 2,
        "moe/layer_03/expert_000/load": 3,
        "moe/layer_03/expert_001/load": 4,
    }
    assert {key: bars.tolist() for key, bars in row.histograms.items()} == {
        "moe/layer_01/load": [1, 2],
        "moe/layer_03/load": [3, 4],
    }


def test_files_stay_small_at_48_layers_of_128_experts(tmp_path):
    sink = JsonlSink(tmp_path, print)
    record = record_of_size(48, 128)
    sink.write(record)
    sink.close("done")
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len(line) < 10_000
    assert json.loads(line)["moe/layers/max_vio"] == pytest.approx(record["moe/layers/max_vio"], rel=1e-5)
    experts = ExpertsFile(tmp_path)
    assert experts.blocks == tuple(range(48))
    for name, array_LE in experts.at(1).items():
        assert (array_LE == record[f"moe/experts/{name}"]).all(), name
    assert (tmp_path / "experts.bin").stat().st_size < 150_000
