"""DeepSpeed's layer: ``MOELayer`` with ``topkgating`` and a plain feed-forward module as each expert."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moedist.bench.peer.contract import BALANCE, FeedForward, Peer, WithShared
from moedist.bench.trial import Trial
from moedist.engine.deepspeed import import_deepspeed


class DeepSpeed(Peer):
    """As its users get it, but for the pull on its logits."""

    name = package = "deepspeed"
    limits = spreads = True
    about = "MOELayer, topkgating, drop_policy probs"

    def build(self, trial: Trial) -> nn.Module:  # noqa: D102
        library = import_deepspeed(trial.mesh)
        if torch.distributed.is_initialized():
            library.init_distributed("gloo" if trial.mesh.device.type == "cpu" else "nccl")
        return WithShared(trial, DeepSpeedLayer(trial))


class DeepSpeedLayer(nn.Module):
    """The layer and its balance loss."""

    def __init__(self, trial: Trial):
        super().__init__()
        from deepspeed.moe.experts import Experts
        from deepspeed.moe.sharded_moe import MOELayer, TopKGate, topkgating

        shape, ep = trial.shape, trial.mesh.ep
        offset_TE, factor, top_k = trial.offset_TE, trial.factor, shape.top_k

        class PulledGate(TopKGate):  # type: ignore[misc]
            """The library's own takes other rules, top1gating and top2gating, for one and two experts."""

            def forward(self, x: Tensor, used_token: Any = None, sparse_routes: bool = False, tutel: Any = None) -> Any:
                logits_TE = F.linear(x.float(), self.wg.weight.float()) + offset_TE
                drops = factor is not None
                return topkgating(logits_TE, top_k, factor or 1.0, 1, drops, self.ep_group, sparse_routes=sparse_routes)

        gate = PulledGate(shape.dim, shape.num_experts, shape.top_k).to(trial.mesh.device)
        local, name = shape.num_experts // ep.size, f"ep_size_{ep.size}"
        self.layer = MOELayer(gate, Experts(FeedForward(trial, shape.hidden_dim), local, name), name, ep.size, local)
        if ep.size > 1:
            self.layer._set_ep_group(ep.group)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Its balance loss is left on the module."""
        return self.layer(x_TD, None), BALANCE * self.layer.l_aux


PEERS = [DeepSpeed()]
