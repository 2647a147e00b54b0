"""The mixture-of-experts layer for one's own model: a list of modules, a router, and what one asks of a layer."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from moedist.moe.balance.switch import SwitchConfig
from moedist.moe.balance.z_loss import ZLossConfig
from moedist.moe.capacity import CapacityConfig
from moedist.moe.context import TokenContext
from moedist.moe.dispatch.all_to_all import AllToAllConfig
from moedist.moe.dispatch.contract import DispatchConfig
from moedist.moe.init import below, named_draw
from moedist.moe.layer import MoEConfig
from moedist.moe.modules import ModuleExperts
from moedist.moe.plan import plan_capacity
from moedist.moe.router.contract import Router, RouterConfig
from moedist.moe.router.topk import TopKConfig
from moedist.nn.config import MoELayerConfig
from moedist.nn.flat import gather_flat, scatter_flat
from moedist.nn.losses import AuxLossLayer
from moedist.nn.parts import check_parts, rows_for
from moedist.nn.router import ModuleRouter
from moedist.nn.usage import Diagnostics, Usage, UsageReport, WatchedMoE, usage_diagnostics


@runtime_checkable
class DiagnosticsProvider(Protocol):
    """A module that tells about itself."""

    def get_diagnostics(self) -> Diagnostics:
        """Numbers and words by name."""
        ...


class MoELayer(AuxLossLayer):
    """A layer of experts that are modules, and of a router that is one.

    ``output = activation(sum over chosen experts of gate * expert(x))``. Experts may be of unlike types and widths
    inside; all take ``in_features`` and give ``out_features``. No expert shares a parameter with another. They and the
    router are tried once on two rows of zeros, in evaluation mode, so that a wrong width is found here.

    The experts are spread over ranks as those of every layer: `moedist.parallel.spread_as_guest`, or ``spread``.

    Args:
        experts: at least one.
        router: from [T, in_features] to one score per expert, or the config of a router of moedist.
        in_features: width of the input.
        out_features: width of the output; None for that of the input.
        top_k: experts per token, of a router that is a module. None or 0: *dense*, every expert for every token,
            weighted with the softmax. (None is this project's word for none, 0 the one of many other libraries.) A
            config says its own.
        output_activation: applied to the sum; None for none.
        use_aux_loss: whether training computes the balance and the z-loss (see `aux_loss`). May be changed any time.
        aux_loss_weight: what the balance loss is to be multiplied by where it joins the task loss: `MoELoss` does it
            once, the layer never. 0.01 is a start. May be changed any time.
        capacity: how many pairs an expert takes; by default all.
        dispatch: how rows reach the experts; ``PaddedConfig()`` has static shapes, for `torch.compile` and export.
        layer: place of the layer in the model; names its noise.

    Raises:
        TypeError: an expert or the router is no module.
        ValueError: there is no expert, or a width or number does not fit.
    """

    _routed = "moe"

    def __init__(
        self,
        experts: Iterable[nn.Module],
        router: nn.Module | RouterConfig,
        in_features: int,
        out_features: int | None = None,
        *,
        top_k: int | None = None,
        output_activation: nn.Module | None = None,
        use_aux_loss: bool = False,
        aux_loss_weight: float = 0.01,
        capacity: CapacityConfig | None = None,
        dispatch: DispatchConfig | None = None,
        layer: int = 0,
    ):
        super().__init__()
        experts = list(experts)
        self.in_features = in_features
        self.out_features = in_features if out_features is None else out_features
        check_parts(experts, router, self.in_features, self.out_features, top_k)
        choice = router
        if not isinstance(choice, RouterConfig):
            choice = TopKConfig(top_k=top_k) if top_k else TopKConfig(mode="dense")
        dense = choice.experts_per_token(len(experts)) == len(experts)
        config = MoEConfig(
            num_experts=len(experts),
            router=choice,
            capacity=CapacityConfig(factor=None) if capacity is None else capacity,
            dispatch=AllToAllConfig() if dispatch is None else dispatch,
            # Their coefficients are not used: losses leave the layer as they are.
            balance={"switch": SwitchConfig(1.0, count="used" if dense else "all"), "z_loss": ZLossConfig(1.0)},
        )
        self.moe = WatchedMoE(
            config,
            self._router(router, choice, experts, layer),
            ModuleExperts(experts, self.out_features),
            layer=layer,
        )
        self.output_activation = output_activation
        self._numel_E = [sum(p.numel() for p in expert.parameters()) for expert in experts]
        self._usage: Usage | None = None
        self.set_up_losses(use_aux_loss, aux_loss_weight)

    @classmethod
    def from_config(
        cls,
        config: MoELayerConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> MoELayer:
        """The layer that a config describes, with torch's own first values (``torch.manual_seed`` names them)."""
        return cls(
            [config.expert(device=device, dtype=dtype) for _ in range(config.num_experts)],
            nn.Linear(config.in_features, config.num_experts, device=device, dtype=dtype),
            config.in_features,
            config.out_features,
            top_k=config.top_k,
            use_aux_loss=config.use_aux_loss,
            aux_loss_weight=config.aux_loss_weight,
        )

    def _router(
        self, router: nn.Module | RouterConfig, choice: RouterConfig, experts: list[nn.Module], layer: int
    ) -> Router:
        if not isinstance(router, RouterConfig):
            assert isinstance(choice, TopKConfig)
            return ModuleRouter(router, choice, len(experts), self.in_features, layer)
        like = rows_for(experts, 0, self.in_features)
        built = router.build(self.in_features, len(experts), layer=layer, device=like.device, dtype=like.dtype)
        built.init_weights(below(named_draw(0, f"layer.{layer}"), "router"))
        return built

    def forward(self, x: Tensor, ctx: TokenContext | None = None) -> Tensor:
        """[..., in_features] -> [..., out_features]; any number of dims from 1, and any of them may be 0.

        Args:
            x: of rank 3 or more, its first dim counts sequences (capacity ``group: sequence``).
            ctx: of the flattened positions: padding, and where they are in the run. None: all positions count, and the
                losses are means over this rank's.

        Raises:
            ValueError: the last dim is another, routing draws noise by the step and there is no ``ctx`` to name it, or
                ``ctx`` lets rows be left behind.
        """
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"the input's last dim must be in_features = {self.in_features}, got {list(x.shape)}")
        x_TD = x.reshape(math.prod(x.shape[:-1]), self.in_features)
        ctx = self._context(x) if ctx is None else ctx
        if ctx.may_spill:
            raise ValueError(
                "ctx.may_spill needs a caller who reads the report of every pass: take MoEConfig.build's layer"
            )
        report = None
        if torch.compiler.is_exporting():  # an exported graph has no use for a report, and no place to keep it
            routing = self.moe.router(x_TD, ctx)
            out_TD = self.moe.bank(x_TD, plan_capacity(routing, ctx, self.moe.config.capacity, layer=self.moe.layer))
        else:
            output = self.moe(x_TD, ctx)
            out_TD, report = output.out_TD, output.report
        out = out_TD.to(x.dtype).view(*x.shape[:-1], self.out_features)
        if self.output_activation is not None:
            out = self.output_activation(out)
        if report is None:
            return out
        assert isinstance(report, UsageReport)
        self._usage = report.usage
        return self.remember(out, report)

    def _context(self, x: Tensor) -> TokenContext:
        config = self.moe.config
        draws = config.router.draws_noise or config.capacity.drop_policy == "random"
        if self.training and draws:
            raise ValueError(
                "this routing draws numbers by the step: pass ctx=TokenContext.of_rows(..., step=step), or every step "
                "would draw the same"
            )
        rows = x.shape[0] if x.dim() > 2 else 1
        length = math.prod(x.shape[1:-1]) if x.dim() > 2 else math.prod(x.shape[:-1])
        return TokenContext.of_rows(rows, length, device=x.device, training=self.training)

    @property
    def num_experts(self) -> int:
        """Of the whole model, called or not."""
        return self.moe.config.num_experts

    @property
    def num_local_experts(self) -> int:
        """Of this rank."""
        return len(self.moe.bank.experts.expert_ids)

    @property
    def top_k(self) -> int:
        """Experts that a token runs through; all of them where routing is dense."""
        return self.moe.config.router.experts_per_token(self.num_experts)

    def num_parameters(self, *, local: bool = False) -> int:
        """Of router and experts: of the whole model, the same at every layout, or of this rank."""
        router = sum(parameter.numel() for parameter in self.moe.router.parameters())
        held = self.moe.bank.experts.expert_ids if local else range(self.num_experts)
        return router + sum(self._numel_E[expert] for expert in held)

    @property
    def supports_compile(self) -> bool:
        """Whether the layer is one graph for `torch.compile` and export: static shapes (``dispatch=PaddedConfig()``),
        and no part says ``supports_compile = False``."""
        parts = [module for module in self.moe.modules() if module is not self.moe]
        return self.moe.bank.static and all(getattr(part, "supports_compile", True) for part in parts)

    @property
    def supports_training(self) -> bool:
        """Whether the router, or an expert of this rank, has something to train."""
        return any(parameter.requires_grad for parameter in self.moe.parameters())

    @property
    def usage(self) -> Usage | None:
        """Of this rank in the last forward pass; None before."""
        return self._usage

    def get_auxiliary_loss_diagnostics(self) -> Diagnostics:
        """How the experts were used in the last forward pass, over all data-parallel ranks; collective: every rank must
        ask. Before any, ``status`` alone. The keys: `moedist.nn.usage.usage_diagnostics`."""
        if self._usage is None:
            return Diagnostics(status="no forward pass since the last reset")
        usage = self._usage.over(self.moe.dp)
        found = Diagnostics(num_experts=self.num_experts, batch_size=int(usage.num_tokens), top_k=self.top_k)
        found |= usage_diagnostics(usage, with_loss=self.use_aux_loss)
        return found

    def get_diagnostics(self) -> Diagnostics:
        """What the layer is, and `get_auxiliary_loss_diagnostics`; collective."""
        activation = self.output_activation
        found = Diagnostics(
            {
                "layer.type": type(self).__name__,
                "layer.input_shape": f"[..., {self.in_features}]",
                "layer.output_shape": f"[..., {self.out_features}]",
                "layer.parameter_count": self.num_parameters(),
                "layer.supports_training": str(self.supports_training),
                "layer.activation": "none" if activation is None else type(activation).__name__,
            }
        )
        found |= self.get_auxiliary_loss_diagnostics()
        return found

    def get_flat_parameters(self) -> Tensor:
        """[num_parameters()]: router, expert 0, expert 1, ... by global id; collective over the expert-parallel ranks.

        Raises:
            ValueError: FSDP has cut the weights.
        """
        return gather_flat(self.moe, self._numel_E)

    def set_flat_parameters(self, flat: Tensor) -> None:
        """The inverse; every rank is given the same vector.

        Raises:
            ValueError: its length is another, or FSDP has cut the weights. Nothing is changed then.
        """
        expected = self.num_parameters()
        if flat.shape != (expected,):
            raise ValueError(f"expected a vector of {expected} numbers, got one of shape {list(flat.shape)}")
        scatter_flat(self.moe, self._numel_E, flat)

    def clone(self) -> MoELayer:
        """A deep copy that shares nothing but the process groups, and remembers no forward pass."""
        return copy.deepcopy(self)

    def reset_state(self) -> None:
        """See the base; and the usage."""
        self._usage = None
        super().reset_state()

    def __getstate__(self) -> dict[str, Any]:
        """See the base; and without the usage."""
        return {**super().__getstate__(), "_usage": None}

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"{self.in_features} -> {self.out_features}, experts={self.num_experts}, top_k={self.top_k}"
