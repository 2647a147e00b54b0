"""Gives a built model its first values."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import nn

from moedist.moe.init import Draw, below, named_draw


@runtime_checkable
class Initialised(Protocol):
    """A module that says how its parameters, its children's included, get their first values."""

    def init_weights(self, draw: Draw) -> None:
        """Fills every parameter in place; ``draw(name)`` gives the generator of a name relative to this module."""
        ...


def init_weights(model: nn.Module, seed: int) -> None:
    """Fills every parameter of ``model`` in place, each drawn by (seed, its fully qualified name).

    The values do not depend on the order of building, the device or, up to rounding, the dtype, so a model built on
    the meta device and given storage by ``to_empty`` equals one that was built in place. Matrices start normal with
    ``fan_in ** -0.5``, those that write into the residual stream with ``(2 * num_layers) ** -0.5`` of that, the
    embedding with ``dim ** -0.5``, norms at one, biases at zero; routers and experts as their own modules say.

    Raises:
        TypeError: a module with parameters of its own has no ``init_weights(draw)``.
    """
    _init_below(model, named_draw(seed), "")


def _init_below(module: nn.Module, draw: Draw, name: str) -> None:
    if isinstance(module, Initialised):
        module.init_weights(draw)
        return
    own = [key for key, _ in module.named_parameters(recurse=False)]
    if own:
        raise TypeError(f"{name or 'the model'} ({type(module).__name__}) has no init_weights(draw) for {own}")
    for key, child in module.named_children():
        _init_below(child, below(draw, key), f"{name}.{key}" if name else key)
