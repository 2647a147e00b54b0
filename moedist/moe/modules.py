"""Experts that are modules of any kind, each of its own shape."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moedist.moe.experts.contract import Experts, Rows
from moedist.moe.init import Draw


class ModuleExperts(Experts):
    """Experts one after the other, each an `nn.Module` from [rows, in] to [rows, out].

    Their parameters are named by global id (``expert.17.weight``), on whatever rank they live; weights of unlike shapes
    are no stack, so spreading leaves them plain tensors. Every rank must begin with the same values.

    Attributes:
        expert: the modules by global id.
        out_features: width of what every expert gives.
        num_experts: as many as were given, wherever they live now.
    """

    def __init__(self, experts: Iterable[nn.Module], out_features: int):
        super().__init__()
        self.expert = nn.ModuleDict({str(place): module for place, module in enumerate(experts)})
        self.out_features, self.num_experts = out_features, len(self.expert)
        self.expert_ids = tuple(range(self.num_experts))
        self._refuse_shared()

    def forward(self, rows: Rows) -> Tensor:
        """[R, out]: ``gate * expert(x)``. An expert without rows is not called; its parameters get zero gradients."""
        sizes = list(rows.read_sizes())
        num_empty = rows.x_RD.shape[0] - sum(sizes)
        parts: list[Tensor] = []
        idle: list[Tensor] = []
        x_of, gate_of = (part_R[: sum(sizes)].split(sizes) for part_R in (rows.x_RD, rows.gate_R))
        for place, (x, gate) in enumerate(zip(x_of, gate_of, strict=True)):
            module = self.expert[str(self.expert_ids[place])]
            if x.shape[0] == 0:
                idle += [parameter for parameter in module.parameters() if parameter.requires_grad]
            else:
                parts.append((self.call(place, x) * gate[:, None]).to(x.dtype))
        if parts:
            y_RD = torch.cat([*parts, parts[0].new_zeros(num_empty, self.out_features)] if num_empty else parts)
        else:  # of the rows' graph all the same: what sends them home must be heard by its backward too
            y_RD = rows.x_RD.new_zeros(num_empty, self.out_features) * rows.gate_R[:, None].to(rows.x_RD.dtype)
        if len(self.expert_ids) < self.num_experts:
            # Frozen or not, an expert's rank takes part in the exchange of gradients: other ranks' may not be frozen.
            idle.append(rows.gate_R.new_zeros((), requires_grad=torch.is_grad_enabled()))
        return TakePart.apply(y_RD, *idle) if idle else y_RD

    def call(self, place: int, x: Tensor) -> Tensor:
        """[rows, out] of one expert; narrow rows at wide weights under autocast.

        Raises:
            ValueError: another shape came out.
        """
        expert = self.expert_ids[place]
        module = self.expert[str(expert)]
        weight = next((p for p in module.parameters() if p.is_floating_point()), x)
        narrow = x.dtype in (torch.bfloat16, torch.float16) and weight.dtype != x.dtype
        with torch.autocast(x.device.type, dtype=x.dtype) if narrow else contextlib.nullcontext():
            y = module(x)
        if y.shape != (x.shape[0], self.out_features):
            raise ValueError(
                f"expert {expert} made {list(y.shape)} of {list(x.shape)}; it must make "
                f"{[x.shape[0], self.out_features]}"
            )
        return y

    def keep(self, expert_ids: Sequence[int]) -> None:
        """Drops all modules but those."""
        self.expert = nn.ModuleDict({str(expert): self.expert[str(expert)] for expert in expert_ids})
        self.expert_ids = tuple(expert_ids)

    def init_weights(self, draw: Draw) -> None:
        """Nothing: they keep the values that they came with."""

    def _refuse_shared(self) -> None:
        """On other ranks the copies of one parameter would part."""
        owner: dict[nn.Parameter, str] = {}
        for name, module in self.expert.items():
            for parameter in module.parameters():
                if owner.setdefault(parameter, name) != name:
                    raise ValueError(
                        f"experts {owner[parameter]} and {name} share a parameter of {list(parameter.shape)}; give "
                        "each expert its own (copy.deepcopy)"
                    )


class TakePart(torch.autograd.Function):
    """The first argument as it is; the others get zero gradients."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, *idle: Tensor) -> Tensor:
        ctx.save_for_backward(*idle)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *(torch.zeros_like(parameter) for parameter in ctx.saved_tensors)
