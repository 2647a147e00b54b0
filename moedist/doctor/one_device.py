"""One device: one process that runs the capacity groups of all ranks and adds up their gradients, with the plain twins.

Rank r's micro-batch becomes the r-th block of one wide micro-batch. A MoE layer routes and plans each block on its own,
as the rank would, and takes the balance losses that count over all ranks on all blocks together; nothing travels.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moedist.config import Config
from moedist.engine.native import NativeConfig
from moedist.mesh import MeshConfig
from moedist.moe.bank.local import LocalConfig
from moedist.moe.context import TokenContext
from moedist.moe.experts.loop import LoopConfig
from moedist.moe.ffn import FFNExpertsConfig
from moedist.moe.layer import MoE, MoEConfig, MoEOutput
from moedist.moe.plan import CapacityPlan
from moedist.moe.report import CountedMass
from moedist.moe.router.contract import Routing
from moedist.train.config import RunConfig


def on_one_device(config: RunConfig, num_ranks: int) -> RunConfig:
    """The same global batch on one rank, with local banks, experts in a loop and the native engine, as it stands."""
    train = dataclasses.replace(
        config.train,
        micro_batch=config.train.micro_batch * num_ranks,
        activation_checkpointing="none",
        compile="none",
    )
    plain = dataclasses.replace(config, train=train, engine=NativeConfig(), mesh=MeshConfig(device=config.mesh.device))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said when the user's own was read
        return _with_twins(plain)


def _with_twins(value: Any) -> Any:
    """``value`` with the plain twins in every MoE layer's config, however deep."""
    if isinstance(value, dict):
        return {key: _with_twins(inner) for key, inner in value.items()}
    if isinstance(value, tuple):
        return tuple(_with_twins(inner) for inner in value)
    if not isinstance(value, Config):
        return value
    if not isinstance(value, MoEConfig):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **{name: _with_twins(inner) for name, inner in fields.items()})
    experts = value.experts
    if isinstance(experts, FFNExpertsConfig):
        experts = LoopConfig(hidden_dim=experts.hidden_dim, activation=experts.activation, bias=experts.bias)
    return dataclasses.replace(value, bank=LocalConfig(), experts=experts)


def run_in_blocks(model: nn.Module, num_blocks: int) -> None:
    """Lets every MoE layer take its micro-batch as ``num_blocks`` ranks' micro-batches, one after the other; in
    place."""
    for layer in model.modules():
        if isinstance(layer, MoE):
            layer.forward = functools.partial(_forward, layer, layer.forward, num_blocks)  # type: ignore[method-assign]


def _forward(
    layer: MoE,
    forward: Callable[[Tensor, TokenContext], MoEOutput],
    num_blocks: int,
    x_TD: Tensor,
    ctx: TokenContext,
) -> MoEOutput:
    """Each block through the layer's own forward; then one report of all."""
    planned: list[tuple[Routing, CapacityPlan]] = []
    report = layer.report

    def note(routing: Routing, plan: CapacityPlan, ctx: TokenContext) -> Any:
        planned.append((routing, plan))
        return report(routing, plan, ctx)

    layer.report = note  # type: ignore[method-assign]
    try:
        contexts = blocks_of(ctx, num_blocks)
        outputs = [forward(x, block) for x, block in zip(x_TD.chunk(num_blocks), contexts, strict=True)]
    finally:
        layer.report = report  # type: ignore[method-assign]
    num_tokens = x_TD.shape[0] // num_blocks
    together = report(
        join_routings([routing for routing, _ in planned], num_tokens),
        join_plans([plan for _, plan in planned], num_tokens),
        ctx,
    )
    reports = [output.report for output in outputs]
    for name, config in layer.config.balance.items():
        if getattr(config, "scope", "global") != "micro_batch":
            continue
        if name in together.pooled:
            together.pooled[name] = _side_by_side([each.pooled[name] for each in reports])
        elif name in together.losses:
            together.losses[name] = torch.stack([each.losses[name] for each in reports]).sum()
    return MoEOutput(torch.cat([output.out_TD for output in outputs]), together)


def _side_by_side(masses: Sequence[CountedMass]) -> CountedMass:
    """Each block a group of its own."""
    return CountedMass(torch.cat([mass.counts_GE for mass in masses]), torch.cat([mass.mass_GE for mass in masses]))


def blocks_of(ctx: TokenContext, num_blocks: int) -> list[TokenContext]:
    """The context of each of ``num_blocks`` equal blocks of rows."""
    rows = ctx.num_sequences // num_blocks
    fields = {f.name: getattr(ctx, f.name) for f in dataclasses.fields(ctx) if f.name.endswith("_T")}
    contexts = []
    for place in range(num_blocks):
        own = {name: value.chunk(num_blocks)[place] for name, value in fields.items()}
        own["sequence_T"] = own["sequence_T"] - place * rows
        contexts.append(dataclasses.replace(ctx, num_sequences=rows, **own))
    return contexts


def join_routings(routings: Sequence[Routing], num_tokens: int) -> Routing:
    """The pairs of all blocks of ``num_tokens`` positions, as each block chose them."""
    return dataclasses.replace(routings[0], **_joined(routings, num_tokens))


def join_plans(plans: Sequence[CapacityPlan], num_tokens: int) -> CapacityPlan:
    """The plans of all blocks; slots are those within a block, and counts are sums."""
    fields = [f.name for f in dataclasses.fields(CapacityPlan) if f.name.endswith(("_E", "_ME"))]
    counts: dict[str, Any] = {name: torch.stack([getattr(plan, name) for plan in plans]).sum(0) for name in fields}
    return dataclasses.replace(plans[0], **_joined(plans, num_tokens), **counts)


def _joined(parts: Sequence[Any], num_tokens: int) -> dict[str, Any]:
    """Tensors by pair and by token end to end; tokens numbered through."""
    joined = {}
    for field in dataclasses.fields(parts[0]):
        values = [getattr(part, field.name) for part in parts]
        if field.name.endswith(("_N", "_T", "_TE")) and values[0] is not None:
            if field.name == "token_N":
                values = [value + place * num_tokens for place, value in enumerate(values)]
            joined[field.name] = torch.cat(values)
    return joined
