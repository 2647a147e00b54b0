"""The mixture-of-experts layer: a router proposes, the plan disposes, the bank computes."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from moedist.config import Config, ConfigError, require
from moedist.mesh import Axis
from moedist.moe.balance.contract import BalanceConfig
from moedist.moe.balance.switch import SwitchConfig
from moedist.moe.balance.z_loss import ZLossConfig
from moedist.moe.bank.contract import BankConfig
from moedist.moe.bank.dispatched import DispatchedConfig
from moedist.moe.capacity import CapacityConfig
from moedist.moe.context import TokenContext
from moedist.moe.dispatch.all_to_all import AllToAllConfig
from moedist.moe.dispatch.contract import DispatchConfig
from moedist.moe.experts.contract import Experts, ExpertsConfig
from moedist.moe.experts.grouped import GroupedConfig
from moedist.moe.experts.loop import LoopConfig
from moedist.moe.ffn import SharedExpert
from moedist.moe.init import Draw, below, named_draw
from moedist.moe.noise import dropped_out
from moedist.moe.placement import Placement
from moedist.moe.plan import plan_capacity
from moedist.moe.report import MoEReport
from moedist.moe.routed import RoutedLayer, check_routing
from moedist.moe.router.contract import Router, RouterConfig
from moedist.moe.router.topk import TopKConfig


def _default_balance() -> dict[str, BalanceConfig]:
    return {"switch": SwitchConfig(), "z_loss": ZLossConfig()}


@dataclasses.dataclass(frozen=True)
class MoEConfig(Config):
    """One mixture-of-experts layer.

    >>> layer = MoEConfig(num_experts=4).build(dim=16)
    >>> layer(torch.zeros(6, 16), TokenContext.of_rows(2, 3)).out_TD.shape
    torch.Size([6, 16])

    Attributes:
        num_experts: experts of the layer over all ranks (E).
        router, capacity, dispatch, experts, bank: the layer's parts; see each.
        balance: losses by name; a layer may have several, or none.
        shared_hidden_dim: width of an expert that every token runs through beside the routed ones; None for none.
        dropout: share of the output's elements, of routed and shared experts together, that training sets to 0.
    """

    num_experts: int = 8
    router: RouterConfig = dataclasses.field(default_factory=TopKConfig)
    capacity: CapacityConfig = dataclasses.field(default_factory=CapacityConfig)
    dispatch: DispatchConfig = dataclasses.field(default_factory=AllToAllConfig)
    experts: ExpertsConfig = dataclasses.field(default_factory=GroupedConfig)
    bank: BankConfig = dataclasses.field(default_factory=DispatchedConfig)
    balance: dict[str, BalanceConfig] = dataclasses.field(default_factory=_default_balance)
    shared_hidden_dim: int | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        require(self.num_experts >= 1, "num_experts", self.num_experts, "is no expert", "Set it to 1 or more.")
        require(
            self.shared_hidden_dim is None or self.shared_hidden_dim >= 1,
            "shared_hidden_dim",
            self.shared_hidden_dim,
            "is no width",
            "Set it to 1 or more, or to null for no shared expert.",
        )
        require(0 <= self.dropout < 1, "dropout", self.dropout, "is no share to drop", "Set it in [0, 1); 0 for none.")
        check_routing(self)

    def check_spread(self, ep: int, ranks_per_node: int | None = None) -> None:
        """Raises `ConfigError` where the layer cannot be spread.

        Args:
            ep: expert-parallel ranks.
            ranks_per_node: ranks that share a node; None: all.
        """
        divisors = [n for n in range(1, self.num_experts + 1) if self.num_experts % n == 0]
        require(
            self.num_experts % ep == 0,
            "num_experts",
            self.num_experts,
            f"cannot be cut into {ep} equal parts (mesh.ep = {ep})",
            f"Set mesh.ep to one of {divisors}, or moe.num_experts to a multiple of {ep}.",
        )
        try:
            self.bank.check_spread(ep)
        except ConfigError as error:
            raise error.under("bank") from None
        try:
            self.dispatch.check_nodes(ep, ranks_per_node or ep)
        except ConfigError as error:
            raise error.under("dispatch") from None

    def build(
        self,
        dim: int,
        *,
        layer: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> MoE:
        """A layer for [*, dim] vectors on one device, initialised unless it is on the meta device; ``layer`` is its
        place in the model and names its noise."""
        moe = MoE(
            self,
            self.router.build(dim, self.num_experts, layer=layer, device=device, dtype=dtype),
            self.experts.build(dim, self.num_experts, device=device, dtype=dtype),
            layer=layer,
            shared=self.build_shared(dim, device, dtype),
        )
        if not any(parameter.is_meta for parameter in moe.parameters()):
            moe.init_weights(named_draw(0, f"layer.{layer}"))
        return moe

    def build_shared(
        self, dim: int, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> SharedExpert | None:
        """The expert that every token runs through, of the kind of the routed ones."""
        if self.shared_hidden_dim is None:
            return None
        shared = LoopConfig(
            hidden_dim=self.shared_hidden_dim,
            activation=getattr(self.experts, "activation", "swiglu"),
            bias=getattr(self.experts, "bias", False),
            init=getattr(self.experts, "init", "xavier_normal"),
        )
        return SharedExpert(shared.build(dim, 1, device=device, dtype=dtype))


@dataclasses.dataclass(frozen=True)
class MoEOutput:
    """What a layer returns: the output and its account."""

    out_TD: Tensor
    report: MoEReport


class MoE(RoutedLayer):
    """Router, plan, bank, report. Written for one device; `spread` moves the bank's experts over ranks.

    Args:
        config: of everything but ``router`` and ``experts``, which may be others than it would build.
        router: of as many experts as ``config`` has.
        experts: all of them.
        layer: place of the layer in the model; names its noise.
        shared: an expert that every token runs through beside the routed ones.
    """

    config: MoEConfig

    def __init__(
        self,
        config: MoEConfig,
        router: Router,
        experts: Experts,
        *,
        layer: int = 0,
        shared: SharedExpert | None = None,
    ):
        super().__init__(config, router, layer)
        self.bank = config.bank.build(experts, config.dispatch)
        self.shared = shared

    def forward(self, x_TD: Tensor, ctx: TokenContext) -> MoEOutput:
        """[T, D] -> [T, D] and the report of what happened to every pair."""
        routing = self.router(x_TD, ctx)
        plan = plan_capacity(routing, ctx, self.config.capacity, layer=self.layer)
        out_TD = self.bank(x_TD, plan).to(x_TD.dtype)
        if self.shared is not None:
            out_TD = out_TD + self.shared(x_TD)
        out_TD = dropped_out(out_TD, self.config.dropout, ctx, layer=self.layer)
        report = self.report(routing, plan, ctx)
        return MoEOutput(out_TD, dataclasses.replace(report, spilled=self.bank.spilled(plan)))

    def spread(self, placement: Placement, ep: Axis, dp: Axis) -> None:
        """Keeps this rank's experts; rows travel over ``ep``, global counts over ``dp`` from now on."""
        self.bank.spread(placement, ep)
        self.dp = dp

    def init_weights(self, draw: Draw) -> None:
        """Fills router, experts (by global id) and shared expert from named draws."""
        self.router.init_weights(below(draw, "router"))
        self.bank.init_weights(below(draw, "bank.experts"))
        if self.shared is not None:
            self.shared.init_weights(below(draw, "shared"))


def routing_label(model: nn.Module) -> str | None:
    """What every line and record of a run must say of its routing (forced, for one); None for a model's own."""
    layers = (module for module in model.modules() if isinstance(module, RoutedLayer))
    labels = dict.fromkeys(layer.config.router.label for layer in layers)
    return ", ".join(label for label in labels if label is not None) or None


def experts_notes(model: nn.Module, device: torch.device, dtype: torch.dtype) -> list[str]:
    """`Experts.note` of all layers of a model, each line once."""
    banks = (module.bank for module in model.modules() if isinstance(module, MoE))
    notes = dict.fromkeys(bank.experts.note(device, dtype, bank.static) for bank in banks)
    return [note for note in notes if note is not None]
