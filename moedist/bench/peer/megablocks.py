"""MegaBlocks' dropless experts behind a plain router."""

from __future__ import annotations

from torch import Tensor, nn

from moedist.bench.peer.contract import Peer, PulledRouter, WithShared
from moedist.bench.trial import Trial


class MegaBlocks(Peer):
    """Grouped products on padded blocks."""

    name = package = "megablocks"
    needs_cuda = True
    about = "dMoE, mlp_impl grouped"

    def why_not(self, trial: Trial) -> str | None:
        """Its two-matrix experts are of another shape."""
        return super().why_not(trial) or (None if trial.shape.gated else "is compared with gated experts only")

    def build(self, trial: Trial) -> nn.Module:  # noqa: D102
        return WithShared(trial, MegaBlocksLayer(trial))


class MegaBlocksLayer(nn.Module):
    """``dMoE``'s experts."""

    def __init__(self, trial: Trial):
        super().__init__()
        from megablocks import Arguments, dMoE
        from torch.nn import functional as F

        shape = trial.shape
        layer = dMoE(
            Arguments(
                hidden_size=shape.dim,
                ffn_hidden_size=shape.hidden_dim,
                moe_num_experts=shape.num_experts,
                moe_top_k=shape.top_k,
                mlp_type="glu",
                mlp_impl="grouped",
                activation_fn=F.silu,
                bias=False,
                return_bias=False,
                device=trial.mesh.device,
                bf16=True,
                fp16=False,
            )
        )
        self.router, self.experts = PulledRouter(trial), layer.experts.to(trial.mesh.device, shape.dtype)

    def forward(self, x_TD: Tensor) -> tuple[Tensor]:
        """[T, D] -> [T, D]; the library wants [S, B, D]."""
        weight_TK, expert_TK = self.router(x_TD)
        out_SBD = self.experts(x_TD[:, None], None, weight_TK.to(x_TD.dtype), expert_TK)
        return (out_SBD.view_as(x_TD),)


PEERS = [MegaBlocks()]
