"""The losses of a layer's last forward pass: as numbers, and with their graph for as long as the output's lives."""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn

from moedist.moe.report import MoEReport
from moedist.moe.routed import RoutedLayer


@runtime_checkable
class AuxLossModule(Protocol):
    """A module that adds a loss of its own to the task's."""

    use_aux_loss: bool
    aux_loss_weight: float

    @property
    def aux_loss(self) -> Tensor:
        """0-dim, unscaled; 0 where it is off."""
        ...

    @property
    def z_loss(self) -> Tensor:
        """0-dim, unscaled; 0 where it is off."""
        ...


@dataclasses.dataclass(eq=False)
class Losses:
    """The losses of one forward pass, with their graph."""

    aux: Tensor
    z: Tensor

    def values(self) -> Losses:
        """Without it."""
        return Losses(self.aux.detach(), self.z.detach())


@dataclasses.dataclass(frozen=True)
class LastLosses:
    """What a layer remembers of them: numbers, and of their graph no more than a weak reference.

    Attributes:
        values: without graph.
        with_graph: while the output's graph lives, which keeps them; held here only in a compiled graph, where nothing
            else could.
    """

    values: Losses
    with_graph: weakref.ref[Losses] | Losses

    def now(self) -> Losses:
        """With their graph if it is there still."""
        alive = self.with_graph() if isinstance(self.with_graph, weakref.ref) else self.with_graph
        return alive or self.values


class Carry(torch.autograd.Function):
    """The output as it is; its graph holds on to the losses for as long as it lives itself."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, losses: Losses) -> Tensor:
        ctx.losses = losses
        return out.detach()  # no view: torch refuses changes in place of a view that a function of one's own returned

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class AuxLossLayer(nn.Module):
    """The base of layers that route and can be asked for the losses of their last forward pass (`AuxLossModule`).

    Losses leave the layer unscaled: whoever adds them to the task's multiplies by ``aux_loss_weight``, as `MoELoss`
    does.
    """

    _routed: str
    """Name of the child whose ``switch`` and ``z_loss`` these are."""

    def set_up_losses(self, use_aux_loss: bool, aux_loss_weight: float) -> None:
        """Called once, when the child is there."""
        self._last_losses: LastLosses | None = None
        self._loss_modules = dict(self._routed_layer().losses.items())
        self.use_aux_loss, self.aux_loss_weight = use_aux_loss, aux_loss_weight

    @property
    def use_aux_loss(self) -> bool:
        """Whether training computes balance and z-loss. May be changed any time."""
        return self._use_aux_loss

    @use_aux_loss.setter
    def use_aux_loss(self, on: bool) -> None:
        self._use_aux_loss = on
        self._routed_layer().losses = nn.ModuleDict(self._loss_modules if on else {})

    @property
    def aux_loss_weight(self) -> float:
        """What the balance loss is to be multiplied by where it joins the task's. May be changed any time."""
        return self._aux_loss_weight

    @aux_loss_weight.setter
    def aux_loss_weight(self, weight: float) -> None:
        if not weight >= 0:
            raise ValueError(f"aux_loss_weight = {weight} would reward imbalance: set it to 0 or more")
        self._aux_loss_weight = weight

    @property
    def aux_loss(self) -> Tensor:
        """0-dim: the Switch loss ``E sum_i f_i P_i`` of the last forward pass, unscaled: 1 for uniform routing. 0 where
        it is off: ``use_aux_loss`` false, evaluation, or no forward pass since the mode was changed."""
        losses = self._losses()
        return self._zero() if losses is None else losses.aux

    @property
    def z_loss(self) -> Tensor:
        """0-dim: the router's z-loss, like `aux_loss`."""
        losses = self._losses()
        return self._zero() if losses is None else losses.z

    def compute_auxiliary_loss(self) -> Tensor:
        """`aux_loss`, asked for explicitly.

        Raises:
            RuntimeError: it is off, or there was no forward pass.
        """
        losses = self._losses()
        if losses is not None:
            return losses.aux
        if not self.use_aux_loss:
            raise RuntimeError("the auxiliary loss is off: set use_aux_loss = True before the forward pass")
        if not self.training:
            raise RuntimeError("the auxiliary loss is off in evaluation: call train() before the forward pass")
        raise RuntimeError("there is no auxiliary loss yet: run a forward pass first")

    def remember(self, out: Tensor, report: MoEReport) -> Tensor:
        """``out``, whose graph keeps this pass's losses alive from now on."""
        self._last_losses = None
        if not (self.training and report.losses):
            return out
        losses = Losses(report.losses["switch"], report.losses["z_loss"])
        if torch.compiler.is_compiling():
            self._last_losses = LastLosses(losses.values(), losses)
            return out
        self._last_losses = LastLosses(losses.values(), weakref.ref(losses))
        carried: Tensor = Carry.apply(out, losses)
        return carried

    def reset_state(self) -> None:
        """Forgets the last forward pass, here and in every part that has a ``reset_state`` of its own."""
        self._last_losses = None
        for module in self.modules():
            if module is not self and callable(reset := getattr(module, "reset_state", None)):
                reset()

    def train(self, mode: bool = True) -> Self:
        """Also forgets the last forward pass: its numbers are another mode's."""
        super().train(mode)
        self.reset_state()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: without the last forward pass."""
        return {**self.__dict__, "_last_losses": None}

    def _routed_layer(self) -> RoutedLayer:
        layer = getattr(self, self._routed)
        assert isinstance(layer, RoutedLayer)
        return layer

    def _losses(self) -> Losses | None:
        usable = self.use_aux_loss and self.training and self._last_losses is not None
        return self._last_losses.now() if usable and self._last_losses is not None else None

    def _zero(self) -> Tensor:
        return torch.zeros((), device=next(self.parameters(), torch.empty(0)).device)
