"""MoE layers of single blocks: a block says what differs from the run's ``moe``, in a real configuration."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from moedist.config import ConfigError, to_mapping
from moedist.launch.compose import Composed, compose, compose_onto
from moedist.launch.evaluation import without_limits
from moedist.launch.saved import decode_saved
from moedist.launch.validate import validate
from moedist.mesh import Mesh
from moedist.train.build import build_model
from moedist.train.run import greet
from tests.train.tiny import make_trainer

TINY = [
    "experiment=null",
    "data=synthetic",
    "data.vocab_size=64",
    "data.num_tokens=20000",
    "data.document_length=40",
    "model.dim=16",
    "moe.experts.hidden_dim=16",
    "mesh.device=cpu",
    "train.sequence_length=16",
    "train.micro_batch=2",
    "train.eval_every=null",
    "model/layers=listed",
]
T, K, E = 32, 2, 8


def listed(*moes: str, overrides: tuple[str, ...] = ()) -> Composed:
    """A run whose blocks have these MoE layers."""
    blocks = ", ".join(f"{{ffn: {{kind: moe, moe: {moe}}}}}" for moe in moes)
    return compose([*TINY, *overrides, f"model.layers.blocks=[{blocks}]"])


@pytest.mark.filterwarnings("ignore:moe.capacity")
def test_layers_of_one_model_have_capacities_of_their_own(tmp_path: Path):
    """Block 0 has the run's factor, block 1 its own, block 2 one that grows over the steps, block 3 no limit."""
    scheduled = "{capacity: {factor: 0.5, final_factor: 1.0, factor_steps: 2}}"
    composed = listed(
        "{}", "{capacity: {factor: 0.75}}", scheduled, "{capacity: {factor: null}}",
        overrides=("moe.capacity.factor=0.5", "moe/balance=[]", f"run.dir={tmp_path / 'run'}"),
    )  # fmt: skip
    validate(composed.config, composed.mapping, 1)
    trainer = make_trainer(composed.config, composed.config.data.open(), Mesh.alone())
    loader = trainer.loader()
    for step in range(4):
        assert trainer.step(loader)
        asked_LE, kept_LE, dropped_LE = trainer.tally.reduce(trainer.mesh.dp).moe.count_LME.unbind(1)[:3]
        growing = 0.5 + 0.5 * min(step, 2) / 2
        limit_L1 = torch.tensor([[math.ceil(f * T * K / E)] for f in (0.5, 0.75, growing)] + [[T]])
        assert torch.equal(kept_LE, torch.minimum(asked_LE, limit_L1))
        assert (dropped_LE.sum(1) > 0).tolist() == [True, True, True, False]


def test_what_a_block_leaves_out_is_the_run_s():
    composed = listed(
        "{capacity: {factor: 3.0}}",
        "{router: {top_k: 1, renormalize: false}, balance: {switch: {coefficient: 0.5}}}",
        "{router: {kind: hash}, balance: {}, experts: {kind: loop, hidden_dim: 8}}",
        overrides=("moe=gshard", "moe.router.noise_std=0.25"),
    )
    run, (first, second, third) = composed.config.moe, (spec.ffn.moe for spec in composed.config.model.layers.blocks)
    assert (first.capacity.factor, first.capacity.base, first.capacity.drop_policy) == (3.0, "tokens", "choice")
    assert (first.router, first.balance, first.experts) == (run.router, run.balance, run.experts)
    assert (second.router.top_k, second.router.noise_std, second.router.renormalize) == (1, 0.25, False)
    assert second.capacity == run.capacity
    assert (second.balance["switch"].coefficient, second.balance["switch"].count) == (0.5, "first")
    assert third.router.kind == "hash" and third.router.top_k == 1, "the run's router is another kind"
    assert (third.experts.kind, third.capacity) == ("loop", run.capacity)
    assert run.capacity.factor == 2.0


def test_a_block_can_leave_ways_to_balance_out():
    composed = listed(
        "{balance: {}}", "{balance: {switch: null}}", "{balance: {switch: {coefficient: 0.5}, z_loss: null}}", "{}"
    )
    found = [spec.ffn.moe.balance for spec in composed.config.model.layers.blocks]
    assert [list(balance) for balance in found] == [[], ["z_loss"], ["switch"], ["switch", "z_loss"]]
    assert found[2]["switch"].coefficient == 0.5
    again = compose_onto(composed.mapping)
    assert [spec.ffn.moe.balance for spec in again.config.model.layers.blocks] == found


def test_the_file_that_ranks_read_holds_each_layer_whole():
    composed = listed("{capacity: {factor: 3.0}}", "{}", overrides=("moe=switch",))
    assert decode_saved(composed.mapping) == composed.config
    blocks = composed.mapping["model"]["layers"]["blocks"]
    assert blocks[0]["ffn"]["moe"]["router"] == to_mapping(composed.config.moe.router)
    assert blocks[1]["ffn"]["moe"] == to_mapping(composed.config.moe)
    # A later change of the run's moe is the run's alone: the layers are written out.
    again = compose_onto(composed.mapping, ["moe.capacity.factor=7.0"])
    assert [spec.ffn.moe.capacity.factor for spec in again.config.model.layers.blocks] == [3.0, 1.25]
    free = compose_onto(without_limits(composed.mapping))
    assert all(spec.ffn.moe.capacity.dropless for spec in free.config.model.layers.blocks)


@pytest.mark.parametrize(
    ("run", "layer"), [("pooled", "{scope: sequence}"), ("pooled", "{layers: each}"), ("each", "{layers: pooled}")]
)
def test_a_loss_of_all_layers_is_the_same_in_all(run: str, layer: str, tmp_path: Path):
    overrides = (f"moe.balance.switch.layers={run}", f"run.dir={tmp_path / 'run'}")
    alike = listed("{}", "{capacity: {factor: 2.0}}", overrides=overrides)
    validate(alike.config, alike.mapping, 1)
    unlike = listed("{}", f"{{balance: {{switch: {layer}}}}}", overrides=overrides)
    with pytest.raises(ConfigError) as caught:
        validate(unlike.config, unlike.mapping, 1)
    (error,) = getattr(caught.value, "errors", [caught.value])
    assert error.key == "model.layers.blocks.1.ffn.moe.balance.switch" and "in the run's" in error.remedy


def test_the_start_of_a_run_says_which_limits_are_not_causal():
    """Those of all layers, each kind once; the run's own may be no layer's."""
    limits = ("{}", "{capacity: {factor: 1.0, drop_policy: random}}", "{capacity: {factor: 2.0, drop_policy: random}}")
    config = listed(*limits, overrides=("moe.capacity.factor=null",)).config
    source, lines = config.data.open(), []
    log = type("Log", (), {"say": staticmethod(lines.append)})()
    greet(log, config, source, build_model(config, source.vocab_size, Mesh.alone()), Mesh.alone(), None)
    (line,) = (line for line in lines if "evict" in line)
    assert line.startswith("note   drop_policy random in groups of a rank: ")


@pytest.mark.parametrize(
    ("moe", "key"),
    [
        ("{capacity: {factor: 0}}", "model.layers.blocks.1.ffn.moe.capacity.factor"),
        ("{capacity: {faktor: 1}}", "model.layers.blocks.1.ffn.moe.capacity.faktor"),
        ("{router: {kind: hash, top_k: 9}}", "model.layers.blocks.1.ffn.moe.router.top_k"),
    ],
)
def test_errors_name_the_block(moe: str, key: str):
    with pytest.raises(ConfigError) as caught:
        listed("{}", moe)
    assert caught.value.key == key
