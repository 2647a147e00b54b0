"""One MoE layer, forward and backward: ours against its twins, bare products and other people's layers."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moedist.bench.ceilings import measure_ceilings
from moedist.bench.floor import (
    Ceilings,
    exchange_bytes,
    fused_kernels,
    least_saved_bytes,
    least_seconds,
    unfused_kernels,
    useful_flops,
)
from moedist.bench.ours import OURS, ours
from moedist.bench.peer.contract import Peer
from moedist.bench.products import PRODUCTS, bare_products
from moedist.bench.rounds import ratio, sample, take_turns
from moedist.bench.shapes import LayerShape
from moedist.bench.trial import Pattern, Trial, make_trial
from moedist.mesh import Mesh
from moedist.mesh.meter import ExchangeMeter, measuring


def measure_layers(
    shapes: Sequence[LayerShape],
    patterns: Sequence[Pattern],
    factor: float | None,
    peers: Sequence[Peer],
    rounds: int,
    mesh: Mesh,
) -> list[dict[str, Any]]:
    """A case per shape and routing, as plain values; called on all ranks.

    Args:
        shapes, patterns: every pair of them is a case.
        factor: capacity factor of all contenders that know one; None for dropless.
        peers: whom to compare with, where they can take part.
        rounds: how often each contender runs in a case.
        mesh: the ranks, over all of which the experts are spread.
    """
    ceilings = {dtype: measure_ceilings(mesh, dtype) for dtype in {shape.dtype for shape in shapes}}
    cases = []
    for shape in shapes:
        for pattern in patterns:
            cases.append(measure_case(make_trial(shape, pattern, factor, mesh), peers, rounds, ceilings[shape.dtype]))
            gc.collect()  # the layers of a case are gone before those of the next are made
    return cases


def measure_case(trial: Trial, peers: Sequence[Peer], rounds: int, ceilings: Ceilings) -> dict[str, Any]:
    """All contenders of one shape under one routing, in turns."""
    shape, mesh = trial.shape, trial.mesh
    skipped = {peer.name: reason for peer in peers if (reason := peer.why_not(trial)) is not None}
    taking_part = [ours(), *(peer for peer in peers if peer.name not in skipped)]
    layers = {peer.name: peer.build(trial) for peer in taking_part}
    work = {PRODUCTS: bare_products(trial), **{name: step_of(layer, trial) for name, layer in layers.items()}}
    seconds = take_turns(work, rounds, mesh)
    pairs = trial.kept_E.sum().item() / mesh.dp.size
    floor_s = least_seconds(fused_kernels(shape, mesh.ep.size), ceilings)
    flops = useful_flops(shape, pairs)
    contenders = []
    for peer in taking_part:
        took, against = sample(seconds[peer.name]), ratio(seconds[OURS], seconds[peer.name])
        saved = saved_bytes(layers[peer.name], trial)
        contenders.append(
            {
                "name": peer.name,
                "about": peer.about,
                "version": peer.version(),
                "ms": 1e3 * took.median,
                "spread": took.spread,
                "tflops": flops / took.median / 1e12,
                "share_of_f2": floor_s / took.median,
                "ours_over_this": against.median,
                "ratio_spread": against.spread,
                "quotable": against.quotable,
                "saved_bytes": saved,
                "saved_over_least": saved / least_saved_bytes(shape),
                "exchange_ms": 1e3 * exchange_seconds(work[peer.name], mesh) if is_metered(peer) else None,
            }
        )
    products = ratio(seconds[OURS], seconds[PRODUCTS])
    return {
        "config": shape.name,
        "routing": trial.routing,
        "capacity_factor": trial.factor,
        "top_k": shape.top_k,
        "dtype": str(shape.dtype).removeprefix("torch."),
        "tokens_per_rank": shape.tokens,
        "rows_per_expert_max_over_mean": trial.imbalance,
        "dropped": 1 - trial.kept_E.sum().item() / trial.asked_E.sum().item(),
        "ceilings": {"matmul_tflops": ceilings.flops / 1e12, "copy_gb_per_s": ceilings.bytes / 1e9},
        "floor": {
            "gemm_tflop": flops / 1e12,
            "f2_ms": 1e3 * floor_s,
            "f3_ms": 1e3 * least_seconds(unfused_kernels(shape, mesh.ep.size), ceilings),
            "exchange_mb": exchange_bytes(shape, mesh.ep.size) / 1e6,
        },
        "rounds": rounds,
        "contenders": contenders,
        "products_ms": 1e3 * sample(seconds[PRODUCTS]).median,
        "ratio_to_products": products.median,
        "ratio_to_products_spread": products.spread,
        "products_quotable": products.quotable,
        **{f"ratio_to_{entry['name']}": entry["ours_over_this"] for entry in contenders if entry["name"] != OURS},
        "skipped": skipped,
        "quotable": all(entry["quotable"] for entry in contenders) and products.quotable,
    }


def is_metered(peer: Peer) -> bool:
    """Whether its exchanges are those of `moedist.mesh.collectives`."""
    return peer.spreads and peer.package is None


def step_of(layer: nn.Module, trial: Trial) -> Callable[[], None]:
    """Forward and backward once; gradients of the step before are gone, as after an optimizer's."""
    parameters = [*layer.parameters(), trial.x_TD]

    def step() -> None:
        for parameter in parameters:
            parameter.grad = None
        out_TD, *losses = layer(trial.x_TD)
        torch.autograd.backward([out_TD, *losses], [trial.grad_TD, *(torch.ones_like(loss) for loss in losses)])

    return step


def saved_bytes(layer: nn.Module, trial: Trial) -> int:
    """Bytes that one forward keeps for its backward, weights and the trial's own tensors left out."""
    kept: dict[int, Tensor] = {}

    def see(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept.setdefault(storage.data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        out = layer(trial.x_TD)
    not_counted = [*layer.parameters(), trial.offset_TE]
    for tensor in not_counted:
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del out
    return total


def exchange_seconds(step: Callable[[], None], mesh: Mesh) -> float:
    """Seconds of one step in exchanges, waiting for other ranks included: nothing hides them yet."""
    meter = ExchangeMeter(mesh.device)
    with measuring(meter):
        step()
    if mesh.device.type == "cuda":
        torch.cuda.synchronize(mesh.device)
    return meter.seconds
