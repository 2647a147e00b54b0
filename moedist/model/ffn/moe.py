"""A mixture-of-experts layer as the feed-forward half of a block."""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import torch
from torch import Tensor

from moedist.config import ConfigError, require
from moedist.model.ffn.contract import FFN, FFNConfig, FFNOutput
from moedist.moe.context import TokenContext
from moedist.moe.layer import MoEConfig


@dataclasses.dataclass(frozen=True)
class MoEFFNConfig(FFNConfig):
    """A MoE layer.

    Attributes:
        moe: the layer; None for the run's own (``moe``). In a run's configuration it says only what differs from that
            (`moedist.launch.compose.with_layers_completed`).
    """

    moe: MoEConfig | None = None

    def check_causal(self, moe: MoEConfig | None) -> None:
        """Refuses routers in which other tokens decide where a token goes."""
        checked = self.moe or moe
        if checked is None:
            return
        router = checked.router
        require(
            router.causal,
            "moe.router.kind",
            router.kind,
            "lets later tokens, or other rows of the batch, decide where a token goes, and the model is causal: it "
            "would see the future in training and miss it in generation",
            "Choose a token-choice router (moe/router=topk, noisy, mlp, cosine or hash).",
        )

    def check_beside(self, moe: MoEConfig) -> None:
        """All layers of a model have equally many experts, and a loss that is taken over all of them alike."""
        own = self.moe or moe
        require(
            own.num_experts == moe.num_experts,
            "moe.num_experts",
            own.num_experts,
            f"is not the {moe.num_experts} of the run's layer, and loads of all layers are one table",
            "Set moe.num_experts and the layer's own to the same number, or leave the layer's out.",
        )
        for name in dict.fromkeys([*own.balance, *moe.balance]):
            pair = own.balance.get(name), moe.balance.get(name)
            require(
                pair[0] == pair[1] or not any(balance is not None and balance.of_all_layers for balance in pair),
                f"moe.balance.{name}",
                name,
                "is one loss of all layers together, and this layer has it unlike the run's",
                f"Set it in the run's moe.balance.{name} alone, or its layers to each.",
            )

    def check_spread(self, ep: int, ranks_per_node: int | None = None) -> None:
        """The run's own layer is checked by the run."""
        if self.moe is not None:
            try:
                self.moe.check_spread(ep, ranks_per_node)
            except ConfigError as error:
                raise error.under("moe") from None

    def build(
        self,
        dim: int,
        *,
        layer: int,
        moe: MoEConfig,
        output_scale: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> MoEFFN:
        """Builds the module; arguments as in the contract."""
        return MoEFFN(self.moe or moe, dim, layer, device, dtype)


class MoEFFN(FFN):
    """A MoE layer on the positions of a micro-batch. Child: moe."""

    has_report = True

    def __init__(
        self,
        config: MoEConfig,
        dim: int,
        layer: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ):
        super().__init__()
        self.moe = config.build(dim, layer=layer, device=device, dtype=dtype)
        self.share = Fraction(config.router.experts_per_token(config.num_experts), config.num_experts)

    def forward(self, x_BSD: Tensor, context: TokenContext) -> FFNOutput:
        """[B, S, D] -> [B, S, D]; the layer sees x_TD, row after row."""
        output = self.moe(x_BSD.flatten(0, 1), context)
        return FFNOutput(output.out_TD.view_as(x_BSD), output.report)

    def active_shares(self) -> dict[str, Fraction]:
        """A token meets the experts that the router gives it."""
        return {"moe.bank": self.share}
