"""Records for tests of sinks."""

from __future__ import annotations

import torch

from moedist.log.metrics import MoEStep, moe_metrics, train_metrics


def record(step: int, loss: float = 2.5) -> dict:
    """Of a model with experts in its block 1, all 17 quantities of layers but biases and norms."""
    moe = MoEStep(
        blocks=[1],
        loss_names=["switch", "z_loss"],
        loss_LJ=torch.tensor([[1.25, 0.5]]),
        scaled_LJ=torch.tensor([[0.0125, 0.0005]]),
        router_L={"router_entropy": torch.tensor([0.75]), "top_probability": torch.tensor([0.5])},
        micro_vio_L=torch.tensor([1.75]),
        room_L=torch.tensor([8]),
        count_LME=torch.tensor([[[5, 2, 1, 0], [3, 2, 1, 0], [2, 0, 0, 0], [0] * 4, [0] * 4]]),
        last_seen_LE=torch.full((1, 4), step),
    )
    return train_metrics(
        step=step,
        loss=loss,
        tokens=100 * step,
        tokens_per_s=1e4,
        learning_rates={"router": 1e-4, "experts": 2e-3},
        grad_norm=1.5,
        memory_gib=0.25,
    ) | moe_metrics(moe, step, dead_window=100)
