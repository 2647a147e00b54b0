"""The selection bias over optimizer steps: the formula on the counts of the whole global batch, and nothing else."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from moedist.data.loader import Loader
from moedist.data.synthetic import SyntheticConfig
from moedist.mesh import Axis, Mesh
from moedist.moe.balance.bias import BiasConfig
from moedist.moe.balance.switch import SwitchConfig
from moedist.moe.layer import MoELayer
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


def biases(here: Here, ep: int, accumulation: int, recompute: bool) -> list[dict[str, torch.Tensor]]:
    """Bias and global counts of every layer after each of two steps, an evaluation between them."""
    config = changed(BIASED, train={"activation_checkpointing": "selective" if recompute else "none"})
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
    layers = [module for module in trainer.model.modules() if isinstance(module, MoELayer)]
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


class Alone(Here):
    """One process."""

    def __init__(self) -> None:
        super().__init__(0, 1)

    def mesh_of(self, ep: int) -> Mesh:
        return Mesh.alone()


@pytest.mark.pitfall("14")
def test_the_bias_is_in_checkpoints(tmp_path: Path):
    """Pitfall 14: fp32, not zero and equal after a save and a load, also in a bf16 run."""
    config = changed(BIASED, train={"precision": "bf16"})
    trainer = make_trainer(config, config.data.open(), Mesh.alone(), tmp_path)
    trainer.step(loader_of(1, 0, 4))
    expected = bias_of(trainer)
    assert expected.dtype == torch.float32 and expected.abs().max() > 0
    checkpoint = trainer.store.save(1, trainer.state(), {}, trainer.own_state())
    other = make_trainer(dataclasses.replace(config, seed=6), config.data.open(), Mesh.alone(), tmp_path)
    assert (bias_of(other) == 0).all()
    CheckpointStore(tmp_path, Axis("dp")).load(checkpoint, other.state(), other.own_state())
    assert torch.equal(bias_of(other), expected)
