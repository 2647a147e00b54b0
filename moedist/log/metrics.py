"""From the globally reduced numbers of one step to the record that every sink takes.

A record is flat. Its values are numbers of the whole run (``moe/max_vio``), columns with a number for each MoE layer
(``moe/layers/max_vio``; ``moe/layers/block`` says which blocks of the model these are), and [L, E] arrays over layers
and experts by global id (``moe/experts/load``).

Counts are of the whole global batch of the step. Nothing here divides by zero: an empty batch gives 0. A number that is
not finite stays what it is; sinks write it in their own safe way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from moedist.log.sink.contract import Value
from moedist.moe.plan import DROP_REASONS

ASKED, KEPT, DROPPED = 0, 1, 2
"""Rows of ``count_LME``; behind ``DROPPED`` stands one row for each of the `DROP_REASONS`."""
Z_LOSS = "z_loss"
MOE, ATTENTION = FAMILIES = ("moe", "attention")
"""Where keys of routed layers begin: of MoE layers, and of attentions that route. Each family's loads are one table."""
LAYERS, EXPERTS = "moe/layers", "moe/experts"
"""Where the keys of columns and of [L, E] arrays begin."""


@dataclasses.dataclass(frozen=True)
class MoEStep:
    """What all MoE layers told about one step, summed over micro-steps and ranks.

    Attributes:
        blocks: for each of the L MoE layers the index of its block in the model, from 0.
        loss_names: the J names of ``loss_LJ``; ``z_loss`` is the router's z-loss, the others are balance losses.
        loss_LJ: unscaled losses.
        scaled_LJ: the same times their coefficients, as they enter the objective.
        router_L: means over tokens, by name (`moedist.moe.report.ROUTER_MEANS`).
        micro_vio_L: mean of `max_vio` over the micro-batches of all ranks, each for itself.
        room_L: int64, pairs that the limits of all capacity groups left room for; 0 where nothing limits.
        count_LME: int64 pairs per expert by global id; M = 5: asked before the limit, computed after it, and asked but
            computed by none, by each of the `DROP_REASONS`.
        last_seen_LE: int64, the last step at which a pair asked for the expert; 0 for never (`see_experts`).
        bias_LE: the selection bias; None where no layer has one. Rows of layers without one are 0.
        norm_LE: 2-norms of each expert's weights and, where known, of its gradient before the clip, by name.
    """

    blocks: Sequence[int]
    loss_names: Sequence[str]
    loss_LJ: Tensor
    scaled_LJ: Tensor
    router_L: Mapping[str, Tensor]
    micro_vio_L: Tensor
    room_L: Tensor
    count_LME: Tensor
    last_seen_LE: Tensor
    bias_LE: Tensor | None = None
    norm_LE: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)


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
    data_wait: float = 0.0,
    flops_per_token: float | None = None,
    peak_flops: float | None = None,
    spilled_steps: int | None = None,
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
        data_wait: share of the time in steps since the last record that ranks waited for data, their mean.
        flops_per_token: 6 x active matmul parameters without the input embedding + attention, causal counted once.
        peak_flops: peak of all devices together, measured or given, FLOP/s; without it there is no ``train/mfu``.
        spilled_steps: since the last record, that were run again for want of room on the way to experts; None where
            that cannot be.
    """
    record: dict[str, Value] = {
        "train/step": step,
        "train/loss": loss,
        "train/tokens": tokens,
        "train/tokens_per_s": tokens_per_s,
        "train/grad_norm": grad_norm,
        "train/memory_gib": memory_gib,
        "train/data_wait": data_wait,
    }
    record |= {f"train/lr_{group}": lr for group, lr in learning_rates.items()}
    if flops_per_token is not None:
        record["train/tflops"] = flops_per_token * tokens_per_s / 1e12
        if peak_flops:
            record["train/mfu"] = flops_per_token * tokens_per_s / peak_flops
    if spilled_steps is not None:
        record["train/spilled_steps"] = spilled_steps
    return record


def time_metrics(
    *,
    seconds: Mapping[str, float],
    most_compute_s: float,
    bytes_sent: int,
    bytes_arrived: int,
    most_bytes_arrived: int,
    num_ranks: int,
) -> dict[str, Value]:
    """Where the time of one step went, and what its exchanges of rows moved.

    Args:
        seconds: by part of the step, summed over ranks; ``compute`` without ``exchange``.
        most_compute_s: seconds of ``compute`` on the rank with most of them.
        bytes_sent: to other ranks, over all of them.
        bytes_arrived: at all ranks from all, themselves included.
        most_bytes_arrived: at the rank where most arrived.
        num_ranks: ranks.
    """
    record: dict[str, Value] = {f"time/{part}": total / num_ranks for part, total in seconds.items()}
    record["time/step"] = sum(seconds.values()) / num_ranks
    record["time/compute_imbalance"] = _excess(most_compute_s, seconds["compute"] / num_ranks)
    record["moe/exchange_bytes"] = bytes_sent
    record["moe/exchange_imbalance"] = _excess(most_bytes_arrived, bytes_arrived / num_ranks)
    return record


def _excess(most: float, mean: float) -> float:
    """``most / mean - 1``; 0 of nothing."""
    return most / mean - 1 if mean > 0 else 0.0


def moe_metrics(moe: MoEStep, step: int, dead_window: int, family: str = MOE) -> dict[str, Value]:
    """The ``moe/`` part of a record, or that of another family of `FAMILIES`.

    A quantity that no layer has gets no key; a loss that is not on in every layer is the mean over all MoE layers.
    """
    asked_LE, kept_LE = moe.count_LME[:, ASKED].double(), moe.count_LME[:, KEPT].double()
    dropped_LM = moe.count_LME[:, DROPPED:].sum(2)
    averaged = _losses(moe.loss_names, moe.loss_LJ) | {name: value_L.double() for name, value_L in moe.router_L.items()}
    averaged |= {"load_entropy": load_entropy(asked_LE), "load_cv": load_cv(asked_LE)}
    worst = {"max_vio": max_vio(asked_LE), "max_vio_micro": moe.micro_vio_L.double()}
    if moe.bias_LE is not None:
        worst["bias_drift"] = bias_drift(moe.bias_LE)
    counted = {"dead_experts": dead_experts(moe.last_seen_LE, step, dead_window)}
    counted |= {f"dropped_{reason}": dropped_LM[:, place] for place, reason in enumerate(DROP_REASONS)}
    shares = {"drop_rate": drop_rate(asked_LE, kept_LE)}
    totals = {"drop_rate": drop_rate(asked_LE.flatten(), kept_LE.flatten())}
    if bool((moe.room_L > 0).any()):
        shares["capacity_used"] = capacity_used(kept_LE.sum(1), moe.room_L)
        limited_L = moe.room_L > 0
        totals["capacity_used"] = capacity_used(kept_LE.sum(1)[limited_L].sum(), moe.room_L.sum())
    norms = {f"expert_{name}": norm_LE.double().square().mean(1).sqrt() for name, norm_LE in moe.norm_LE.items()}
    scaled = {f"{name}_scaled": value_L for name, value_L in _losses(moe.loss_names, moe.scaled_LJ).items()}
    record: dict[str, Value] = {f"{family}/{name}": value.item() for name, value in totals.items()}
    # Of all quantities of a kind at once: a record's time is that of its many small operations.
    kinds: tuple[tuple[Mapping[str, Tensor], Callable[[Tensor], Tensor] | None], ...] = (
        (averaged, lambda value_QL: value_QL.mean(1)),
        (worst, lambda value_QL: value_QL.amax(1)),
        (counted, lambda value_QL: value_QL.sum(1)),
        (scaled, lambda value_QL: value_QL.sum(1)),
        (norms, lambda value_QL: value_QL.square().mean(1).sqrt()),
        (shares, None),
    )
    for columns, over_layers in kinds:
        if not columns:
            continue
        value_QL = torch.stack(list(columns.values()))
        if over_layers is not None:
            record |= _named(f"{family}/", columns, over_layers(value_QL).tolist())
        if columns is not scaled:
            record |= _named(f"{family}/layers/", columns, value_QL.tolist())
    record[f"{family}/layers/block"] = list(moe.blocks)
    names = ("load", "kept", *(f"dropped_{reason}" for reason in DROP_REASONS))
    record |= {f"{family}/experts/{name}": moe.count_LME[:, place].numpy() for place, name in enumerate(names)}
    record |= {f"{family}/experts/{name}": norm_LE.float().numpy() for name, norm_LE in moe.norm_LE.items()}
    return record


def _named(prefix: str, names: Iterable[str], values: Iterable[Value]) -> dict[str, Value]:
    return {f"{prefix}{name}": value for name, value in zip(names, values, strict=True)}


def _losses(names: Sequence[str], loss_LJ: Tensor) -> dict[str, Tensor]:
    """``balance_loss`` (all that balance, summed) and ``z_loss`` per layer, where there is one."""
    columns: dict[str, Tensor] = {}
    for name, loss_L in zip(names, loss_LJ.double().unbind(1), strict=False):  # no names: a zero column
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


def load_cv(load_E: Tensor) -> Tensor:
    """Coefficient of variation over the last dim: standard deviation (over all E) / mean; 0 without load."""
    mean = load_E.mean(-1)
    return torch.where(mean > 0, load_E.std(-1, correction=0) / torch.where(mean > 0, mean, 1.0), 0.0)


def capacity_used(kept: Tensor, room: Tensor) -> Tensor:
    """``kept / room``, element by element: the share of the slots that hold a pair; 0 where there is no limit."""
    return torch.where(room > 0, kept / room.clamp(min=1), 0.0)


def bias_drift(bias_E: Tensor) -> Tensor:
    """``max - min`` of a selection bias over the last dim: how far balancing has pulled the experts apart."""
    bias_E = bias_E.double()
    return bias_E.amax(-1) - bias_E.amin(-1)
