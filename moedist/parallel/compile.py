"""`torch.compile` of a model's parts, each without a graph break.

Compiled are attentions, dense feed-forward layers and routers, and where no shape depends on data
(``moe/dispatch=padded``) MoE layers whole, exchange of rows included. Where FSDP gathers weights it does so by hooks on
routers and banks, which no graph may swallow: there these two are compiled in place of the layer.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from moedist.model.attention.contract import Attention
from moedist.model.attention.mixture import AttentionMixture
from moedist.model.ffn.contract import FFN
from moedist.moe.layer import MoE

LIMIT = 64
"""Graphs that one function may have. Blocks share a function, and where one differs from another in a number (the layer
that names its noise) it gets a graph of its own; torch's limit is 8."""


def compile_parts(model: nn.Module, backend: str = "inductor", whole_layers: bool = True) -> None:
    """Compiles forward of every part at its first call; in place, names and hooks stay.

    After `recompute_in_backward`, which a graph takes in. What changes with the step reaches forward as a tensor, so
    steps recompile nothing; another shape, or training and evaluation, have graphs of their own.

    Args:
        model: of any kind.
        backend: of `torch.compile`.
        whole_layers: whether a MoE layer may be one graph, which hears no hook that a router or a bank is given later
            (`moedist.moe.record`).
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, LIMIT)
    for part in parts_of(model, whole_layers):
        # Not dynamic: shapes are those of the batch, and a number that became a symbol (a layer's, in the names of its
        # noise, of 64 bits) is more than inductor's arithmetic of symbols holds.
        compiled = torch.compile(part.forward, fullgraph=True, dynamic=False, backend=backend)
        part.forward = compiled


def parts_of(model: nn.Module, whole_layers: bool = True) -> list[nn.Module]:
    """The modules to compile, none inside another."""
    parts: list[nn.Module] = []
    for module in model.modules():
        if isinstance(module, (Attention, FFN)) and not module.has_report:
            parts.append(module)
        elif isinstance(module, AttentionMixture):
            parts.append(module.router)
        elif isinstance(module, MoE):
            parts += parts_of_layer(module, whole_layers)
    return parts


def parts_of_layer(layer: MoE, whole: bool) -> list[nn.Module]:
    """The layer where it has static shapes, else its router; its units under FSDP and where not ``whole``."""
    static = layer.bank.static
    if static and whole and not isinstance(layer.bank, FSDPModule):
        return [layer]
    return [layer.router, layer.bank] if static else [layer.router]
