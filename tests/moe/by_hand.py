"""Routings, plans and experts that a reader can follow by hand."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moedist.launch.compose import compose
from moedist.moe.capacity import CapacityConfig
from moedist.moe.context import TokenContext
from moedist.moe.experts.contract import Experts, Rows
from moedist.moe.init import Draw
from moedist.moe.layer import MoEConfig
from moedist.moe.plan import CapacityPlan, plan_capacity
from moedist.moe.router.contract import Routing
from moedist.moe.router.topk import TopKConfig


def routing_of(
    expert_TK: Sequence[Sequence[int]] | Tensor,
    num_experts: int,
    gate_TK: Sequence[Sequence[float]] | Tensor | None = None,
) -> Routing:
    """Token t's choices are ``expert_TK[t]``; the gates (1 / K each where not given) are the scores too."""
    expert = torch.as_tensor(expert_TK, dtype=torch.int64)
    num_tokens, top_k = expert.shape
    gate = torch.full(expert.shape, 1 / top_k) if gate_TK is None else gate_TK
    gate = torch.as_tensor(gate, dtype=torch.float64)
    probs_TE = torch.full((num_tokens, num_experts), 1 / num_experts, dtype=torch.float64)
    return Routing(
        token_N=torch.arange(num_tokens).repeat_interleave(top_k),
        expert_N=expert.reshape(-1),
        gate_N=gate.reshape(-1),
        score_TE=torch.zeros(num_tokens, num_experts, dtype=torch.float64).scatter(1, expert, gate),
        logits_TE=probs_TE.log(),
        probs_TE=probs_TE,
        pairs_per_token=top_k,
    )


def route_logits(logits_TE: Tensor, ctx: TokenContext, **config: object) -> Routing:
    """What the top-k router makes of given logits: its weight is the identity."""
    return route_by(TopKConfig(**config), logits_TE, ctx)


def route_by(config: TopKConfig, logits_TE: Tensor, ctx: TokenContext, bias_E: Tensor | None = None) -> Routing:
    """The same by a config, with a selection bias where one is given."""
    num_experts = logits_TE.shape[1]
    router = config.build(num_experts, num_experts, dtype=logits_TE.dtype)
    with torch.no_grad():
        router.weight.copy_(torch.eye(num_experts))
    if bias_E is not None:
        router.add_selection_bias()
        router.selection_bias.copy_(bias_E)
    return router(logits_TE, ctx)


@functools.cache
def preset_config(name: str) -> MoEConfig:
    """What ``moe=<name>`` composes to."""
    return compose(["experiment=null", f"moe={name}"]).config.moe


def kept(plan: CapacityPlan) -> list[tuple[int, int, int]]:
    """(token, expert, slot) of every pair that stays, in the order of tokens."""
    rows = zip(plan.token_N.tolist(), plan.expert_N.tolist(), plan.slot_N.tolist(), strict=True)
    return [row for row in rows if row[2] >= 0]


def dropless(routing: Routing, ctx: TokenContext) -> CapacityPlan:
    """The plan that keeps every pair."""
    return plan_capacity(routing, ctx, CapacityConfig(factor=None))


class ScalingExperts(Experts):
    """Expert e multiplies its rows by ``scale[e]``: e + 1 to begin with, or 1 for identity experts."""

    def __init__(self, num_experts: int, identity: bool = False):
        super().__init__()
        self.expert_ids = tuple(range(num_experts))
        scale = torch.ones(num_experts) if identity else torch.arange(num_experts) + 1.0
        self.scale_e = nn.Parameter(scale.double())

    def forward(self, rows: Rows) -> Tensor:
        factor_R = self.scale_e.repeat_interleave(torch.tensor(rows.sizes, dtype=torch.int64))
        return rows.x_RD * (rows.gate_R * factor_R)[:, None].to(rows.x_RD.dtype)

    def keep(self, expert_ids: Sequence[int]) -> None:
        self.scale_e = nn.Parameter(self.scale_e.detach()[torch.tensor(expert_ids, dtype=torch.int64)])
        self.expert_ids = tuple(expert_ids)

    def init_weights(self, draw: Draw) -> None:
        pass
