"""One rank with NCCL: the trainer on a GPU gives one process's numbers, with weights cut, offloaded and compiled."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from moedist.engine.native import NativeConfig
from moedist.mesh import Mesh
from moedist.mesh.mesh import grid
from moedist.moe.dispatch.padded import PaddedConfig
from moedist.train.checkpoint import CheckpointStore
from tests.train.measure import run_steps, worst_gradient, worst_loss, worst_norm
from tests.train.tiny import CONFIG, changed, digest_of, make_trainer

pytestmark = pytest.mark.gpu
PADDED = changed(CONFIG, moe={"dispatch": PaddedConfig()})
CASES = {
    "whole": (CONFIG, None, False),
    "cut": (CONFIG, 1, False),
    "offloaded": (CONFIG, 1, True),
    "compiled": (changed(PADDED, train={"compile": "blocks"}), None, False),
    "cut and compiled": (changed(PADDED, train={"compile": "blocks"}), 1, False),
    "recomputed": (changed(CONFIG, train={"activation_checkpointing": "selective"}), 1, False),
}
"""Configuration, ``mesh.fsdp`` and ``engine.offload``."""


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[torch.device]:
    """The first GPU, in a group of one rank."""
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    meet = tmp_path_factory.mktemp("nccl") / "meet"
    dist.init_process_group("nccl", init_method=f"file://{meet}", rank=0, world_size=1, device_id=device)
    yield device
    dist.destroy_process_group()


@pytest.mark.parametrize("case", CASES)
def test_a_rank_with_nccl_equals_a_process(device: torch.device, case: str) -> None:
    """fp64; compiled sines of the fp32 rotary tables are others."""
    config, fsdp, offload = CASES[case]
    config = dataclasses.replace(config, engine=NativeConfig(offload=offload))
    source, tolerance = config.data.open(), 1e-6 if "compiled" in case else 1e-12
    expected = run_steps(make_trainer(CONFIG, source, Mesh.alone()), 3)
    got = run_steps(make_trainer(config, source, grid(1, 1, device, fsdp=fsdp)), 3)
    got.grads = {name: grad.cpu() for name, grad in got.grads.items()}
    assert max(worst_loss(got, expected), worst_norm(got, expected)) <= tolerance
    assert worst_gradient(got, expected) <= tolerance


@pytest.mark.parametrize("offload", [False, True])
def test_checkpoints_of_a_gpu(device: torch.device, tmp_path: Path, offload: bool) -> None:
    """Saved by one rank whose weights are cut, loaded by one that holds them whole, and by a CPU."""
    config = dataclasses.replace(CONFIG, engine=NativeConfig(offload=offload))
    first = make_trainer(config, config.data.open(), grid(1, 1, device, fsdp=1), tmp_path)
    run_steps(first, 2)
    first.store.save(2, first.state(), {"step": 2})
    second = make_trainer(CONFIG, CONFIG.data.open(), grid(1, 1, device), tmp_path)
    second.store.load(tmp_path / "step_00000002", state := second.state())
    second.engine.restore(state, 2)
    second.store.save(3, second.state(), {"step": 3})
    assert CheckpointStore(tmp_path, first.mesh.dp).newest() == tmp_path / "step_00000003"
    assert digest_of(CONFIG, tmp_path / "step_00000002") == digest_of(CONFIG, tmp_path / "step_00000003")
