"""The oracle of the project: n ranks equal one device, in outputs and in every gradient.

One device is one process that runs the same capacity groups one after the other, with the plain twins (local bank, loop
experts), and adds up their gradients. Losses that count over all ranks are taken on all tokens at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from moedist.mesh import Mesh
from moedist.moe.bank.local import LocalConfig
from moedist.moe.context import TokenContext
from moedist.moe.experts.loop import LoopConfig
from moedist.moe.layer import MoE, MoEConfig
from moedist.moe.plan import plan_capacity
from moedist.moe.router.contract import Router, Routing
from moedist.moe.router.cosine import CosineRouter
from moedist.moe.router.hash import HashRouter
from moedist.moe.router.mlp import MLPRouter
from moedist.parallel import spread

DIM, HIDDEN, NUM_EXPERTS, ROWS, LENGTH = 8, 12, 8, 3, 8


@dataclasses.dataclass(frozen=True)
class Scene:
    """Tokens of every rank: a name and how many valid positions each row has.

    Attributes:
        steer: expert that every token is pulled to; None for as it comes.
    """

    name: str
    steer: int | None = None

    def valid_T(self, rank: int) -> Tensor:
        """Ranks hold 0, 1, 7 and 24 valid tokens in turn; the steered scene fills every rank."""
        count = ROWS * LENGTH if self.steer is not None else (7, 0, 24, 1)[rank % 4]
        return torch.arange(ROWS * LENGTH) < count


SCENES = (Scene("uneven"), Scene("one expert", steer=3))


def batch_of(scene: Scene, rank: int, num_tokens: int, step: int = 3) -> tuple[Tensor, TokenContext]:
    """Vectors [T, D] (fp64) and context of a rank; every process can make every rank's."""
    generator = torch.Generator().manual_seed(100 + rank)
    x_TD = torch.randn(ROWS * LENGTH, DIM, dtype=torch.float64, generator=generator)
    ids_T = torch.randint(50, (ROWS * LENGTH,), generator=generator)
    if scene.steer is not None:
        x_TD[:, 0] = 4.0 + x_TD[:, 0].abs()
    ctx = TokenContext.of_rows(
        ROWS,
        LENGTH,
        id_T=torch.zeros(ROWS * LENGTH, dtype=torch.int64) if scene.steer is not None else ids_T,
        valid_T=scene.valid_T(rank),
        sample_B=torch.arange(ROWS) + rank * ROWS,
        num_tokens=torch.tensor(num_tokens),
        seed=7,
        step=step,
    )
    return x_TD, ctx


def build(config: MoEConfig, scene: Scene) -> MoE:
    """A layer in fp64, the same at every call; a steered one sends every token to one expert first, where the router
    looks at vectors."""
    layer = config.build(DIM, dtype=torch.float64)
    if layer.router.selection_bias is not None:
        layer.router.selection_bias.copy_(torch.linspace(-0.2, 0.2, NUM_EXPERTS))
    if scene.steer is not None:
        steer(layer.router, scene.steer)
    return layer


@torch.no_grad()
def steer(router: Router, expert: int) -> None:
    """Prefers one expert for every token of a steered scene."""
    if isinstance(router, MLPRouter):
        router.bias[expert] = 6.0
    elif isinstance(router, CosineRouter):
        router.weight[expert] = router.projection[:, 0]
    elif not isinstance(router, HashRouter):
        router.weight[:, 0] *= 0.1
        router.weight[expert, 0] = 3.0


def task_loss(out_TD: Tensor, ctx: TokenContext, num_tokens: int) -> Tensor:
    """A rank's share of a loss in which every output element counts differently; transposed once, so that the gradient
    that reaches combine has the strides of no contiguous tensor."""
    weight_DT = torch.linspace(0.5, 1.5, out_TD.numel(), dtype=torch.float64).view(out_TD.shape[1], -1)
    return ((out_TD.t() * weight_DT).square() * ctx.valid_T).sum() / num_tokens


@dataclasses.dataclass
class Result:
    """Outputs and input gradients by rank, gradients of all parameters by name, the losses' values, the counts."""

    out: dict[int, Tensor]
    x_grad: dict[int, Tensor]
    grad: dict[str, Tensor]
    losses: dict[str, float]
    kept_E: Tensor


def one_device(config: MoEConfig, scene: Scene, world: int) -> Result:
    """The reference; `config`'s own bank, experts and dispatcher are replaced by the plain twins."""
    experts = config.experts
    plain = dataclasses.replace(
        config,
        bank=LocalConfig(),
        experts=LoopConfig(hidden_dim=experts.hidden_dim, activation=experts.activation, bias=experts.bias),
    )
    layer = build(plain, scene)
    num_tokens = sum(int(scene.valid_T(rank).sum()) for rank in range(world))
    batches = [batch_of(scene, rank, num_tokens) for rank in range(world)]
    xs = [x_TD.requires_grad_() for x_TD, _ in batches]
    outputs, kept, routings = [], [], []
    for x_TD, (_, ctx) in zip(xs, batches, strict=True):
        routings.append(routing := layer.router(x_TD, ctx))
        plan = plan_capacity(routing, ctx, config.capacity, layer=0)
        out_TD = layer.bank(x_TD, plan)
        outputs.append(out_TD if layer.shared is None else out_TD + layer.shared(x_TD))
        kept.append(plan.kept_E)
    total = sum(task_loss(out, ctx, num_tokens) for out, (_, ctx) in zip(outputs, batches, strict=True))
    # Balance losses on the tokens of all ranks at once, or rank by rank where that is their scope.
    contexts = [ctx for _, ctx in batches]
    together = [(concatenated_routings(routings), concatenated(contexts))]
    losses = {}
    for name, loss in layer.losses.items():
        alone = getattr(config.balance[name], "scope", "global") == "micro_batch"
        value = torch.zeros((), dtype=torch.float64)
        for routing, ctx in zip(routings, contexts, strict=True) if alone else together:
            value = value + loss(routing, plan_capacity(routing, ctx, config.capacity, layer=0), ctx)
        losses[name] = value.detach()
        total = total + config.balance[name].coefficient * value
    total.backward()
    return Result(
        out={rank: out.detach() for rank, out in enumerate(outputs)},
        x_grad={rank: x.grad for rank, x in enumerate(xs)},
        grad={name: parameter.grad for name, parameter in layer.named_parameters()},
        losses={name: float(value) for name, value in losses.items()},
        kept_E=torch.stack(kept).sum(0),
    )


def concatenated_routings(routings: list[Routing]) -> Routing:
    """All ranks' pairs, as each rank has chosen them (some routers look at all tokens of a rank)."""

    def joined(name: str) -> Tensor | None:
        parts = [getattr(routing, name) for routing in routings]
        return None if parts[0] is None else torch.cat(parts)

    tensors = ("expert_N", "gate_N", "score_TE", "logits_TE", "probs_TE", "live_N", "load_TE", "allowed_TE")
    return dataclasses.replace(
        routings[0],
        token_N=torch.cat([routing.token_N + index * ROWS * LENGTH for index, routing in enumerate(routings)]),
        **{name: joined(name) for name in tensors},
    )


def concatenated(contexts: list[TokenContext]) -> TokenContext:
    """All ranks' tokens as one batch."""
    return dataclasses.replace(
        contexts[0],
        id_T=torch.cat([ctx.id_T for ctx in contexts]),
        valid_T=torch.cat([ctx.valid_T for ctx in contexts]),
        sequence_T=torch.cat([ctx.sequence_T + ROWS * index for index, ctx in enumerate(contexts)]),
        sample_T=torch.cat([ctx.sample_T for ctx in contexts]),
        position_T=torch.cat([ctx.position_T for ctx in contexts]),
        num_sequences=ROWS * len(contexts),
    )


def many_ranks(config: MoEConfig, scene: Scene, mesh: Mesh) -> Result:
    """The same on this rank of a mesh, with the config's own parts; gradients whole and summed."""
    world, rank = mesh.dp.size, mesh.dp.rank
    layer = build(config, scene)
    table = spread(layer, mesh)
    num_tokens = sum(int(scene.valid_T(other).sum()) for other in range(world))
    x_TD, ctx = batch_of(scene, rank, num_tokens)
    ctx = dataclasses.replace(ctx, may_spill=True)
    x_TD.requires_grad_()
    out_TD, report = (result := layer(x_TD, ctx)).out_TD, result.report
    assert report.spilled is None or int(report.spilled) == 0, "a parity case must have room"
    balance = sum(report.coefficients[name] * loss for name, loss in report.losses.items())
    (task_loss(out_TD, ctx, num_tokens) + balance).backward()
    table.sum_copies(layer)
    shares = torch.stack([loss.detach() for loss in report.losses.values()]) if report.losses else torch.zeros(0)
    dist.all_reduce(shares)
    kept_E = report.kept_E.clone()
    dist.all_reduce(kept_E)
    return Result(
        out={rank: out_TD.detach()},
        x_grad={rank: x_TD.grad},
        grad={
            name: parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
            for name, parameter in layer.named_parameters()
        },
        losses=dict(zip(report.losses, shares.tolist(), strict=True)),
        kept_E=kept_E,
    )


def compare(got: Result, expected: Result, tolerance: float = 1e-12) -> float:
    """Asserts equality; returns the worst difference. Gradients are held against the largest entry of each."""
    worst = 0.0
    for what in ("out", "x_grad", "grad"):
        for key, value in getattr(got, what).items():
            reference = getattr(expected, what)[key]
            assert value is not None, f"{what} {key} is None"
            scale = max(reference.abs().max().item(), 1.0)
            difference = (value - reference).abs().max().item()
            assert difference <= tolerance * scale, f"{what} {key} differs by {difference:.3e}"
            worst = max(worst, difference / scale)
    for name, value in got.losses.items():
        assert abs(value - expected.losses[name]) <= tolerance, f"{name} {value} is not {expected.losses[name]}"
    assert got.kept_E.tolist() == expected.kept_E.tolist(), "other pairs were kept"
    return worst


@contextlib.contextmanager
def counted_bytes(ranks_per_node: int = 1) -> Iterator[list[int]]:
    """Bytes that this rank sends to other ranks, or to those of other nodes, by all-to-all, call by call."""
    sent: list[int] = []
    real = dist.all_to_all_single

    def counting(output: Tensor, source: Tensor, receive: Any = None, send: Any = None, group: Any = None) -> Any:
        size, node = dist.get_world_size(group), dist.get_rank() // ranks_per_node
        nodes = [rank // ranks_per_node for rank in dist.get_process_group_ranks(group)]
        rows = send if send is not None else [source.shape[0] // size] * size
        row_bytes = source[:1].numel() * source.element_size() if source.shape[0] else 0
        sent.append(sum(count for other, count in zip(nodes, rows, strict=True) if other != node) * row_bytes)
        return real(output, source, receive, send, group=group)

    with mock.patch.object(dist, "all_to_all_single", counting):
        yield sent
