"""Where query rows and attention experts meet.

An attention expert needs the whole sequence of keys and values, so rows stay where they are and weights come to them:
a rank holds all experts (`ReplicatedBank`), or some of them and is sent the others' weights (`GatheredBank`).
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call

from moedist.mesh import Axis
from moedist.mesh.collectives import gather_beside
from moedist.model.attention.experts.contract import (
    Attended,
    AttentionExpert,
    AttentionExpertConfig,
    ExpertSite,
    Sight,
)
from moedist.moe.init import Draw, below
from moedist.moe.placement import Placement
from moedist.moe.plan import CapacityPlan

Attend = Callable[..., Attended]
"""The forward pass of an `AttentionExpert`."""
BankKind = Literal["auto", "replicated", "gathered"]


class Mixed(NamedTuple):
    """What a bank returns.

    Attributes:
        out_BQD: each query's sum over its kept pairs of ``gate * expert(query)``; zero without one.
        weights: for each expert that had rows, by its global id, what its rows took from the keys: [B, H, Q, S], zero
            in all other rows. None where nobody asked.
    """

    out_BQD: Tensor
    weights: dict[int, Tensor] | None


@dataclasses.dataclass(frozen=True)
class ExpertRows:
    """The query rows of each expert, sequence by sequence.

    Attributes:
        row_BQE: int64: in column e, the rows of a sequence that expert e keeps, in their order, then all others.
        gate_BQE: the weight of expert e's output in each row; 0 where it does not keep the row.
        most_E: the largest number of rows that an expert keeps in one sequence: known to the host.
        count_BE: int64, rows that it keeps in each.
    """

    row_BQE: Tensor
    gate_BQE: Tensor
    most_E: tuple[int, ...]
    count_BE: Tensor

    @classmethod
    def of_plan(cls, plan: CapacityPlan, num_sequences: int, length: int) -> ExpertRows:
        """Asks the host once, for the sizes."""
        shape = (num_sequences, length, plan.asked_E.shape[0])
        pair_N = plan.token_N * shape[2] + plan.expert_N
        kept_N = (plan.slot_N >= 0).to(torch.int64)
        kept_BQE = kept_N.new_zeros(math.prod(shape)).index_add(0, pair_N, kept_N).view(shape)
        gate_BQE = plan.gate_N.new_zeros(math.prod(shape)).index_add(0, pair_N, plan.gate_N).view(shape)
        count_BE = kept_BQE.sum(1)
        most_E = count_BE.amax(0).tolist() if num_sequences else [0] * shape[2]
        return cls(
            row_BQE=kept_BQE.sort(dim=1, descending=True, stable=True).indices,
            gate_BQE=gate_BQE,
            most_E=tuple(most_E),
            count_BE=count_BE,
        )

    @property
    def called(self) -> tuple[int, ...]:
        """Experts that keep a row."""
        return tuple(expert for expert, most in enumerate(self.most_E) if most > 0)

    def of_expert(self, expert: int) -> tuple[Tensor, Tensor]:
        """int64 [B, R] rows and bool [B, R]: whether the expert keeps it, or it only fills up a shorter sequence."""
        row_BR = self.row_BQE[:, : self.most_E[expert], expert]
        place_R = torch.arange(row_BR.shape[1], device=row_BR.device)
        return row_BR, place_R < self.count_BE[:, expert, None]


class _ZeroGradients(torch.autograd.Function):
    """The identity of its first argument; the others get gradients of zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *(torch.zeros_like(parameter) for parameter in ctx.saved_tensors)


class AttentionBank(nn.Module):
    """Runs each expert on its own query rows, with the keys and values of the whole sequence.

    Attributes:
        experts: this rank's, by global id; an expert's parameters have the same names in every bank.
        sharded: whether a rank holds some of the experts only.
    """

    sharded = False

    def __init__(
        self, configs: Sequence[AttentionExpertConfig], site: ExpertSite, experts: nn.ModuleDict | None = None
    ):
        super().__init__()
        self.configs, self.site = tuple(configs), site
        self.experts = experts or nn.ModuleDict({str(place): c.build(site) for place, c in enumerate(configs)})

    @property
    def expert_ids(self) -> tuple[int, ...]:
        """Global ids of this rank's experts."""
        return tuple(map(int, self.experts))

    def expert(self, expert: int) -> AttentionExpert:
        """One of this rank's experts, by its global id."""
        module = self.experts[str(expert)]
        assert isinstance(module, AttentionExpert)
        return module

    def forward(
        self,
        query_BQD: Tensor,
        key_BSD: Tensor,
        value_BSD: Tensor,
        sight: Sight,
        plan: CapacityPlan,
        need_weights: bool = False,
    ) -> Mixed:
        """[B, Q, D] queries, of which the plan's tokens are the rows one after the other, [B, S, D] keys and values.

        An expert without rows is not called, and its gradients are zeros.
        """
        query_BQD, attention_of = self.ready(query_BQD)
        rows = ExpertRows.of_plan(plan, *query_BQD.shape[:2])
        out_BQD, weights = torch.zeros_like(query_BQD), {}
        if not rows.called:  # all the same a part of the graph: other ranks may wait for this one in backward
            out_BQD = _ZeroGradients.apply(out_BQD, query_BQD, key_BSD, value_BSD, plan.gate_N)
        for expert in rows.called:
            row_BR, live_BR = rows.of_expert(expert)
            index_BRD = row_BR[:, :, None].expand(-1, -1, query_BQD.shape[2])
            seen = sight.of_rows(row_BR, live_BR, query_BQD.shape[1])
            if seen.names is not None:
                seen = dataclasses.replace(seen, names=dataclasses.replace(seen.names, expert=expert))
            rows_BRD = query_BQD.gather(1, index_BRD)
            attended = attention_of(expert)(rows_BRD, key_BSD, value_BSD, seen, need_weights=need_weights)
            gate_BR = rows.gate_BQE[:, :, expert].gather(1, row_BR)
            # Rows that only fill up have gate 0, and no row stands there twice.
            weighted_BRD = (attended.out_BQD * gate_BR[:, :, None]).to(out_BQD.dtype)
            out_BQD = out_BQD.scatter_add(1, index_BRD, weighted_BRD)
            if attended.weights_BHQS is not None:
                weights[expert] = _spread_rows(attended.weights_BHQS, row_BR, live_BR, query_BQD.shape[1])
        if idle := self.idle(rows.called):
            out_BQD = _ZeroGradients.apply(out_BQD, *idle)
        return Mixed(out_BQD, weights if need_weights else None)

    def ready(self, query_BQD: Tensor) -> tuple[Tensor, Callable[[int], Attend]]:
        """The query as it is, and what computes an expert of the layer, by its global id."""
        raise NotImplementedError

    def idle(self, called: Sequence[int]) -> list[nn.Parameter]:
        """This rank's parameters that take no part in a pass that calls these experts."""
        raise NotImplementedError

    def init_weights(self, draw: Draw) -> None:
        """Fills this rank's experts by their global ids."""
        for expert in self.expert_ids:
            self.expert(expert).init_weights(below(draw, f"experts.{expert}"))


def _spread_rows(weights_BHRS: Tensor, row_BR: Tensor, live_BR: Tensor, num_queries: int) -> Tensor:
    """[B, H, Q, S]: rows at their places, zero elsewhere."""
    shown_BHRS = weights_BHRS * live_BR[:, None, :, None].to(weights_BHRS.dtype)
    whole = shown_BHRS.new_zeros(*shown_BHRS.shape[:2], num_queries, shown_BHRS.shape[3])
    return whole.scatter(2, row_BR[:, None, :, None].expand_as(shown_BHRS), shown_BHRS)


class ReplicatedBank(AttentionBank):
    """Every rank holds all experts; their gradients are summed as those of dense weights are."""

    def ready(self, query_BQD: Tensor) -> tuple[Tensor, Callable[[int], Attend]]:
        """See the base."""
        return query_BQD, self.expert

    def idle(self, called: Sequence[int]) -> list[nn.Parameter]:
        """See the base."""
        return [p for expert in self.expert_ids if expert not in called for p in self.expert(expert).parameters()]


class GatheredBank(AttentionBank):
    """A rank holds its own experts; every forward pass gathers the others' weights, and backward sums and returns
    their gradients. Ranks may hold experts of unlike kinds and sizes: what travels is one flat row per rank, as long as
    the longest of them.
    """

    sharded = True

    def __init__(self, bank: AttentionBank, placement: Placement, ep: Axis):
        """Takes over this rank's experts of a bank that holds all."""
        super().__init__(bank.configs, bank.site, bank.experts)
        self.placement, self.ep = placement, ep
        # The experts of all ranks without storage, to be run on what was gathered. Not registered: nobody's parameters.
        self._hollow = tuple(copy.deepcopy(bank.expert(place)).to("meta") for place in bank.expert_ids)
        self.keep(placement.expert_ids[ep.rank])

    def ready(self, query_BQD: Tensor) -> tuple[Tensor, Callable[[int], Attend]]:
        """See the base. All ranks of the axis call it together, those without a row too."""
        query_BQD, tensors_of = self._gather(query_BQD)

        def attention_of(expert: int) -> Attend:
            return functools.partial(_call, self._hollow[expert].train(self.training), tensors_of[expert])

        return query_BQD, attention_of

    def idle(self, called: Sequence[int]) -> list[nn.Parameter]:
        """None: all of them are gathered."""
        return []

    def keep(self, expert_ids: Sequence[int]) -> None:
        """Drops all experts but those with the given global ids, in the given order."""
        self.experts = nn.ModuleDict({str(expert): self.experts[str(expert)] for expert in expert_ids})

    def _gather(self, query_BQD: Tensor) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """The query as it is, and the tensors of every expert by name, in the order of ids."""
        own = [tensor for expert in self.expert_ids for tensor in tensors(self.expert(expert)).values()]
        flat_X = torch.cat([tensor.flatten() for tensor in own])
        length = max(sum(map(self._size, ids)) for ids in self.placement.expert_ids)
        padded_P = nn.functional.pad(flat_X, (0, length - flat_X.numel()))
        if torch.is_grad_enabled() and not padded_P.requires_grad:
            # Frozen or not, a rank takes part in the exchange of gradients: other ranks' experts may not be frozen.
            padded_P = padded_P.requires_grad_()
        query_BQD, flat_RP = gather_beside(query_BQD, padded_P, self.ep)
        tensors_of: list[dict[str, Tensor]] = [{} for _ in self._hollow]
        for flat_P, ids in zip(flat_RP.unbind(0), self.placement.expert_ids, strict=True):
            shapes = [(expert, name, like) for expert in ids for name, like in tensors(self._hollow[expert]).items()]
            pieces = flat_P[: sum(map(self._size, ids))].split([like.numel() for _, _, like in shapes])
            for (expert, name, like), piece in zip(shapes, pieces, strict=True):
                tensors_of[expert][name] = piece.view(like.shape).to(like.dtype)
        return query_BQD, tensors_of

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What changes the type of the experts changes that of the hollow ones; the rest is not for them."""

        def change(hollow: Tensor) -> Tensor:
            return hollow.to(fn(torch.empty(0, dtype=hollow.dtype)).dtype)

        for expert in self._hollow:
            expert._apply(change)
        return super()._apply(fn, recurse)

    def _size(self, expert: int) -> int:
        return sum(tensor.numel() for tensor in tensors(self._hollow[expert]).values())


def _call(expert: nn.Module, values: dict[str, Tensor], *arguments: Any, **options: Any) -> Attended:
    """The expert's forward pass with other parameters and buffers than its own."""
    attended = functional_call(expert, values, arguments, options)
    assert isinstance(attended, Attended)
    return attended


def tensors(expert: AttentionExpert) -> dict[str, Tensor]:
    """What an expert computes with, by name: parameters, and buffers (which get no gradient)."""
    return {**dict(expert.named_parameters()), **dict(expert.named_buffers())}


@dataclasses.dataclass(frozen=True)
class Passes:
    """Passes of an optimizer step.

    Attributes:
        micro_steps: forward and backward passes.
        recomputed: whether backward runs attention forward once more.
    """

    micro_steps: int = 1
    recomputed: bool = False


ONE_PASS = Passes()


@dataclasses.dataclass(frozen=True)
class BankCost:
    """What decides between the two banks; numbers of one layer.

    Attributes:
        parameters: of all its experts.
        ep: expert-parallel ranks.
        passes: of an optimizer step.
        alike: why all ranks must have the same parameters; None where nothing asks for it.
    """

    parameters: int
    ep: int
    passes: Passes
    alike: str | None = None

    @property
    def replicated_elements(self) -> int:
        """Elements that each of ``ep`` ranks sends in a step to sum the gradients of experts that all of them hold: the
        two halves of a ring."""
        return 2 * self.parameters * (self.ep - 1) // self.ep

    @property
    def gathered_elements(self) -> int:
        """The same to gather weights in every forward pass and to return gradients in every backward pass."""
        each = 3 if self.passes.recomputed else 2
        return each * self.passes.micro_steps * self.parameters * (self.ep - 1) // self.ep

    def choose(self, kind: BankKind) -> tuple[Literal["replicated", "gathered"], str]:
        """The bank, and why: gathered where it sends no more than summing gradients would, since it keeps 1 / ep of
        weights, gradients and moments; replicated elsewhere."""
        if self.ep == 1:
            return "replicated", "one expert-parallel rank holds them all"
        sent = (
            f"per step and layer gathered sends {self.gathered_elements / 1e6:.2f} M elements, replicated "
            f"{self.replicated_elements / 1e6:.2f} M"
        )
        if kind != "auto":
            return kind, f"as asked; {sent}"
        if self.alike is not None:
            return "replicated", self.alike
        if self.gathered_elements <= self.replicated_elements:
            return "gathered", f"{sent}, and gathered keeps 1/{self.ep} of the experts on a rank"
        return "replicated", sent
