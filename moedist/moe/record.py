"""Listens to the MoE layers of a model and takes down what they decide (`moedist.moe.trace` has the files).

Listening is done by hooks on routers and banks, for the length of a forward pass: a layer holds nothing, and a pass
that nobody listens to costs nothing. Recomputation in backward is not heard, because it calls forward, not the module.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from moedist.moe.context import TokenContext
from moedist.moe.layer import MoE
from moedist.moe.plan import CapacityPlan
from moedist.moe.router.contract import Routing
from moedist.moe.trace import LayerTrace, StepTrace, TraceError


class RoutingRecorder:
    """Collects the decisions of one step, micro-step by micro-step, on the device.

    >>> from moedist.moe.layer import MoEConfig
    >>> layer = MoEConfig(num_experts=4).build(dim=8)
    >>> recorder = RoutingRecorder(layer)
    >>> with recorder.listening():
    ...     output = layer(torch.randn(6, 8), TokenContext.of_rows(2, 3))
    >>> recorder.take(step=1).layers[0].expert_TK.shape
    torch.Size([6, 2])
    """

    def __init__(self, model: nn.Module):
        self._layers = [module for module in model.modules() if isinstance(module, MoE)]
        self._contexts: list[TokenContext] = []
        self._routings: dict[int, list[Routing]] = {}
        self._plans: dict[int, list[CapacityPlan]] = {}

    @contextlib.contextmanager
    def listening(self, on: bool = True) -> Iterator[None]:
        """Notes what every MoE layer decides in the forward pass inside; nothing where it is not ``on``."""
        if not on:
            yield
            return
        handles = [handle for layer in self._layers for handle in self._listen_to(layer)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def forget(self) -> None:
        """Drops what was heard: the passes count for nothing."""
        self._contexts, self._routings, self._plans = [], {}, {}

    def take(self, step: int) -> StepTrace | None:
        """What was heard since the last call, copied to the host; None for nothing.

        Raises:
            TraceError: a router has no fixed number of choices per token (expert choice).
        """
        contexts, routings, plans = self._contexts, self._routings, self._plans
        self.forget()
        if not contexts:
            return None

        def joined(parts: list[Tensor]) -> Tensor:
            return torch.cat(parts).cpu()

        return StepTrace(
            step=step,
            sample_T=joined([ctx.sample_T for ctx in contexts]),
            position_T=joined([ctx.position_T for ctx in contexts]),
            id_T=joined([ctx.id_T for ctx in contexts]),
            valid_T=joined([ctx.valid_T for ctx in contexts]),
            layers={block: _layer_trace(routings[block], plans[block]) for block in sorted(routings)},
        )

    def _listen_to(self, layer: MoE) -> list[Any]:
        def hear_router(_: nn.Module, args: tuple[Tensor, TokenContext], routing: Routing) -> None:
            if layer is self._layers[0]:
                self._contexts.append(args[1])
            self._routings.setdefault(layer.layer, []).append(routing)

        def hear_bank(_: nn.Module, args: tuple[Tensor, CapacityPlan]) -> None:
            self._plans.setdefault(layer.layer, []).append(args[1])

        return [
            layer.router.register_forward_hook(hear_router),
            layer.bank.register_forward_pre_hook(hear_bank),
        ]


def _layer_trace(routings: list[Routing], plans: list[CapacityPlan]) -> LayerTrace:
    top_k = routings[0].pairs_per_token
    if top_k is None:
        raise TraceError("a router without a fixed number of choices per token (expert choice) cannot be recorded")

    def joined(parts: list[Tensor]) -> Tensor:
        return torch.cat([part.detach().view(-1, top_k) for part in parts]).cpu()

    return LayerTrace(
        num_experts=routings[0].probs_TE.shape[1],
        expert_TK=joined([routing.expert_N for routing in routings]),
        gate_TK=joined([routing.gate_N.float() for routing in routings]),
        computed_TK=joined([torch.where(plan.slot_N >= 0, plan.expert_N, -1) for plan in plans]),
    )
