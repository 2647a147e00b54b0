"""Every formula of semantics' "Metrics" against numbers worked out by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch

from moedist.log.metrics import (
    MoEStep,
    dead_experts,
    drop_rate,
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
        entropy_L=torch.tensor([0.5, 1.0]),
        count_LME=torch.tensor(
            [
                [[5, 2, 1, 0], [3, 2, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]],
                [[2, 2, 2, 2], [2, 2, 2, 2], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]],
            ]
        ),
        last_seen_LE=torch.tensor([[120, 120, 120, 20], [120, 120, 120, 120]]),
    )


def test_drop_rate_is_the_share_of_asked_pairs_that_were_not_kept():
    assert drop_rate(counts([5, 2, 1, 0]), counts([3, 2, 1, 0])).tolist() == [0.25]
    assert drop_rate(counts([8, 0]), counts([1, 0])).tolist() == [0.875]


def test_max_vio_is_the_excess_of_the_fullest_expert_over_the_mean():
    assert max_vio(counts([5, 2, 1, 0])).tolist() == [1.5]
    assert max_vio(counts([8, 0, 0, 0], [2, 2, 2, 2])).tolist() == [3.0, 0.0]


def test_load_entropy_is_one_when_balanced_and_zero_when_one_expert_has_everything():
    assert load_entropy(counts([2, 2, 2, 2], [8, 0, 0, 0])).tolist() == pytest.approx([1.0, 0.0])
    # H(1/2, 1/4, 1/4, 0) = 1.5 ln 2, and ln 4 = 2 ln 2
    assert load_entropy(counts([4, 2, 2, 0])).tolist() == pytest.approx([0.75])
    assert load_entropy(counts([7])).tolist() == [1.0]


@pytest.mark.parametrize("formula", [max_vio, load_entropy, lambda load: drop_rate(load, load)])
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


def test_a_step_becomes_totals_and_layers_under_the_blocks_of_the_model():
    record = moe_metrics(two_layers(), step=120, dead_window=100)
    lists = {key: record.pop(key) for key in list(record) if isinstance(record[key], list)}
    assert lists == {
        "moe/layer_01/load": [5, 2, 1, 0],
        "moe/layer_01/kept": [3, 2, 1, 0],
        "moe/layer_01/dropped": [2, 0, 0, 0],
        "moe/layer_01/dropped_full": [1, 0, 0, 0],
        "moe/layer_01/dropped_barred": [1, 0, 0, 0],
        "moe/layer_03/load": [2, 2, 2, 2],
        "moe/layer_03/kept": [2, 2, 2, 2],
        "moe/layer_03/dropped": [0, 0, 0, 0],
    }
    assert record == pytest.approx(
        {
            "moe/balance_loss": 1.25,
            "moe/z_loss": 0.3,
            "moe/drop_rate": 0.125,  # of all 16 pairs, not the mean of the layers
            "moe/dropped_full": 1,
            "moe/dropped_exhausted": 0,
            "moe/dropped_barred": 1,
            "moe/max_vio": 1.5,
            "moe/router_entropy": 0.75,
            "moe/load_entropy": (1 + (5 * math.log(8 / 5) + 2 * math.log(4) + math.log(8)) / 8 / math.log(4)) / 2,
            "moe/dead_experts": 1,
            "moe/layer_01/balance_loss": 1.5,
            "moe/layer_01/z_loss": 0.2,
            "moe/layer_01/drop_rate": 0.25,
            "moe/layer_01/max_vio": 1.5,
            "moe/layer_01/router_entropy": 0.5,
            "moe/layer_01/dead_experts": 1,
            "moe/layer_03/balance_loss": 1.0,
            "moe/layer_03/z_loss": 0.4,
            "moe/layer_03/drop_rate": 0.0,
            "moe/layer_03/max_vio": 0.0,
            "moe/layer_03/router_entropy": 1.0,
            "moe/layer_03/dead_experts": 0,
        },
        rel=1e-6,
    )
    assert json.loads(json.dumps(record | lists)) == record | lists  # plain Python numbers


def test_several_balance_losses_add_up_and_a_missing_loss_has_no_key():
    step = two_layers()
    both = MoEStep(
        step.blocks, ["switch", "importance"], step.loss_LJ, step.entropy_L, step.count_LME, step.last_seen_LE
    )
    record = moe_metrics(both, step=1, dead_window=100)
    assert record["moe/layer_01/balance_loss"] == pytest.approx(1.7)
    assert "moe/z_loss" not in record
    none = MoEStep(step.blocks, [], torch.zeros(2, 1), step.entropy_L, step.count_LME, step.last_seen_LE)
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
        "train/mfu": pytest.approx(0.06),
    }
