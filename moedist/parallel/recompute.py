"""Activation checkpointing (Chen et al. 2016): what is inside attentions and banks is forgotten and computed again.

Nothing else may be: a router, a plan or a loss that were computed again could route other pairs than the ones whose
outputs are in the loss. A bank gets its plan as an argument, so it lays its rows out as it did the first time.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from moedist.mesh import collectives  # noqa: F401 - defines moedist::all_to_all
from moedist.model.attention.bank import AttentionBank
from moedist.model.attention.contract import Attention
from moedist.moe import host_experts  # noqa: F401 - defines moedist::host_experts
from moedist.moe.bank.contract import Bank
from moedist.moe.kernels import ffn  # noqa: F401 - defines moedist::ffn_forward

Recompute = Literal["full", "selective"]

_aten = torch.ops.aten
KEPT = frozenset(
    {
        _aten.mm.default,
        _aten.addmm.default,
        _aten.bmm.default,
        _aten.baddbmm.default,
        _aten._grouped_mm.default,
        _aten._scaled_dot_product_flash_attention.default,
        _aten._scaled_dot_product_flash_attention_for_cpu.default,
        _aten._scaled_dot_product_efficient_attention.default,
        _aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.moedist.all_to_all.default,
        torch.ops.moedist.host_experts.default,
        torch.ops.moedist.ffn_forward.default,
    }
)
"""What ``selective`` keeps: outputs of matrix products, of attention and of the exchange of rows. Norms, rotations,
activations, weighting and copies of rows are computed again: little arithmetic, no waiting for other ranks."""


def recompute_in_backward(model: nn.Module, what: Recompute) -> None:
    """Keeps the inputs of every attention and bank and computes the rest again in backward; in place.

    Args:
        model: of any kind; FSDP's units may lie in it or around it.
        what: ``full`` computes all of it again, exchanges included; ``selective`` keeps `KEPT`.
    """
    contexts: dict[str, Any] = {}
    if what == "selective":
        contexts = {"context_fn": functools.partial(create_selective_checkpoint_contexts, _policy)}
    for module in model.modules():
        if isinstance(module, (AttentionBank, Bank)) or (isinstance(module, Attention) and not module.has_report):
            # Not a wrapper around the module: its names, and what hooks see, stay as they are.
            again = functools.partial(checkpoint, module.forward, use_reentrant=False, **contexts)
            module.forward = again  # type: ignore[method-assign]


def _policy(ctx: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
