"""Every formula of semantics' "Metrics" against numbers worked out by hand."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from moedist.log.metrics import (
    MoEStep,
    dead_experts,
    drop_rate,
    load_cv,
    load_entropy,
    max_vio,
    moe_metrics,
    see_experts,
    train_metrics,
)


def counts(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def two_layers() -> MoEStep:
    """Blocks 1 and 3 of a model: layer 1 drops 2 of 8 pairs, layer 3 is balanced and drops nothing."""
    return MoEStep(
        blocks=[1, 3],
        loss_names=["switch", "z_loss"],
        loss_LJ=torch.tensor([[1.5, 0.2], [1.0, 0.4]]),
        scaled_LJ=torch.tensor([[0.15, 0.02], [0.1, 0.04]]),
        router_L={"router_entropy": torch.tensor([0.5, 1.0]), "top_probability": torch.tensor([0.75, 0.25])},
        micro_vio_L=torch.tensor([1.75, 0.5]),
        room_L=torch.tensor([12, 0]),
        count_LME=torch.tensor(
            [
                [[5, 2, 1, 0], [3, 2, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]],
                [[2, 2, 2, 2], [2, 2, 2, 2], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]],
            ]
        ),
        last_seen_LE=torch.tensor([[120, 120, 120, 20], [120, 120, 120, 120]]),
        bias_LE=torch.tensor([[0.5, 0.25, 0.0, -0.25], [0.0, 0.0, 0.0, 0.0]]),
        norm_LE={"weight_norm": torch.tensor([[1.0, 1.0, 1.0, 1.0], [3.0, 3.0, 3.0, 3.0]])},
    )


def test_drop_rate_is_the_share_of_asked_pairs_that_were_not_kept():
    assert drop_rate(counts([5, 2, 1, 0]), counts([3, 2, 1, 0])).tolist() == [0.25]
    assert drop_rate(counts([8, 0]), counts([1, 0])).tolist() == [0.875]


@pytest.mark.requirement("R2-62")
def test_max_vio_is_the_excess_of_the_fullest_expert_over_the_mean():
    assert max_vio(counts([5, 2, 1, 0])).tolist() == [1.5]
    assert max_vio(counts([8, 0, 0, 0], [2, 2, 2, 2])).tolist() == [3.0, 0.0]


def test_load_entropy_is_one_when_balanced_and_zero_when_one_expert_has_everything():
    assert load_entropy(counts([2, 2, 2, 2], [8, 0, 0, 0])).tolist() == pytest.approx([1.0, 0.0])
    # H(1/2, 1/4, 1/4, 0) = 1.5 ln 2, and ln 4 = 2 ln 2
    assert load_entropy(counts([4, 2, 2, 0])).tolist() == pytest.approx([0.75])
    assert load_entropy(counts([7])).tolist() == [1.0]


@pytest.mark.parametrize("formula", [max_vio, load_entropy, load_cv, lambda load: drop_rate(load, load)])
def test_no_load_gives_zero(formula):
    assert formula(counts([0, 0, 0, 0])).tolist() == [0.0]


def test_an_expert_is_dead_from_the_window_th_step_without_load_on():
    last_seen_E = torch.tensor([20, 21, 120, 0])
    assert dead_experts(last_seen_E, step=120, window=100) == 2
    assert dead_experts(torch.zeros(4, dtype=torch.int64), step=99, window=100) == 0
    assert dead_experts(torch.zeros(4, dtype=torch.int64), step=100, window=100) == 4


def test_see_experts_remembers_the_last_step_with_load_even_if_all_pairs_were_dropped():
    count_LME = torch.tensor([[[3, 0, 1], [2, 0, 0], [1, 0, 1]]])
    seen_LE = see_experts(torch.tensor([[5, 6, 7]]), count_LME, step=9)
    assert seen_LE.tolist() == [[9, 6, 9]] and seen_LE.dtype == torch.int64


def test_load_cv_is_standard_deviation_over_mean():
    # mean 2; squares of the distances 9 + 0 + 1 + 4 = 14
    assert load_cv(counts([5, 2, 1, 0])).tolist() == pytest.approx([math.sqrt(14 / 4) / 2])
    assert load_cv(counts([8, 0, 0, 0])).tolist() == pytest.approx([math.sqrt(3)])


def test_a_step_becomes_totals_columns_and_arrays():
    record = moe_metrics(two_layers(), step=120, dead_window=100)
    arrays = {key: value.tolist() for key, value in record.items() if isinstance(value, np.ndarray)}
    columns = {key: value for key, value in record.items() if isinstance(value, list)}
    totals = {key: value for key, value in record.items() if key not in arrays and key not in columns}
    assert arrays == {
        "moe/experts/load": [[5, 2, 1, 0], [2, 2, 2, 2]],
        "moe/experts/kept": [[3, 2, 1, 0], [2, 2, 2, 2]],
        "moe/experts/dropped_full": [[1, 0, 0, 0], [0, 0, 0, 0]],
        "moe/experts/dropped_exhausted": [[0, 0, 0, 0], [0, 0, 0, 0]],
        "moe/experts/dropped_barred": [[1, 0, 0, 0], [0, 0, 0, 0]],
        "moe/experts/weight_norm": [[1, 1, 1, 1], [3, 3, 3, 3]],
    }
    entropy = (5 * math.log(8 / 5) + 2 * math.log(4) + math.log(8)) / 8 / math.log(4)
    expected_columns = {
        "moe/layers/block": [1, 3],
        "moe/layers/balance_loss": [1.5, 1.0],
        "moe/layers/z_loss": [0.2, 0.4],
        "moe/layers/router_entropy": [0.5, 1.0],
        "moe/layers/top_probability": [0.75, 0.25],
        "moe/layers/load_entropy": [entropy, 1.0],
        "moe/layers/load_cv": [math.sqrt(14 / 4) / 2, 0.0],
        "moe/layers/max_vio": [1.5, 0.0],
        "moe/layers/max_vio_micro": [1.75, 0.5],
        "moe/layers/bias_drift": [0.75, 0.0],
        "moe/layers/dead_experts": [1, 0],
        "moe/layers/drop_rate": [0.25, 0.0],
        "moe/layers/dropped_full": [1, 0],
        "moe/layers/dropped_exhausted": [0, 0],
        "moe/layers/dropped_barred": [1, 0],
        "moe/layers/capacity_used": [0.5, 0.0],  # 6 of 12; the other layer has no limit
        "moe/layers/expert_weight_norm": [1.0, 3.0],
    }
    assert columns.keys() == expected_columns.keys()
    for key, column in expected_columns.items():
        assert columns[key] == pytest.approx(column, rel=1e-6), key
    assert totals == pytest.approx(
        {
            "moe/balance_loss": 1.25,
            "moe/balance_loss_scaled": 0.25,  # the sum over layers, as in the objective
            "moe/z_loss": 0.3,
            "moe/z_loss_scaled": 0.06,
            "moe/drop_rate": 0.125,  # of all 16 pairs, not the mean of the layers
            "moe/dropped_full": 1,
            "moe/dropped_exhausted": 0,
            "moe/dropped_barred": 1,
            "moe/capacity_used": 0.5,
            "moe/max_vio": 1.5,
            "moe/max_vio_micro": 1.75,
            "moe/load_cv": math.sqrt(14 / 4) / 4,
            "moe/router_entropy": 0.75,
            "moe/top_probability": 0.5,
            "moe/load_entropy": (1 + entropy) / 2,
            "moe/dead_experts": 1,
            "moe/bias_drift": 0.75,
            "moe/expert_weight_norm": math.sqrt(5),  # root of the mean square
        },
        rel=1e-6,
    )
    plain = totals | columns
    assert json.loads(json.dumps(plain)) == plain  # plain Python numbers


def test_what_no_layer_has_has_no_key():
    step = dataclasses.replace(two_layers(), bias_LE=None, norm_LE={}, room_L=torch.zeros(2, dtype=torch.int64))
    record = moe_metrics(step, step=120, dead_window=100)
    assert not [key for key in record if "bias" in key or "norm" in key or "capacity" in key]


def test_several_balance_losses_add_up_and_a_missing_loss_has_no_key():
    step = two_layers()
    both = dataclasses.replace(step, loss_names=["switch", "importance"])
    record = moe_metrics(both, step=1, dead_window=100)
    assert record["moe/layers/balance_loss"] == pytest.approx([1.7, 1.4])
    assert "moe/z_loss" not in record
    none = dataclasses.replace(step, loss_names=[], loss_LJ=torch.zeros(2, 1), scaled_LJ=torch.zeros(2, 1))
    assert "moe/balance_loss" not in moe_metrics(none, step=1, dead_window=100)


def test_a_step_whose_loss_is_not_finite_is_still_a_record():
    step = two_layers()
    step.loss_LJ[0, 0] = math.nan
    assert math.isnan(moe_metrics(step, step=1, dead_window=100)["moe/balance_loss"])


def test_train_metrics():
    record = train_metrics(
        step=7,
        loss=2.5,
        tokens=700,
        tokens_per_s=1e4,
        learning_rates={"router": 1e-4, "experts": 2e-3},
        grad_norm=1.5,
        memory_gib=0.25,
        flops_per_token=6e6,
        peak_flops=1e12,
    )
    assert record == {
        "train/step": 7,
        "train/loss": 2.5,
        "train/tokens": 700,
        "train/tokens_per_s": 1e4,
        "train/lr_router": 1e-4,
        "train/lr_experts": 2e-3,
        "train/grad_norm": 1.5,
        "train/memory_gib": 0.25,
        "train/data_wait": 0.0,
        "train/tflops": pytest.approx(0.06),
        "train/mfu": pytest.approx(0.06),
    }
