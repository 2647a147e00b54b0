"""Compiled parts compute what the eager ones do, in graphs that no step makes again."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from moedist.log.config import TraceConfig
from moedist.mesh import Mesh
from moedist.moe.balance.switch import SwitchConfig
from moedist.moe.balance.z_loss import ZLossConfig
from moedist.moe.dispatch.padded import PaddedConfig
from moedist.moe.experts.grouped import GroupedConfig
from moedist.moe.layer import MoE
from moedist.parallel import compile_parts
from moedist.parallel.compile import parts_of
from tests.ranks import Here
from tests.train.measure import run_steps
from tests.train.tiny import CONFIG, changed, make_trainer

# A coefficient, a capacity factor and noise that change with every step.
PADDED = changed(
    CONFIG,
    capacity={"final_factor": 0.6, "factor_steps": 9},
    moe={
        "dispatch": PaddedConfig(),
        "experts": GroupedConfig(hidden_dim=12),
        "balance": {
            "switch": SwitchConfig(0.3, final_coefficient=0.1, coefficient_steps=7),
            "z_loss": ZLossConfig(0.1),
        },
    },
)
RAGGED = changed(PADDED, moe={"dispatch": CONFIG.moe.dispatch})


def compiled(here: Here, backend: str, layouts: list, steps: int = 2) -> list[tuple[float, float, int, int]]:
    """Of each (config, ep, fsdp, recomputation): worst difference of a gradient and of a loss from the eager run,
    graphs made in the first step and in the others. Every graph is whole, or compiling would raise."""
    found = []
    for config, ep, fsdp, recompute in layouts:
        torch._dynamo.reset()
        config = changed(config, train={"activation_checkpointing": recompute})
        eager, trainer = (make_trainer(config, config.data.open(), here.mesh_of(ep, fsdp)) for _ in range(2))
        expected = run_steps(eager, steps)
        compile_parts(trainer.model, backend)
        counters.clear()
        real_step, graphs = trainer.engine.step, []

        def step(*args, real_step=real_step, graphs=graphs) -> float:
            graphs.append(counters["stats"]["unique_graphs"])
            return real_step(*args)

        trainer.engine.step = step
        got = run_steps(trainer, steps)
        gradient = max((got.grads[name] - grad).abs().max().item() for name, grad in expected.grads.items())
        loss = max(abs(one - other) for one, other in zip(got.losses, expected.losses, strict=True))
        found.append((gradient, loss, graphs[0], graphs[-1] - graphs[0]))
    return found


@pytest.mark.slow
def test_graphs_are_whole_equal_and_made_once(ranks):
    """Through the exchange at EP 2, with FSDP, with recomputation; 5 steps make no graph that the first has not."""
    layouts = [(PADDED, 2, None, "none"), (PADDED, 2, 2, "selective"), (RAGGED, 1, None, "full")]
    for results in ranks(2).run(compiled, "eager", layouts, steps=5, limit_s=120):
        for gradient, loss, first, later in results:
            assert gradient == loss == 0 and first >= 3 and later == 0


def test_routing_is_recorded_in_any_step():
    """A graph of a whole layer made before the recorder listens would never tell it anything."""
    config = changed(PADDED, log={"trace": TraceConfig(steps=(2,))})
    assert config.log.trace.on and not CONFIG.log.trace.on
    eager, trainer = (make_trainer(config, config.data.open(), Mesh.alone()) for _ in range(2))
    compile_parts(trainer.model, "eager", whole_layers=not config.log.trace.on)
    loaders = eager.loader(), trainer.loader()
    for step in (1, 2, 3):
        eager.step(loaders[0])
        trainer.step(loaders[1])
        expected, got = eager.recorder.take(step), trainer.recorder.take(step)
        assert (got is None) == (expected is None) == (step != 2)
        for block in got.layers if got is not None else ():
            assert torch.equal(got.layers[block].computed_TK, expected.layers[block].computed_TK)


@pytest.mark.slow
@pytest.mark.parametrize("ep", [1, 2, 4])
def test_graphs_with_their_own_backward(ranks, ep: int):
    layouts = [(PADDED, ep, None, "none"), (PADDED, ep, 4, "selective"), (PADDED, ep, None, "full")]
    for results in ranks(4).run(compiled, "aot_eager", layouts, limit_s=600):
        for gradient, loss, _, later in results:
            assert gradient <= 1e-12 and loss <= 1e-12 and later == 0


@pytest.mark.slow
@pytest.mark.parametrize("layout", [(1, None, "selective"), (2, None, "none"), (2, 2, "none")])
def test_inductor(ranks, layout):
    """The rotary tables are fp32 and its sine is another one."""
    for results in ranks(2).run(compiled, "inductor", [(PADDED, *layout)], limit_s=600):
        for gradient, loss, _, later in results:
            assert gradient <= 1e-6 and loss <= 1e-6 and later == 0


def test_what_is_compiled():
    """Whole MoE layers where shapes are static, their routers elsewhere; attentions and dense layers always."""
    for config, expected in ((PADDED, [True, True]), (RAGGED, [False, False])):
        model = config.model.build(37, config.moe, device="meta")
        parts = parts_of(model)
        assert [block.ffn.moe in parts for block in model.blocks[1:]] == expected
        assert [block.ffn.moe.router in parts for block in model.blocks[1:]] == [not whole for whole in expected]
        assert all(block.attention in parts for block in model.blocks) and model.blocks[0].ffn in parts
        assert not any(isinstance(module, MoE) for part in parts for module in list(part.modules())[1:])
