"""The mixture of attention experts for one's own model."""

from __future__ import annotations

import dataclasses
import enum

import torch
from torch import Tensor

from moedist.config import Config, require
from moedist.model.attention.bank import BankKind
from moedist.model.attention.experts.contract import AttentionExpertConfig, Sight, SparseEdges
from moedist.model.attention.experts.edge_featured import EdgeFeaturedConfig
from moedist.model.attention.experts.hyperbolic import HyperbolicConfig
from moedist.model.attention.experts.linear import LinearConfig
from moedist.model.attention.experts.standard import StandardConfig
from moedist.model.attention.mixture import AttentionMixture, MixtureConfig
from moedist.moe.balance.switch import SwitchConfig
from moedist.moe.balance.z_loss import ZLossConfig
from moedist.moe.capacity import CapacityConfig
from moedist.moe.context import TokenContext
from moedist.moe.init import named_draw
from moedist.moe.plan import CapacityPlan
from moedist.moe.router.mlp import MLPConfig
from moedist.nn.losses import AuxLossLayer


class ExpertType(enum.StrEnum):
    """The kinds of attention experts."""

    STANDARD = "standard"
    HYPERBOLIC = "hyperbolic"
    LINEAR = "linear"
    EDGE_FEATURED = "edge_featured"


@dataclasses.dataclass(frozen=True)
class MoEAttentionConfig(Config):
    """A mixture of attention experts behind a router with a hidden layer.

    >>> MoEAttentionConfig(dim=64, num_heads=4, num_experts=2, expert_types=("standard", "linear")).expert_types[1]
    <ExpertType.LINEAR: 'linear'>

    Attributes:
        dim: width of queries, keys, values and output.
        num_heads: heads of each expert.
        num_experts: as many as ``expert_types``.
        top_k: experts per query.
        expert_types: one after the other; an expert's place is its id. They may repeat.
        router_hidden_dim: width inside of the router.
        router_temperature: above 1 flattens gates, below 1 sharpens them; which experts are chosen stays.
        load_balance_coef: what the balance loss is multiplied by, once; 0.01 to 0.1 is common.
        dropout: share of attention weights that is dropped in training.
        edge_dim: width of edge features.
        capacity: how many queries an expert takes; by default all.
        bank: how experts lie on expert-parallel ranks, see `moedist.model.attention.mixture.MixtureConfig`.
    """

    dim: int = 512
    num_heads: int = 8
    num_experts: int = 4
    top_k: int = 2
    expert_types: tuple[ExpertType, ...] = tuple(ExpertType)
    router_hidden_dim: int = 256
    router_temperature: float = 1.0
    load_balance_coef: float = 0.01
    dropout: float = 0.1
    edge_dim: int = 16
    capacity: CapacityConfig = dataclasses.field(default_factory=lambda: CapacityConfig(factor=None))
    bank: BankKind = "auto"

    def __post_init__(self) -> None:
        object.__setattr__(self, "expert_types", tuple(ExpertType(kind) for kind in self.expert_types))
        if len(self.expert_types) != self.num_experts:
            raise ValueError(
                f"Number of expert types must match num_experts: {len(self.expert_types)} types, {self.num_experts} "
                "experts"
            )
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k must be <= num_experts: {self.top_k} > {self.num_experts}")
        require(self.top_k >= 1, "top_k", self.top_k, "picks no expert", "Set it to 1 or more.")
        weight = self.load_balance_coef
        require(weight >= 0, "load_balance_coef", weight, "rewards imbalance", "Set it to 0 or more.")
        self.mixture().check_width(self.dim)

    def mixture(self) -> MixtureConfig:
        """The same as the core mixture has it."""
        return MixtureConfig(
            num_heads=self.num_heads,
            experts=tuple(self.expert(kind) for kind in self.expert_types),
            router=MLPConfig(top_k=self.top_k, hidden_dim=self.router_hidden_dim, temperature=self.router_temperature),
            capacity=self.capacity,
            # Unscaled: the layer's own coefficient may change at run time.
            balance={"switch": SwitchConfig(1.0), "z_loss": ZLossConfig(1.0)},
            dropout=self.dropout,
            bank=self.bank,
        )

    def expert(self, kind: ExpertType) -> AttentionExpertConfig:
        """One expert of a kind, with the kind's own defaults."""
        if kind is ExpertType.EDGE_FEATURED:
            return EdgeFeaturedConfig(edge_dim=self.edge_dim)
        kinds = {
            ExpertType.STANDARD: StandardConfig,
            ExpertType.HYPERBOLIC: HyperbolicConfig,
            ExpertType.LINEAR: LinearConfig,
        }
        return kinds[kind]()


@dataclasses.dataclass(frozen=True)
class MoEAttentionOutput:
    """What the layer returns.

    Attributes:
        output: [B, S, D].
        attention_weights: [B, H, S, S_key] of each expert that had a query, by its id, zero in rows of other queries;
            None where nobody asked.
        gates: [B, S, E], 0 at experts that did not compute the query.
        indices: [B, S, K], each query's experts in falling order of preference, before any limit.
        aux_loss: 0-dim, ``load_balance_coef`` x balance loss, to be added to the task's as it is; 0 in evaluation.
    """

    output: Tensor
    attention_weights: dict[int, Tensor] | None
    gates: Tensor
    indices: Tensor
    aux_loss: Tensor


class MoEAttention(AuxLossLayer):
    """Each query is routed to ``top_k`` attention experts, which take from all keys; their outputs are summed by gate
    and projected once.

    Has what `moedist.nn.AuxLossModule` asks for, so that a loss that collects from modules finds it; then don't add
    ``output.aux_loss`` as well. Over ranks: ``moedist.parallel.spread``. First values follow `torch.manual_seed`.

    Attributes:
        mixture: the core layer.
        aux_loss_weight: begins as ``load_balance_coef``.

    Raises:
        ValueError: sizes that do not fit together.
    """

    _routed = "mixture"

    def __init__(
        self,
        config: MoEAttentionConfig | None = None,
        *,
        layer: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.config = config = config or MoEAttentionConfig()
        self.mixture: AttentionMixture = config.mixture().build_mixture(
            config.dim, layer=layer, device=device, dtype=dtype
        )
        self._num_parameters = sum(parameter.numel() for parameter in self.mixture.parameters())
        if not self.mixture.output_weight.is_meta:
            seed = int(torch.randint(2**62, ()))
            self.mixture.init_weights(named_draw(seed, f"layer.{layer}"))
        self.set_up_losses(True, config.load_balance_coef)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        edge_features: Tensor | SparseEdges | None = None,
        *,
        causal: bool = False,
        mask: Tensor | None = None,
        key_valid: Tensor | None = None,
        need_weights: bool = False,
        ctx: TokenContext | None = None,
    ) -> MoEAttentionOutput:
        """[B, S, D] queries, keys and values; numbers of queries and keys may differ.

        Args:
            key: None for the queries. value: None for the keys.
            edge_features: [B, S, S_key, edge_dim], or `SparseEdges`.
            causal: whether a query sees keys up to its own place only.
            mask: true where a query sees a key, or floating and added to scores; [B or 1, H or 1, S, S_key].
            key_valid: bool [B, S_key], false at padding, which nobody sees; in self-attention no query either.
            need_weights: whether to return attention weights, B H S S_key numbers per expert.
            ctx: of the queries; it names them in a run, so that what is random is drawn by name.

        Raises:
            ValueError: a width is another, or a kind cannot have a mask.
        """
        is_self = key is None
        key = query if key is None else key
        value = key if value is None else value
        for name, given in {"query": query, "key": key, "value": value}.items():
            if given.dim() != 3 or given.shape[-1] != self.config.dim:
                raise ValueError(f"{name} must be [batch, length, dim = {self.config.dim}], got {list(given.shape)}")
        sight = Sight(causal=causal, key_valid_BS=key_valid, mask_BHQS=mask, edges=edge_features)
        named, (num_rows, length, _) = ctx is not None, query.shape
        if ctx is None:
            valid_T = key_valid.flatten() if is_self and key_valid is not None else None
            ctx = TokenContext.of_rows(num_rows, length, device=query.device, valid_T=valid_T, training=self.training)
        mixed = self.mixture(query, key, value, sight, ctx, need_weights, named)
        out_BQD = self.remember(mixed.out_BQD.to(query.dtype), mixed.report)
        num_experts = self.config.num_experts
        return MoEAttentionOutput(
            output=out_BQD,
            attention_weights=mixed.weights,
            gates=gates_of(mixed.plan, num_rows * length).view(num_rows, length, num_experts),
            indices=mixed.routing.expert_N.view(num_rows, length, self.config.top_k),
            aux_loss=self.get_aux_loss(),
        )

    def get_aux_loss(self) -> Tensor:
        """0-dim: ``aux_loss_weight * aux_loss``."""
        return self.aux_loss_weight * self.aux_loss

    def num_parameters(self) -> int:
        """Of the whole layer: router, all experts, output projection; wherever the experts lie."""
        return self._num_parameters


def gates_of(plan: CapacityPlan, num_tokens: int) -> Tensor:
    """[T, E]: the weight of each expert's output, 0 where it does not compute the token."""
    shape = (num_tokens, plan.asked_E.shape[0])
    pair_N = plan.token_N * shape[1] + plan.expert_N
    return plan.gate_N.new_zeros(shape[0] * shape[1]).index_add(0, pair_N, plan.gate_N).view(shape)


def usage_loss(gates: Tensor) -> Tensor:
    """0-dim: ``E sum_i u_i^2``, u_i being expert i's mean gate: 1 where use is even, E where one expert has all.

    An older form of balance loss than Switch's, on gates alone. Where gates sum to 1 it is 1 + the squared coefficient
    of variation of the experts' gates, so its gradient is that of an importance loss. Unscaled.

    Args:
        gates: [..., E].
    """
    used_E = gates.flatten(0, -2).mean(0)
    return gates.shape[-1] * used_E.square().sum()
