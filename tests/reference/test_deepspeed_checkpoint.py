"""A checkpoint that DeepSpeed's own engine wrote of its own MoE layers, on two ranks with half of the experts each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from moedist.interop.deepspeed_moe import open_checkpoint, read_state
from moedist.moe.capacity import CapacityConfig
from moedist.moe.context import TokenContext
from moedist.moe.experts.loop import LoopConfig
from moedist.moe.layer import MoEConfig
from tests.reference.deepspeed_checkpoint import DIM, EXPERTS, HIDDEN

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deepspeed")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=127.0.0.1:0", "-m", "tests.reference.deepspeed_checkpoint", str(folder)]
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return folder


def expected(folder: Path) -> dict[str, torch.Tensor]:
    """From the live models of both ranks."""
    both = [torch.load(folder / f"expected_{rank}.pt", weights_only=True) for rank in range(2)]
    assert torch.equal(both[0]["y"], both[1]["y"])
    return both[0] | both[1]


def test_every_weight_is_found_under_its_global_id(saved: Path):
    live, state = expected(saved), read_state(open_checkpoint(saved / "saved"), rename=False)
    for name, value in live.items():
        before, place, after = name.partition(".deepspeed_experts.")
        if place:
            number, _, parameter = after.partition(".")
            assert torch.equal(state[f"{before}.{parameter}"][int(number)], value), name
        elif name not in ("x", "y"):
            assert torch.equal(state[name], value), name
    assert len(state) == 4 + 3 + 2 * 3  # experts of both kinds; a gate, a norm's weight and its bias per block
    of_all = torch.cat([value.flatten(1) for name, value in state.items() if ".experts." in name], 1)
    assert len(of_all.unique(dim=0)) == EXPERTS, "experts are alike, and the test empty"


def test_our_layers_compute_what_deepspeed_computed(saved: Path):
    """The two blocks by our MoE layer, its weights taken from the files."""
    live, state = expected(saved), read_state(open_checkpoint(saved / "saved" / "step2"))
    x = live["x"]
    for block, (activation, bias) in enumerate([("relu", True), ("swiglu", False)]):
        experts = LoopConfig(hidden_dim=HIDDEN, activation=activation, bias=bias)  # type: ignore[arg-type]
        config = MoEConfig(num_experts=EXPERTS, experts=experts, capacity=CapacityConfig(factor=None))
        layer = config.build(DIM).eval()
        prefix = f"blocks.{block}.ffn.moe."
        layer.load_state_dict(
            {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        )
        of_norm = [state[f"blocks.{block}.norm.{name}"] for name in ("weight", "bias")]
        normed = F.layer_norm(x, (DIM,), *of_norm)
        ctx = TokenContext.of_rows(*x.shape[:2])
        with torch.no_grad():
            x = x + layer(normed.flatten(0, 1), ctx).out_TD.view_as(x)
    torch.testing.assert_close(x, live["y"], rtol=1e-5, atol=1e-5)
