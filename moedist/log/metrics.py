"""From the globally reduced numbers of one step to the flat record that every sink takes.

Counts are of the whole global batch of the step. Nothing here divides by zero: an empty batch gives 0. A number that is
not finite stays what it is; sinks write it in their own safe way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moedist.log.sink.contract import Value
from moedist.moe.plan import DROP_REASONS

ASKED, KEPT, DROPPED = 0, 1, 2
"""Rows of ``count_LME``; behind ``DROPPED`` stands one row for each of the `DROP_REASONS`."""
Z_LOSS = "z_loss"


@dataclasses.dataclass(frozen=True)
class MoEStep:
    """What all MoE layers told about one step, summed over micro-steps and ranks.

    Attributes:
        blocks: for each of the L MoE layers the index of its block in the model, from 0.
        loss_names: the J names of ``loss_LJ``; ``z_loss`` is the router's z-loss, the others are balance losses.
        loss_LJ: unscaled losses.
        entropy_L: router entropy, mean over tokens of H(p) / ln E.
        count_LME: int64 pairs per expert by global id; M = 5: asked before the limit, computed after it, and asked but
            computed by none, by each of the `DROP_REASONS`.
        last_seen_LE: int64, the last step at which a pair asked for the expert; 0 for never (`see_experts`).
    """

    blocks: Sequence[int]
    loss_names: Sequence[str]
    loss_LJ: Tensor
    entropy_L: Tensor
    count_LME: Tensor
    last_seen_LE: Tensor


def see_experts(last_seen_LE: Tensor, count_LME: Tensor, step: int) -> Tensor:
    """``last_seen_LE`` after the counts of ``step``. Begin with zeros, and keep it in checkpoints."""
    return torch.where(count_LME[:, ASKED] > 0, step, last_seen_LE)


def train_metrics(
    *,
    step: int,
    loss: float,
    tokens: int,
    tokens_per_s: float,
    learning_rates: Mapping[str, float],
    grad_norm: float,
    memory_gib: float,
    flops_per_token: float | None = None,
    peak_flops: float | None = None,
) -> dict[str, Value]:
    """The ``train/`` part of a record.

    Args:
        step: optimizer steps done.
        loss: task loss, nats per valid token of the global batch.
        tokens: valid tokens trained on since step 0.
        tokens_per_s: of the whole run, since the last record.
        learning_rates: by parameter group.
        grad_norm: of the whole model before the clip, each logical parameter counted once.
        memory_gib: largest peak of allocated memory over ranks.
        flops_per_token: 6 x active matmul parameters without the input embedding + attention, causal counted once.
        peak_flops: measured peak of all devices together, FLOP/s; without it there is no ``train/mfu``.
    """
    record: dict[str, Value] = {
        "train/step": step,
        "train/loss": loss,
        "train/tokens": tokens,
        "train/tokens_per_s": tokens_per_s,
        "train/grad_norm": grad_norm,
        "train/memory_gib": memory_gib,
    }
    record |= {f"train/lr_{group}": lr for group, lr in learning_rates.items()}
    if flops_per_token is not None and peak_flops:
        record["train/mfu"] = flops_per_token * tokens_per_s / peak_flops
    return record


def moe_metrics(moe: MoEStep, step: int, dead_window: int) -> dict[str, Value]:
    """The ``moe/`` part of a record; ``moe/layer_NN`` counts all blocks of the model, so dense blocks leave gaps.

    A loss that no layer has gets no key; one that is not on in every layer is the mean over all MoE layers. A layer's
    list of pairs dropped for one reason is left out where there are none.
    """
    asked_LE, kept_LE = moe.count_LME[:, ASKED].double(), moe.count_LME[:, KEPT].double()
    averaged = {**_losses(moe), "router_entropy": moe.entropy_L.double()}
    per_layer = averaged | {
        "drop_rate": drop_rate(asked_LE, kept_LE),
        "max_vio": max_vio(asked_LE),
        "dead_experts": dead_experts(moe.last_seen_LE, step, dead_window),
    }
    totals = {name: value_L.mean() for name, value_L in averaged.items()} | {
        "drop_rate": drop_rate(asked_LE.flatten(), kept_LE.flatten()),
        "max_vio": per_layer["max_vio"].max(),
        "load_entropy": load_entropy(asked_LE).mean(),
        "dead_experts": per_layer["dead_experts"].sum(),
    }
    record: dict[str, Value] = {f"moe/{name}": value.item() for name, value in totals.items()}
    dropped_M = moe.count_LME[:, DROPPED:].sum((0, 2)).tolist()
    record |= {f"moe/dropped_{reason}": dropped for reason, dropped in zip(DROP_REASONS, dropped_M, strict=True)}
    columns = {name: value_L.tolist() for name, value_L in per_layer.items()}
    counts_LME = moe.count_LME.tolist()
    for layer, block in enumerate(moe.blocks):
        prefix = f"moe/layer_{block:02d}"
        record |= {f"{prefix}/{name}": column[layer] for name, column in columns.items()}
        record[f"{prefix}/load"] = counts_LME[layer][ASKED]
        record[f"{prefix}/kept"] = counts_LME[layer][KEPT]
        by_reason = dict(zip(DROP_REASONS, counts_LME[layer][DROPPED:], strict=True))
        record[f"{prefix}/dropped"] = [sum(dropped) for dropped in zip(*by_reason.values(), strict=True)]
        record |= {f"{prefix}/dropped_{reason}": dropped_E for reason, dropped_E in by_reason.items() if any(dropped_E)}
    return record


def _losses(moe: MoEStep) -> dict[str, Tensor]:
    """Unscaled ``balance_loss`` (all that balance, summed) and ``z_loss`` per layer, where there is one."""
    columns: dict[str, Tensor] = {}
    for name, loss_L in zip(moe.loss_names, moe.loss_LJ.double().unbind(1), strict=False):  # no names: a zero column
        key = Z_LOSS if name == Z_LOSS else "balance_loss"
        columns[key] = columns.get(key, 0) + loss_L
    return columns


def drop_rate(asked_E: Tensor, kept_E: Tensor) -> Tensor:
    """``1 - sum kept / sum asked`` over the last dim; 0 where nothing was asked."""
    asked = asked_E.sum(-1)
    return torch.where(asked > 0, 1 - kept_E.sum(-1) / asked.clamp(min=1), 0.0)


def max_vio(load_E: Tensor) -> Tensor:
    """``(max load - mean load) / mean load`` over the last dim (MaxVio, Wang et al. 2024, arXiv:2408.15664): 0 when
    balanced, E - 1 when one expert has everything; 0 without load.
    """
    mean = load_E.mean(-1)
    return torch.where(mean > 0, load_E.amax(-1) / torch.where(mean > 0, mean, 1.0) - 1, 0.0)


def load_entropy(load_E: Tensor) -> Tensor:
    """``H(load / sum load) / ln E`` over the last dim: 1 when balanced (or E = 1), 0 when one expert has everything
    or nobody has anything.
    """
    num_experts = load_E.shape[-1]
    total = load_E.sum(-1, keepdim=True)
    if num_experts == 1:
        return (total.squeeze(-1) > 0).double()
    share_E = load_E / total.clamp(min=1)
    return torch.special.entr(share_E).sum(-1) / torch.log(torch.tensor(float(num_experts), dtype=load_E.dtype))


def dead_experts(last_seen_E: Tensor, step: int, window: int) -> Tensor:
    """How many experts had no load in the last ``window`` steps up to ``step``, over the last dim."""
    return (last_seen_E <= step - window).sum(-1)
