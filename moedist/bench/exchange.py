"""Rows to their experts and back, without experts: what each dispatcher costs against one bare all-to-all."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from moedist.bench.floor import exchange_bytes
from moedist.bench.ours import PulledTopKRouter
from moedist.bench.rounds import ratio, sample, take_turns
from moedist.bench.shapes import LayerShape
from moedist.bench.trial import Pattern, Trial, make_trial
from moedist.mesh import Mesh
from moedist.mesh.collectives import all_to_all
from moedist.mesh.meter import ExchangeMeter, measuring
from moedist.moe.capacity import CapacityConfig
from moedist.moe.context import TokenContext
from moedist.moe.dispatch.all_to_all import AllToAllConfig
from moedist.moe.dispatch.budget import BudgetConfig
from moedist.moe.dispatch.contract import DispatchConfig
from moedist.moe.dispatch.hierarchical import HierarchicalConfig
from moedist.moe.dispatch.padded import PaddedConfig
from moedist.moe.init import named_draw
from moedist.moe.placement import Placement
from moedist.moe.plan import CapacityPlan, plan_capacity
from moedist.moe.router.contract import RouterSite
from moedist.moe.router.topk import TopKConfig

BARE = "bare"
TRIPS = 4
"""All-to-alls of rows in a layer: there and back, forward and backward."""


def measure_exchanges(
    shapes: Sequence[LayerShape], patterns: Sequence[Pattern], factor: float | None, rounds: int, mesh: Mesh
) -> list[dict[str, Any]]:
    """A case per shape and routing; called on all ranks."""
    return [
        measure_dispatchers(make_trial(shape, pattern, factor, mesh), rounds)
        for shape in shapes
        for pattern in patterns
    ]


def measure_dispatchers(trial: Trial, rounds: int) -> dict[str, Any]:
    """All dispatchers in turns with a bare exchange of as many bytes as the pairs of a rank have."""
    shape, mesh = trial.shape, trial.mesh
    configs, plan = contenders_for(shape.dtype), planned(trial)
    placement = Placement.in_order(shape.num_experts, mesh.ep.size)
    work: dict[str, Callable[[], None]] = {BARE: bare_exchange(trial)}
    work |= {name: round_trip(config, trial, plan) for name, config in configs.items()}
    seconds = take_turns(work, rounds, mesh)
    exact, contenders = brought_home(AllToAllConfig(), trial, plan), []
    for name, config in configs.items():
        meter = ExchangeMeter(mesh.device)
        with measuring(meter):
            work[name]()
        took, against = sample(seconds[name]), ratio(seconds[name], seconds[BARE])
        error, gradient_error = map(distance, brought_home(config, trial, plan), exact)
        contenders.append(
            {
                "name": name,
                "ms": 1e3 * took.median,
                "spread": took.spread,
                "over_bare": against.median,
                "ratio_spread": against.spread,
                "exchange_ms": 1e3 * meter.seconds,
                "sent_mb": meter.bytes_sent / 1e6,
                "error": error,
                "gradient_error": gradient_error,
                "spilled_pairs": int(config.spilled(plan, placement)),
                "quotable": against.quotable,
            }
        )
    bare = sample(seconds[BARE])
    return {
        "config": shape.name,
        "routing": trial.routing,
        "capacity_factor": trial.factor,
        "rows_per_expert_max_over_mean": trial.imbalance,
        "rounds": rounds,
        "bare_ms": 1e3 * bare.median,
        "bare_mb": exchange_bytes(shape, mesh.ep.size) / 1e6,
        "bare_gb_per_s": exchange_bytes(shape, mesh.ep.size) / bare.median / 1e9,
        "contenders": contenders,
        "quotable": all(entry["quotable"] for entry in contenders),
    }


def contenders_for(dtype: torch.dtype) -> dict[str, DispatchConfig]:
    """Every dispatcher, and one of them in the numbers that are narrower than the rows'; by name."""
    exact: list[DispatchConfig] = [AllToAllConfig(), BudgetConfig(), PaddedConfig(), HierarchicalConfig()]
    contenders = {config.kind: config for config in exact}
    for narrow in (AllToAllConfig(exchange_dtype="bf16"), AllToAllConfig(exchange_dtype="fp8")):
        if narrow.wire.narrows(dtype.itemsize):
            contenders[f"{narrow.kind} {narrow.exchange_dtype}"] = narrow
    return contenders


def brought_home(config: DispatchConfig, trial: Trial, plan: CapacityPlan) -> tuple[Tensor, Tensor]:
    """What this rank's tokens get of experts that weigh their rows, all pairs included; and the tokens' gradient."""
    dispatcher = config.build(Placement.in_order(trial.shape.num_experts, trial.mesh.ep.size), trial.mesh.ep)
    x_TD = trial.x_TD.detach().requires_grad_()
    arrived = dispatcher.dispatch(x_TD, dataclasses.replace(plan, may_spill=False))
    rows = arrived.rows
    out_TD = dispatcher.combine(rows.x_RD * rows.gate_R[:, None].to(x_TD.dtype), arrived.ticket)
    (grad_TD,) = torch.autograd.grad(out_TD, x_TD, trial.grad_TD)
    return out_TD.detach(), grad_TD


def distance(got_TD: Tensor, exact_TD: Tensor) -> float:
    """Root mean square of the difference over that of ``exact_TD``."""
    return float((got_TD.double() - exact_TD.double()).norm() / exact_TD.double().norm())


def planned(trial: Trial) -> CapacityPlan:
    """The pairs of this rank."""
    shape, device = trial.shape, trial.mesh.device
    site = RouterSite(shape.dim, shape.num_experts, device=device, dtype=shape.dtype)
    router = PulledTopKRouter(TopKConfig(top_k=shape.top_k), site, trial.offset_TE)
    router.init_weights(named_draw(0))
    ctx = TokenContext.of_rows(1, shape.tokens, device=device, may_spill=True)
    with torch.no_grad():
        return plan_capacity(router(trial.x_TD, ctx), ctx, CapacityConfig(factor=trial.factor))


def round_trip(config: DispatchConfig, trial: Trial, plan: CapacityPlan) -> Callable[[], None]:
    """Dispatch, an expert that returns its rows, combine, and the gradients of both."""
    dispatcher = config.build(Placement.in_order(trial.shape.num_experts, trial.mesh.ep.size), trial.mesh.ep)

    def go() -> None:
        trial.x_TD.grad = None
        arrived = dispatcher.dispatch(trial.x_TD, plan)
        dispatcher.combine(arrived.rows.x_RD, arrived.ticket).backward(trial.grad_TD)

    return go


def bare_exchange(trial: Trial) -> Callable[[], None]:
    """As many all-to-alls of equal blocks, of rows that lie ready."""
    rows_RD = torch.zeros(trial.shape.pairs, trial.shape.dim, device=trial.mesh.device, dtype=trial.shape.dtype)

    def go() -> None:
        for _ in range(TRIPS):
            all_to_all(rows_RD, trial.mesh.ep)

    return go
