"""Balance losses under gradient accumulation: what a cut of one global batch into micro-steps may change."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from moedist.mesh import Mesh
from moedist.model.batch import TokenBatch
from moedist.moe.balance.importance import ImportanceConfig
from moedist.moe.balance.load import LoadConfig
from moedist.moe.balance.switch import SwitchConfig
from moedist.moe.balance.z_loss import ZLossConfig
from moedist.moe.router.noisy import NoisyConfig
from moedist.moe.router.topk import TopKConfig
from moedist.train.config import RunConfig
from tests.ranks import Here
from tests.train.test_parity import steps_loader
from tests.train.tiny import CONFIG, changed, make_trainer

NUM_ROWS = 8


def config_of(accumulation: str, recompute: bool = False) -> RunConfig:
    """Every loss that counts, noise, and dropping within sequences, which no cut into micro-batches changes."""
    balance = {
        "switch": SwitchConfig(0.3, accumulation=accumulation),
        "first": SwitchConfig(0.2, count="first", accumulation=accumulation),
        "pooled": SwitchConfig(0.15, layers="pooled", accumulation=accumulation),
        "importance": ImportanceConfig(0.2, accumulation=accumulation),
        "load": LoadConfig(0.1, accumulation=accumulation),
    }
    return changed(
        CONFIG,
        train={"clip_norm": None, "activation_checkpointing": "full" if recompute else "none"},
        capacity={"group": "sequence"},
        moe={"router": NoisyConfig(top_k=2, noise_std=0.2, input_jitter=0.1), "balance": balance},
    )


@dataclasses.dataclass
class Step:
    """One optimizer step: unscaled losses by name and layer, pairs asked, every gradient, forward passes."""

    losses: dict[str, list[float]]
    load: Tensor
    grad: dict[str, Tensor]
    num_forwards: int


def step_of(config: RunConfig, mesh: Mesh, loader) -> Step:
    """By the trainer's own step."""
    trainer = make_trainer(config, config.data.open(), mesh)
    grad: dict[str, Tensor] = {}
    passes = []

    def keep(*_: object) -> None:
        for name, parameter in trainer.model.named_parameters():
            value = parameter.grad
            grad[name] = value.full_tensor() if hasattr(value, "full_tensor") else value.clone()

    trainer.engine.optimizer.register_step_pre_hook(keep)
    trainer.model.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    assert trainer.step(loader)
    moe = trainer.tally.reduce(mesh.dp).moe
    losses = dict(zip(moe.loss_names, moe.loss_LJ.t().tolist(), strict=True))
    return Step(losses, moe.count_LME[:, 0], grad, len(passes))


def cut(config: RunConfig, mesh: Mesh, accumulation: int) -> Step:
    """The same 8 rows, the last two and a half of them padding, in ``accumulation`` micro-steps."""
    micro_batch = NUM_ROWS // (mesh.dp.size * accumulation)
    loader = steps_loader(mesh.dp.size, accumulation, mesh.dp.rank, micro_batch, NUM_ROWS)
    return step_of(config, mesh, loader)


def cuts(here: Here, layouts: list[tuple[int, int | None, int, bool]]) -> list[Step]:
    """With two passes, for each of (ep, fsdp, accumulation, recompute)."""
    return [
        cut(config_of("two_pass", recompute), here.mesh_of(ep, fsdp), accumulation)
        for ep, fsdp, accumulation, recompute in layouts
    ]


def assert_equal(got: Step, expected: Step, tolerance: float = 1e-12) -> None:
    assert torch.equal(got.load, expected.load)
    for name, values in expected.losses.items():
        assert got.losses[name] == pytest.approx(values, abs=tolerance), name
    for name, grad in expected.grad.items():
        scale = max(grad.abs().max().item(), 1.0)
        assert (got.grad[name] - grad).abs().max().item() <= tolerance * scale, name


def router_difference(got: Step, expected: Step) -> float:
    """Largest relative difference of a router's gradient."""
    names = [name for name in expected.grad if ".router." in name]
    return max(((got.grad[name] - expected.grad[name]).norm() / expected.grad[name].norm()).item() for name in names)


@pytest.mark.slow
@pytest.mark.pitfall("9", "12")
def test_two_passes_make_the_cut_of_a_batch_irrelevant(ranks):
    """Pitfalls 9 and 12: values and every gradient, over micro-steps, ranks, EP, cut weights, recomputation."""
    expected = cut(config_of("running"), Mesh.alone(), 1)
    assert all(abs(value) > 1e-3 for values in expected.losses.values() for value in values)
    for accumulation in (1, 2, 4):
        got = cut(config_of("two_pass", recompute=accumulation == 4), Mesh.alone(), accumulation)
        assert_equal(got, expected)
        assert got.num_forwards == (1 if accumulation == 1 else 2 * accumulation)
    for world, layouts in (
        (2, [(1, None, 2, False), (2, None, 4, True), (2, 2, 1, False)]),
        (4, [(1, None, 2, True), (2, 4, 2, False), (4, None, 2, True), (4, None, 1, False)]),
    ):
        for steps in zip(*ranks(world).run(cuts, layouts), strict=True):
            for got in steps:
                assert_equal(got, expected)


def test_running_counts_do_depend_on_it():
    """The default takes the micro-steps so far, so the first ones count a part of the batch."""
    whole, parts = (cut(config_of("running"), Mesh.alone(), accumulation) for accumulation in (1, 4))
    assert parts.num_forwards == 4 and torch.equal(parts.load, whole.load)
    assert router_difference(parts, whole) > 1e-3
    assert abs(parts.losses["switch"][0] - whole.losses["switch"][0]) > 1e-4


def test_running_counts_by_hand():
    """Two micro-steps: f of the first, then f of both, each with its own mass."""
    config = changed(
        config_of("running"), moe={"router": TopKConfig(top_k=2), "balance": {"switch": SwitchConfig(0.5)}}
    )
    trainer = make_trainer(config, config.data.open(), Mesh.alone())
    seen = []
    layer = trainer.measures.moe_layers[0]
    layer.router.register_forward_hook(lambda module, args, routing: seen.append((routing, args[1].valid_T)))
    assert trainer.step(steps_loader(1, 2, 0, 4, NUM_ROWS))
    asked_E, expected, num_tokens = torch.zeros(8).double(), 0.0, sum(int(valid_T.sum()) for _, valid_T in seen)
    for routing, valid_T in seen:
        asked_E = asked_E + torch.bincount(routing.expert_N[valid_T[routing.token_N]], minlength=8)
        expected += (8 * asked_E / asked_E.sum() * routing.probs_TE[valid_T].sum(0)).sum().item() / num_tokens
    moe = trainer.tally.reduce(trainer.mesh.dp).moe
    assert moe.loss_LJ[0, 0].item() == pytest.approx(expected, abs=1e-12)


class Copies:
    """A step of equal rows: however it is cut, every group of tokens looks like every other."""

    next_sample = NUM_ROWS

    def __init__(self, world: int, accumulation: int):
        row = next(steps_loader(1, 1, 0, 1, NUM_ROWS))[0]
        fields = {field.name: getattr(row, field.name) for field in dataclasses.fields(row)}
        num_rows = NUM_ROWS // (world * accumulation)
        batch = TokenBatch(**{k: None if v is None else torch.cat([v] * num_rows) for k, v in fields.items()})
        self.batches = [batch] * accumulation

    def __next__(self) -> list[TokenBatch]:
        return self.batches


def coefficient_config(scope: str, accumulation: str) -> RunConfig:
    balance = {
        "switch": SwitchConfig(0.3, scope, accumulation=accumulation),
        "importance": ImportanceConfig(0.2, scope, accumulation=accumulation),
        "z_loss": ZLossConfig(0.1),
    }
    return changed(
        config_of("running"), moe={"router": TopKConfig(top_k=2), "balance": balance}, train={"clip_norm": None}
    )


KINDS = [("sequence", "running"), ("micro_batch", "running"), ("global", "running"), ("global", "two_pass")]


def equal_rows(here: Here, ep: int, accumulation: int) -> list[Step]:
    mesh = here.mesh_of(ep)
    return [step_of(coefficient_config(*kind), mesh, Copies(here.world, accumulation)) for kind in KINDS]


@pytest.mark.pitfall("9")
def test_a_coefficient_acts_alike_however_a_batch_is_cut(ranks):
    """Pitfall 9: where all groups of tokens are alike, no scope, no accumulation and no layout changes anything."""
    expected = step_of(coefficient_config("global", "two_pass"), Mesh.alone(), Copies(1, 1))
    assert all(value > 0.01 for values in expected.losses.values() for value in values)
    for kind in KINDS:
        for accumulation in (2, 8):
            assert_equal(step_of(coefficient_config(*kind), Mesh.alone(), Copies(1, accumulation)), expected)
    for ep, accumulation in ((1, 2), (4, 1)):
        for steps in ranks(4).run(equal_rows, ep, accumulation):
            for got in steps:
                assert_equal(got, expected)
