"""The collectives of the whole project, each over an `Axis`; outside mesh/ and moe/dispatch/ nobody calls torch's.

All are bounded in time by the process group's time-out (``mesh.timeout_s``).

Those that a model calls are operators of torch's own (``moedist::all_to_all``, ``moedist::all_sum_``), known by the
group's name: a compiled graph holds them whole, and selective recomputation can keep what one has received.
"""

from __future__ import annotations

import contextlib
import json
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moedist.mesh.axis import Axis, process_group
from moedist.mesh.meter import current_meter


@torch.library.custom_op("moedist::all_sum_", mutates_args=("tensor",))
def _all_sum(tensor: Tensor, group_name: str) -> None:
    dist.all_reduce(tensor, dist.ReduceOp.SUM, group=process_group(group_name))


def all_sum(tensor: Tensor, axis: Axis) -> Tensor:
    """Sums ``tensor`` over the axis, in place; returns it. Not differentiable."""
    if axis.group_name is not None:
        _all_sum(tensor, axis.group_name)
    return tensor


def all_max(tensor: Tensor, axis: Axis) -> Tensor:
    """Largest value over the axis, element by element, in place; returns it."""
    if axis.group_name is not None:
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=axis.group)
    return tensor


@torch.library.custom_op("moedist::all_to_all", mutates_args=())
def _all_to_all(send: Tensor, group_name: str, send_sizes: list[int] | None, receive_sizes: list[int] | None) -> Tensor:
    received, group = _room(send, receive_sizes), process_group(group_name)
    with _metered(send, send_sizes, received, group):
        dist.all_to_all_single(received, send.contiguous(), receive_sizes, send_sizes, group=group)
    return received


def _metered(
    send: Tensor, send_sizes: list[int] | None, received: Tensor, group: dist.ProcessGroup
) -> contextlib.AbstractContextManager[None]:
    """Lets whoever measures exchanges measure this one."""
    meter = current_meter()
    if meter is None:
        return contextlib.nullcontext()
    world, rank = group.size(), group.rank()
    kept = send.shape[0] // world if send_sizes is None else send_sizes[rank]
    row = send.element_size() * (send.numel() // send.shape[0] if send.shape[0] else 0)
    return meter.exchange((send.shape[0] - kept) * row, received.numel() * received.element_size())


@_all_to_all.register_fake
def _(send: Tensor, group_name: str, send_sizes: list[int] | None, receive_sizes: list[int] | None) -> Tensor:
    return _room(send, receive_sizes)


def _room(send: Tensor, receive_sizes: list[int] | None) -> Tensor:
    num_rows = send.shape[0] if receive_sizes is None else sum(receive_sizes)
    return send.new_empty((num_rows, *send.shape[1:]))


def all_to_all(
    send: Tensor, axis: Axis, send_sizes: list[int] | None = None, receive_sizes: list[int] | None = None
) -> Tensor:
    """Exchanges blocks of rows: block ``i`` of ``send`` goes to rank ``i`` of the axis.

    Args:
        send: [rows, ...], its blocks in the order of the axis.
        send_sizes, receive_sizes: rows per rank; None for equal blocks.

    Returns:
        [sum(receive_sizes), ...]: the blocks of every rank in the order of the axis. Not differentiable.
    """
    if axis.group_name is None:
        return send
    return _all_to_all(send, axis.group_name, send_sizes, receive_sizes)


def all_gather(tensor: Tensor, axis: Axis) -> Tensor:
    """[size, ...]: every rank's ``tensor`` (of one shape), in the order of the axis."""
    if axis.group_name is None:
        return tensor[None].clone()
    gathered = tensor.new_empty((axis.size, *tensor.shape))
    dist.all_gather(list(gathered.unbind(0)), tensor.contiguous(), group=axis.group)
    return gathered


def reduce_scatter(tensor: Tensor, axis: Axis) -> Tensor:
    """[...]: the sum over the axis of every rank's ``tensor[rank]``, of [size, ...]. Not differentiable."""
    if axis.group_name is None:
        return tensor[0].clone()
    total = torch.empty_like(tensor[0])
    dist.reduce_scatter(total, list(tensor.contiguous().unbind(0)), group=axis.group)
    return total


class _GatheredBeside(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, own: Tensor, axis: Axis) -> tuple[Tensor, Tensor]:
        ctx.axis = axis
        return x.view_as(x), all_gather(own, axis)

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad_x, reduce_scatter(grad, ctx.axis), None


def gather_beside(x: Tensor, own: Tensor, axis: Axis) -> tuple[Tensor, Tensor]:
    """``x`` as it is, and [size, ...]: every rank's ``own`` (of one shape). Differentiable: a rank's gradient of its
    ``own`` is the sum over the axis of all ranks' gradients of it.

    ``x`` goes along so that backward meets other exchanges in one order on all ranks: what comes before ``x`` waits for
    this one.
    """
    gathered: tuple[Tensor, Tensor] = _GatheredBeside.apply(x, own, axis)
    return gathered


def broadcast_json(value: Any, axis: Axis, device: torch.device) -> Any:
    """Rank 0's ``value`` on every rank. Travels as JSON bytes: torch's object collectives unpickle what they get."""
    if axis.group_name is None:
        return value
    payload = torch.tensor(list(json.dumps(value).encode()) if axis.rank == 0 else [], dtype=torch.uint8, device=device)
    size = torch.tensor([payload.numel()], dtype=torch.int64, device=device)
    dist.broadcast(size, group=axis.group, group_src=0)
    if axis.rank != 0:
        payload = torch.empty(int(size), dtype=torch.uint8, device=device)
    dist.broadcast(payload, group=axis.group, group_src=0)
    return json.loads(bytes(payload.cpu().tolist()))


def gather_json(value: Any, axis: Axis, device: torch.device) -> list[Any]:
    """Every rank's ``value`` in the order of the axis, on every rank. Travels as JSON bytes."""
    payload = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8, device=device)
    size_G = all_gather(torch.tensor([payload.numel()], device=device), axis).flatten().tolist()
    padded = torch.zeros(max(size_G), dtype=torch.uint8, device=device)
    padded[: payload.numel()] = payload
    rows = all_gather(padded, axis).cpu()
    return [json.loads(bytes(row[:size].tolist())) for row, size in zip(rows, size_G, strict=True)]


def barrier(axis: Axis, device: torch.device) -> None:
    """Returns when every rank of the axis has arrived."""
    all_sum(torch.zeros(1, device=device), axis)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
