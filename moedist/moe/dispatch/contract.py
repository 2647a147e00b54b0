"""How rows reach their experts and come back."""

from __future__ import annotations

import dataclasses
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from moedist.config import Choice
from moedist.mesh import Axis
from moedist.moe.dispatch.traffic import Batch, Traffic
from moedist.moe.dispatch.wire import EXACT, ExchangeDtype, Wire
from moedist.moe.experts.contract import Rows
from moedist.moe.placement import Placement
from moedist.moe.plan import CapacityPlan

Ticket = TypeVar("Ticket")


@dataclasses.dataclass(frozen=True)
class Arrived(Generic[Ticket]):
    """Rows at this rank's experts, and what it takes to send their outputs home.

    A ticket holds index tensors, host sizes and an axis; nothing stays on the dispatcher.
    """

    rows: Rows
    ticket: Ticket


class Dispatcher(Protocol):
    """Moves rows over one expert-parallel axis; made once, without state of its own."""

    def dispatch(self, x_TD: Tensor, plan: CapacityPlan) -> Arrived[Any]:
        """Sends a copy of each kept pair's token, with the pair's gate, to the pair's expert."""
        ...

    def combine(self, y_RD: Tensor, ticket: Any) -> Tensor:
        """[T, D]: each token's sum of its pairs' outputs ``y_RD`` (already weighted by the gate). Bitwise the same at
        every call: no atomics where the plan has a fixed number of pairs per token."""
        ...


@dataclasses.dataclass(frozen=True)
class DispatchConfig(Choice, path="moe.dispatch"):
    """One way to move rows."""

    @property
    def static(self) -> bool:
        """Whether no shape depends on data."""
        return False

    @property
    def may_spill(self) -> bool:
        """Whether rows may be left behind where the caller allows it (`TokenContext.may_spill`); no shape depends on
        data then. Where it does not, everything travels."""
        return False

    def spilled(self, plan: CapacityPlan, placement: Placement) -> Tensor:
        """0-dim int64: kept pairs of this rank that are left behind; known before any row moves."""
        return torch.zeros_like(plan.room)

    def note(self, num_experts: int, experts_per_token: int, dropless: bool, ep: Axis) -> str | None:
        """What a user should know of the cost of this choice, as a sentence; None for nothing."""
        return None

    @property
    def wire(self) -> Wire:
        """In which numbers rows travel. They are rounded to these whether they move or not, so that no result depends
        on that: by the dispatcher, or by a bank without one."""
        return EXACT

    def check_nodes(self, ep: int, ranks_per_node: int) -> None:
        """Raises `ConfigError` where groups of ``ep`` ranks do not lie on nodes as this choice needs it."""

    def room(self, batch: Batch) -> int | None:
        """Rows that a rank sends, and as many that it receives, whatever the routing; None where they follow it."""
        return None

    def traffic(self, batch: Batch) -> Traffic | None:
        """What an exchange of a layer sends; None where nobody has worked it out."""
        return None

    def build(self, placement: Placement, ep: Axis) -> Dispatcher:
        """A dispatcher over the axis ``ep``, whose ranks hold experts as ``placement`` says."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class WireConfig(DispatchConfig):
    """A way to move rows that can move them in fewer bits.

    Attributes:
        exchange_dtype: ``bf16`` or ``fp8``: what vectors, experts' outputs and (in bf16) the gradients of both are
            rounded to on their way; see `Wire` for how far off they are then. Gates and numbers of experts travel
            exactly. None: nothing is rounded.
    """

    exchange_dtype: ExchangeDtype | None = dataclasses.field(default=None, kw_only=True)

    @property
    def wire(self) -> Wire:
        """See the contract."""
        return Wire(self.exchange_dtype)
