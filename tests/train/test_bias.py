"""The selection bias over optimizer steps: the formula on the counts of the whole global batch, and nothing else."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from moedist.data.loader import Loader
from moedist.data.synthetic import SyntheticConfig
from moedist.mesh import Axis, Mesh
from moedist.moe.balance.bias import BiasConfig
from moedist.moe.balance.quantile import QuantileConfig
from moedist.moe.balance.switch import SwitchConfig
from moedist.moe.layer import MoE
from moedist.moe.router.topk import TopKConfig
from moedist.train.checkpoint import CheckpointStore
from tests.ranks import Here
from tests.train.tiny import CONFIG, LENGTH, ROWS, changed, make_trainer

RATE = 0.01
BIASED = changed(
    CONFIG,
    capacity={"factor": None},
    moe={
        "router": TopKConfig(top_k=2, score="sigmoid"),
        "balance": {"bias": BiasConfig(RATE), "switch": SwitchConfig(0.01, "sequence")},
    },
)


RULES = {"bias": BiasConfig(RATE), "quantile": QuantileConfig(memory=0.3)}


def by_rule(rule: str):
    """One rule and a loss."""
    return changed(BIASED, moe={"balance": {rule: RULES[rule], "switch": SwitchConfig(0.01, "sequence")}})


def loader_of(world: int, rank: int, accumulation: int) -> Loader:
    """8 rows per step, the last two and a half of them padding."""
    source = SyntheticConfig(vocab_size=37, num_tokens=20 * (8 * LENGTH - 40), document_length=9, jump_rate=0.3).open()
    return Loader(
        source,
        "valid",
        sequence_length=LENGTH,
        micro_batch=ROWS,
        rank=rank,
        world_size=world,
        accumulation=accumulation,
    )


def biases(
    here: Here, ep: int, accumulation: int, recompute: bool, rule: str = "bias"
) -> list[dict[str, torch.Tensor]]:
    """Bias and global counts of every layer after each of two steps, an evaluation between them."""
    config = changed(by_rule(rule), train={"activation_checkpointing": "selective" if recompute else "none"})
    mesh, found = here.mesh_of(ep), []
    trainer = make_trainer(config, config.data.open(), mesh)
    for _ in range(2):
        assert trainer.step(loader_of(here.world, here.rank, accumulation))
        count_LE = trainer.tally.reduce(mesh.dp).moe.count_LME[:, 0].clone()
        before = bias_of(trainer)
        evaluate(trainer, loader_of(here.world, here.rank, accumulation))
        assert torch.equal(bias_of(trainer), before), "evaluation moved a bias"
        found.append({"bias": before, "count": count_LE})
    return found


def evaluate(trainer, loader) -> None:
    """What evaluation does: the model on a batch, without gradients, not in training."""
    from moedist.model.contract import StepContext

    with torch.no_grad():
        for batch in next(loader):
            trainer.model(batch, StepContext(0, torch.tensor(9), batch.num_tokens(), training=False))


def bias_of(trainer) -> torch.Tensor:
    layers = [module for module in trainer.model.modules() if isinstance(module, MoE)]
    return torch.stack([layer.router.selection_bias.clone() for layer in layers])


@pytest.mark.pitfall("13", "14", "15")
@pytest.mark.parametrize(("world", "ep", "accumulation"), [(1, 1, 4), (2, 2, 2), (4, 2, 1)])
@pytest.mark.parametrize("recompute", [False, True])
def test_formula_on_global_counts(ranks, world, ep, accumulation, recompute):
    """Pitfalls 13 to 15: accumulation, evaluation, padding and activation checkpointing."""
    if world == 1:
        results = [biases(Alone(), ep, accumulation, recompute)]
    else:
        results = ranks(world).run(biases, ep, accumulation, recompute)
    valid = sum(int(batch.valid_BS.sum()) for batch in next(loader_of(1, 0, 4)))
    for steps in results:
        expected = torch.zeros(steps[0]["bias"].shape)
        for step in steps:
            count_LE = step["count"]
            assert count_LE.dtype == torch.int64 and (count_LE.sum(1) == 2 * valid).all(), "padding or twice"
            expected += RATE * (count_LE.double().mean(1, keepdim=True) - count_LE).sign().float()
            expected -= expected.mean(1, keepdim=True)
            torch.testing.assert_close(step["bias"], expected, atol=1e-8, rtol=0)
            assert step["bias"].dtype == torch.float32 and step["bias"].abs().max() > 0
        assert torch.equal(steps[1]["count"], results[0][1]["count"])


def test_quantiles_are_those_of_the_global_batch(ranks):
    """Pitfalls 14 and 15: the same bias on every rank, over ranks, EP, accumulation, recomputation and padding."""
    expected = biases(Alone(), 1, 4, False, "quantile")
    assert expected[0]["bias"].abs().max() > 0.01 and not torch.equal(expected[0]["bias"], expected[1]["bias"])
    found = [biases(Alone(), 1, 4, True, "quantile")]
    for world, layouts in ((2, [(2, 2, False)]), (4, [(1, 1, True), (2, 1, False), (4, 1, True)])):
        for layout in layouts:
            found += ranks(world).run(biases, *layout, "quantile")
    for steps in found:
        for got, wanted in zip(steps, expected, strict=True):
            assert torch.equal(got["count"], wanted["count"]) and got["bias"].dtype == torch.float32
            torch.testing.assert_close(got["bias"], wanted["bias"], atol=1e-7, rtol=0)


def test_a_quantile_is_the_step_s_and_acts_from_the_next_one_on():
    """By the definition, from what the routers of two micro-steps said: each token's best score outside its choice is
    its price, and the bias moves by the K / E quantile of price - score."""
    config = by_rule("quantile")
    trainer = make_trainer(config, config.data.open(), Mesh.alone())
    layer, seen = trainer.measures.moe_layers[0], []
    layer.router.register_forward_hook(
        lambda module, args, routing: seen.append((routing.score_TE[args[1].valid_T], module.selection_bias.clone()))
    )
    loader = loader_of(1, 0, 4)
    assert trainer.step(loader)
    assert len(seen) == 4 and all((bias_E == 0).all() for _, bias_E in seen), "used on the batch it was made from"
    score_TE = torch.cat([score_TE for score_TE, _ in seen]).detach()
    short_TE = score_TE.sort(dim=1, descending=True).values[:, 2, None] - score_TE
    rank = score_TE.shape[0] * 2 / 8
    expected_E = short_TE.sort(dim=0).values[math.ceil(rank) - 1]
    expected_E = 0.7 * (expected_E - expected_E.mean())
    torch.testing.assert_close(bias_of(trainer)[0].double(), expected_E, atol=5e-3, rtol=0)


class Alone(Here):
    """One process."""

    def __init__(self) -> None:
        super().__init__(0, 1)

    def mesh_of(self, ep: int) -> Mesh:
        return Mesh.alone()


@pytest.mark.pitfall("14")
@pytest.mark.parametrize("rule", RULES)
def test_the_bias_is_in_checkpoints(tmp_path: Path, rule: str):
    """Pitfall 14: fp32, not zero and equal after a save and a load, also in a bf16 run."""
    config = changed(by_rule(rule), train={"precision": "bf16"})
    trainer = make_trainer(config, config.data.open(), Mesh.alone(), tmp_path)
    trainer.step(loader_of(1, 0, 4))
    expected = bias_of(trainer)
    assert expected.dtype == torch.float32 and expected.abs().max() > 0
    checkpoint = trainer.store.save(1, trainer.state(), {}, trainer.own_state())
    other = make_trainer(dataclasses.replace(config, seed=6), config.data.open(), Mesh.alone(), tmp_path)
    assert (bias_of(other) == 0).all()
    CheckpointStore(tmp_path, Axis("dp")).load(checkpoint, other.state(), other.own_state())
    assert torch.equal(bias_of(other), expected)
