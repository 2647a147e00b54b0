"""What a layer can be made of: whether experts and router fit each other, found before the first batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moedist.moe.router.contract import RouterConfig


def check_parts(
    experts: list[nn.Module],
    router: nn.Module | RouterConfig,
    in_features: int,
    out_features: int,
    top_k: int | None,
) -> None:
    """Raises `TypeError` or `ValueError` where a layer cannot be made of these."""
    if not experts:
        raise ValueError("experts is empty: a layer needs at least one")
    for place, expert in enumerate(experts):
        if not isinstance(expert, nn.Module):
            raise TypeError(f"expert {place} is no nn.Module but {type(expert).__name__}")
    for name, width in (("in_features", in_features), ("out_features", out_features)):
        if width < 1:
            raise ValueError(f"{name} = {width} is no width: set it to 1 or more")
    if isinstance(router, RouterConfig):
        if top_k is not None:
            raise ValueError(f"top_k = {top_k} is the router's own to say: set it in {type(router).__name__}")
    elif not isinstance(router, nn.Module):
        raise TypeError(f"router is no nn.Module and no RouterConfig but {type(router).__name__}")
    elif top_k is not None and not 0 <= top_k <= len(experts):
        raise ValueError(f"top_k = {top_k} is outside of 0 to {len(experts)}, the number of experts; 0 means all")
    for place, expert in enumerate(experts):
        check_widths(f"expert {place}", expert, in_features, out_features)
    if isinstance(router, nn.Module):
        check_widths("the router", router, in_features, len(experts))


def check_widths(name: str, module: nn.Module, in_features: int, out_features: int) -> None:
    """Raises `TypeError` or `ValueError` unless a module makes [rows, out_features] of [rows, in_features]."""
    modes = [(part, part.training) for part in module.modules()]
    x = rows_for([module], 2, in_features)
    try:
        with torch.no_grad():
            y = module.eval()(x)
    except RuntimeError as error:
        raise ValueError(f"{name} does not take {list(x.shape)} (in_features = {in_features}): {error}") from error
    finally:
        for part, mode in modes:
            part.training = mode
    if not isinstance(y, Tensor):
        raise TypeError(f"{name} makes a {type(y).__name__} of {list(x.shape)}; it must make one tensor")
    if y.shape != (2, out_features):
        raise ValueError(f"{name} makes {list(y.shape)} of {list(x.shape)}; it must make {[2, out_features]}")


def rows_for(modules: list[nn.Module], num_rows: int, width: int) -> Tensor:
    """Zeros of the type and place of the first weight."""
    weights = (parameter for module in modules for parameter in module.parameters())
    like = next((weight for weight in weights if weight.is_floating_point()), torch.empty(0))
    return torch.zeros(num_rows, width, dtype=like.dtype, device=like.device)
