"""Our own layer as a contender, and its twins."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moedist.bench.peer.contract import BALANCE, Peer
from moedist.bench.trial import Trial
from moedist.moe.balance.switch import SwitchConfig
from moedist.moe.capacity import CapacityConfig
from moedist.moe.context import TokenContext
from moedist.moe.dispatch.all_to_all import AllToAllConfig
from moedist.moe.dispatch.contract import DispatchConfig
from moedist.moe.dispatch.padded import PaddedConfig
from moedist.moe.experts.fused import FusedConfig
from moedist.moe.experts.grouped import GroupedConfig
from moedist.moe.experts.loop import LoopConfig
from moedist.moe.ffn import FFNExpertsConfig
from moedist.moe.kernels.device import why_not
from moedist.moe.layer import MoEConfig
from moedist.moe.placement import Placement
from moedist.moe.router.contract import RouterSite
from moedist.moe.router.topk import TopKConfig, TopKRouter

OURS = "moedist"


class PulledTopKRouter(TopKRouter):
    """The router that a model has, pulled to the trial's experts."""

    def __init__(self, config: TopKConfig, site: RouterSite, offset_TE: Tensor):
        super().__init__(config, site)
        self.offset_TE = offset_TE

    def logits(self, x_TD: Tensor, step: Tensor) -> Tensor:
        """``x W`` and the pull."""
        return super().logits(x_TD, step) + self.offset_TE


class Moedist(Peer):
    """A layer of this package.

    Args:
        name: of the contender.
        dispatch, experts: what is compared.
    """

    limits = spreads = True

    def __init__(self, name: str, dispatch: DispatchConfig, experts: type[FFNExpertsConfig]):
        self.name, self.dispatch, self.experts = name, dispatch, experts
        self.about = f"moe/dispatch={dispatch.kind}, moe/experts={experts().kind}"

    def why_not(self, trial: Trial) -> str | None:
        """Kernels need a device that runs them."""
        reason = why_not(trial.mesh.device, "ffn") if self.experts is FusedConfig else None
        return reason or super().why_not(trial)

    def build(self, trial: Trial) -> nn.Module:  # noqa: D102
        shape, mesh = trial.shape, trial.mesh
        config = MoEConfig(
            num_experts=shape.num_experts,
            router=TopKConfig(top_k=shape.top_k),
            capacity=CapacityConfig(factor=trial.factor),
            dispatch=self.dispatch,
            experts=self.experts(hidden_dim=shape.hidden_dim, activation="swiglu" if shape.gated else "gelu"),
            # Of a rank's own tokens, as DeepSpeed's: the other scope would add up counts over ranks.
            balance={"switch": SwitchConfig(coefficient=BALANCE, scope="micro_batch")},
            shared_hidden_dim=shape.shared_hidden_dim,
        )
        config.check_spread(mesh.ep.size)
        layer = config.build(shape.dim, device=mesh.device, dtype=shape.dtype)
        assert isinstance(config.router, TopKConfig)
        site = RouterSite(shape.dim, shape.num_experts, device=mesh.device, dtype=shape.dtype)
        router = PulledTopKRouter(config.router, site, trial.offset_TE)
        router.load_state_dict(layer.router.state_dict())
        layer.router = router
        layer.spread(Placement.in_order(shape.num_experts, mesh.ep.size), mesh.ep, mesh.dp)
        num_tokens = torch.tensor(shape.tokens * mesh.dp.size, device=mesh.device)
        ctx = TokenContext.of_rows(1, shape.tokens, device=mesh.device, num_tokens=num_tokens)
        return _Module(layer, ctx)


class _Module(nn.Module):
    """The layer as contenders are called."""

    def __init__(self, layer: nn.Module, ctx: TokenContext):
        super().__init__()
        self.layer, self.ctx = layer, ctx

    def forward(self, x_TD: Tensor) -> tuple[Tensor, ...]:
        output = self.layer(x_TD, self.ctx)
        report = output.report
        return output.out_TD, *(report.coefficients[name] * loss for name, loss in report.losses.items())


def ours() -> Moedist:
    """What the defaults choose."""
    return Moedist(OURS, AllToAllConfig(), GroupedConfig)


def twins() -> list[Moedist]:
    """The same layer, its parts exchanged for others of ours."""
    return [
        Moedist(f"{OURS}_loop", AllToAllConfig(), LoopConfig),
        Moedist(f"{OURS}_padded", PaddedConfig(), GroupedConfig),
    ]


def fused() -> list[Moedist]:
    """The same layer with its experts in kernels."""
    return [
        Moedist(f"{OURS}_fused", AllToAllConfig(), FusedConfig),
        Moedist(f"{OURS}_fused_padded", PaddedConfig(), FusedConfig),
    ]
