"""SonicMoE's layer, its router's map pulled like all others'."""

from __future__ import annotations

from torch import Tensor, nn

from moedist.bench.peer.contract import Peer, PulledRouter, WithShared
from moedist.bench.trial import Trial


class SonicMoE(Peer):
    """CuTe kernels for Hopper and later."""

    name, package, module = "sonicmoe", "sonic-moe", "sonicmoe"
    needs_cuda = True
    about = "sonicmoe.MoE"

    def why_not(self, trial: Trial) -> str | None:
        """Gated experts are what it is compared in."""
        return super().why_not(trial) or (None if trial.shape.gated else "is compared with gated experts only")

    def build(self, trial: Trial) -> nn.Module:  # noqa: D102
        return WithShared(trial, SonicMoELayer(trial))


class PulledMap(nn.Module):
    """Logits as its own router makes them, and the pull."""

    def __init__(self, trial: Trial):
        super().__init__()
        self.router = PulledRouter(trial)

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] -> [T, E]."""
        return self.router.logits(x_TD).to(x_TD.dtype)


class SonicMoELayer(nn.Module):
    """The library's layer."""

    def __init__(self, trial: Trial):
        super().__init__()
        from sonicmoe import KernelBackendMoE, MoE
        from sonicmoe.enums import ActivationType

        shape = trial.shape
        self.layer = MoE(
            num_experts=shape.num_experts,
            num_experts_per_tok=shape.top_k,
            hidden_size=shape.dim,
            intermediate_size=shape.hidden_dim,
            activation_function=ActivationType.SWIGLU,
            add_bias=False,
            std=0.02,
        ).to(trial.mesh.device, shape.dtype)
        self.layer.router = PulledMap(trial)
        self.backend = KernelBackendMoE.sonicmoe

    def forward(self, x_TD: Tensor) -> tuple[Tensor]:
        """[T, D] -> [T, D]; its auxiliary loss has no weight of its own, so it is left out."""
        out_TD, _ = self.layer(x_TD, kernel_backend_moe=self.backend)
        return (out_TD,)


PEERS = [SonicMoE()]
