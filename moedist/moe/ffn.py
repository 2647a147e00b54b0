"""The function of a feed-forward expert, its weights stacked over experts, and the dense block of the same shape."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from moedist.config import require
from moedist.moe.experts.contract import Experts, ExpertsConfig, Rows
from moedist.moe.init import XAVIER, Draw, Xavier, piece_of

Activation = Literal["swiglu", "gelu", "relu"]


@dataclasses.dataclass(frozen=True)
class FFNExpertsConfig(ExpertsConfig):
    """Feed-forward experts, whichever way they are computed.

    Attributes:
        hidden_dim: width F between the matrices; None for 4 x dim.
        activation: ``swiglu`` (``(silu(x G) * x U) W``, three matrices; Shazeer 2020), ``gelu`` (exact) or ``relu``
            (two matrices).
        bias: whether the matrices have biases.
        init: first values of the matrices; biases start at zero.
    """

    hidden_dim: int | None = 128
    activation: Activation = "swiglu"
    bias: bool = False
    init: Xavier = "xavier_normal"

    def __post_init__(self) -> None:
        require(
            self.hidden_dim is None or self.hidden_dim >= 1,
            "hidden_dim",
            self.hidden_dim,
            "is no width",
            "Set it to 1 or more, or to null for 4 x model.dim.",
        )

    def width(self, dim: int) -> int:
        """F for vectors of width ``dim``."""
        return 4 * dim if self.hidden_dim is None else self.hidden_dim

    def expert_matmul_parameters(self, dim: int) -> int:  # noqa: D102
        return (3 if self.activation == "swiglu" else 2) * dim * self.width(dim)

    def expert_parameters(self, dim: int) -> int:  # noqa: D102
        num_up = 2 if self.activation == "swiglu" else 1
        return self.expert_matmul_parameters(dim) + (num_up * self.width(dim) + dim if self.bias else 0)


def activate(up: Tensor, gate: Tensor | None, activation: Activation) -> Tensor:
    """The hidden vector from the first product(s)."""
    if activation == "swiglu":
        assert gate is not None
        return F.silu(gate) * up
    return F.gelu(up) if activation == "gelu" else F.relu(up)


class StackedFFN(Experts):
    """The weights of FFN experts, stacked over this rank's experts; a subclass computes them.

    Attributes:
        up, gate: [e, D, F]; gate with ``swiglu`` only. (The matrix in front of silu, not a router's gate.)
        down: [e, F, D].
        up_bias, gate_bias, down_bias: [e, F], [e, F], [e, D]; with ``bias`` only.
    """

    NAMES = ("up", "gate", "down", "up_bias", "gate_bias", "down_bias")

    def __init__(
        self,
        config: FFNExpertsConfig,
        dim: int,
        num_experts: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ):
        super().__init__()
        self.config, self.dim, self.hidden_dim = config, dim, config.width(dim)
        self.expert_ids = tuple(range(num_experts))
        gated = config.activation == "swiglu"
        shapes = {
            "up": (dim, self.hidden_dim),
            "gate": (dim, self.hidden_dim) if gated else None,
            "down": (self.hidden_dim, dim),
            "up_bias": (self.hidden_dim,) if config.bias else None,
            "gate_bias": (self.hidden_dim,) if config.bias and gated else None,
            "down_bias": (dim,) if config.bias else None,
        }
        for name in self.NAMES:
            shape = shapes[name]
            value = None if shape is None else torch.empty(num_experts, *shape, device=device, dtype=dtype)
            self.register_parameter(name, None if value is None else nn.Parameter(value))

    def weight(self, name: str) -> Tensor | None:
        """This rank's part of a stacked weight: [e, ...]."""
        value = getattr(self, name)
        return value.to_local() if isinstance(value, DTensor) else value

    def keep(self, expert_ids: Sequence[int]) -> None:
        """Slices every weight to the given experts."""
        place = {expert: index for index, expert in enumerate(self.expert_ids)}
        index = torch.tensor([place[expert] for expert in expert_ids], dtype=torch.int64)
        for name, value in list(self.named_parameters(recurse=False)):
            assert not isinstance(value, DTensor), "keep experts before sharding them"
            kept = value.detach().index_select(0, index.to(value.device))
            setattr(self, name, nn.Parameter(kept, requires_grad=value.requires_grad))
        self.expert_ids = tuple(expert_ids)

    def init_weights(self, draw: Draw) -> None:
        """Matrices of standard deviation sqrt(2 / (D + F)), zero biases."""
        fill = XAVIER[self.config.init]
        with torch.no_grad():
            for name in self.NAMES:
                if getattr(self, name) is None:
                    continue
                rows, (row_of_expert, *place) = piece_of(getattr(self, name))
                first = row_of_expert.start or 0
                for index, row in enumerate(rows, first):
                    if name.endswith("bias"):
                        row.zero_()
                        continue
                    # A DTensor's rows count through the slots of all ranks, of which this rank's are expert_ids.
                    expert = self.expert_ids[index % len(self.expert_ids)]
                    whole = torch.empty(getattr(self, name).shape[1:])
                    row.copy_(fill(whole, generator=draw(f"expert.{expert}.{name}"))[tuple(place)])

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"experts={len(self.expert_ids)}, dim={self.dim}, hidden_dim={self.hidden_dim}, {self.config.activation}"


def run_one_by_one(experts: StackedFFN, x_RD: Tensor, gate_R: Tensor, sizes: Sequence[int]) -> Tensor:
    """``gate * expert(x)`` with one set of matrix products per expert: obvious, any dtype, any size.

    An expert without rows multiplies an empty matrix, which gives its weights a zero gradient. Rows behind the last
    expert's are zeros.
    """
    names = [name for name in StackedFFN.NAMES if experts.weight(name) is not None]
    dtype = x_RD.dtype
    weights = {name: experts.weight(name).to(dtype) for name in names}  # type: ignore[union-attr]
    if not experts.expert_ids:  # a rank without experts: its empty weights take part all the same
        return x_RD + torch.stack([weight.sum() for weight in weights.values()]).sum()
    unbound = {name: weight.unbind(0) for name, weight in weights.items()}
    outputs = []
    num_empty = x_RD.shape[0] - sum(sizes)
    x_of, gate_of = (part_R[: sum(sizes)].split(list(sizes)) for part_R in (x_RD, gate_R))
    for index, (x, weight_of_row) in enumerate(zip(x_of, gate_of, strict=True)):
        part = {name: unbound[name][index] for name in names}
        up = product(x, part["up"], part.get("up_bias"))
        gate = product(x, part["gate"], part.get("gate_bias")) if "gate" in part else None
        # The row's weight goes in before the down-projection, where the row is saved anyway.
        hidden = activate(up, gate, experts.config.activation) * weight_of_row[:, None]
        output = hidden.to(dtype) @ part["down"]
        if "down_bias" in part:
            output = output + (weight_of_row[:, None] * part["down_bias"]).to(dtype)
        outputs.append(output)
    return torch.cat([*outputs, outputs[0].new_zeros(num_empty, outputs[0].shape[1])] if num_empty else outputs)


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight + bias`` for [rows, in] and [in, out]."""
    return x @ weight if bias is None else torch.addmm(bias, x, weight)


def bias_of_rows(bias: Tensor, rows: Rows) -> Tensor:
    """[R, ...]: each row's expert's entry of ``bias`` [e, ...]; zero for rows past the last end, whose gradients may be
    anything."""
    row_R = torch.arange(rows.x_RD.shape[0], device=bias.device, dtype=rows.ends_e.dtype)
    expert_R = torch.searchsorted(rows.ends_e, row_R, right=True)
    nothing = bias.new_zeros(1, *bias.shape[1:])
    return torch.cat([bias, nothing])[expert_R]


class SharedExpert(nn.Module):
    """One expert that every token runs through, beside the routed ones (DeepSeekMoE, Dai et al. 2024)."""

    def __init__(self, experts: StackedFFN):
        super().__init__()
        self.expert = experts

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        ones_T = torch.ones(x_TD.shape[0], device=x_TD.device, dtype=x_TD.dtype)
        return run_one_by_one(self.expert, x_TD, ones_T, [x_TD.shape[0]])

    def init_weights(self, draw: Draw) -> None:
        """As a routed expert's."""
        self.expert.init_weights(draw)
