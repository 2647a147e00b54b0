"""Every router that a causal model takes trains, saves and goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moedist.mesh import Mesh
from moedist.moe.balance.bias import BiasConfig
from moedist.moe.balance.importance import ImportanceConfig
from moedist.moe.balance.load import LoadConfig
from moedist.moe.balance.switch import SwitchConfig
from moedist.moe.router.cosine import CosineConfig
from moedist.moe.router.forced import ForcedConfig
from moedist.moe.router.hash import HashConfig
from moedist.moe.router.mlp import MLPConfig
from moedist.moe.router.noisy import NoisyConfig
from moedist.moe.router.topk import TopKConfig
from moedist.moe.token_choice import GroupLimit
from tests.train.tiny import CONFIG, changed, leaves, make_trainer

ROUTERS = {
    "deepseek": (TopKConfig(score="sigmoid", groups=GroupLimit(4, 2), scale=2.5), {"bias": BiasConfig()}),
    "dense": (TopKConfig(mode="dense"), {}),
    "noisy": (NoisyConfig(), {"importance": ImportanceConfig(0.1), "load": LoadConfig(0.1)}),
    "mlp": (MLPConfig(final_temperature=0.5), {"switch": SwitchConfig(0.1, final_coefficient=0.0)}),
    "cosine": (CosineConfig(), {"switch": SwitchConfig(0.1)}),
    "hash": (HashConfig(), {}),
    "forced": (ForcedConfig(pattern="one_empty"), {}),
}


@pytest.mark.parametrize("name", ROUTERS)
def test_steps_and_a_resume(name: str, tmp_path: Path):
    """Two steps in a row, and one step, a save, a load into another run's trainer and one more: equal to the bit."""
    router, balance = ROUTERS[name]
    config = changed(CONFIG, moe={"router": router, "balance": balance}, capacity={"overflow": "next_best"})
    source = config.data.open()
    whole = make_trainer(config, source, Mesh.alone())
    first = make_trainer(config, source, Mesh.alone(), tmp_path)
    before = {key: tensor.clone() for key, tensor in leaves(first.state())}
    loader = whole.loader()
    for _ in range(2):
        assert whole.step(loader)
    assert first.step(first.loader())
    still = {key for key, tensor in leaves(first.state()) if torch.equal(tensor, before.get(key, torch.zeros(0)))}
    assert not [key for key in still if "moe.router" in key and "selection_bias" not in key and "master" not in key]
    meta = {"step": 1, "tokens": first.progress.tokens, "next_sample": first.progress.next_sample}
    path = first.store.save(1, first.state(), meta, first.own_state())
    second = make_trainer(config, source, Mesh.alone(), tmp_path)
    second.load(path)
    assert second.step(second.loader())
    expected = dict(leaves(whole.state()))
    for key, tensor in leaves(second.state()):
        assert torch.equal(tensor, expected[key]), key
