"""Weights cut over ranks (FSDP2, HSDP) beside expert parallelism: nothing changes but where things lie."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from moedist.config import ConfigError
from moedist.engine.native import NativeConfig
from moedist.mesh import MeshConfig
from moedist.mesh.collectives import all_gather
from moedist.mesh.slow import slow_axis
from moedist.model.contract import StepContext
from moedist.model.layers.contract import LayerSpec
from moedist.model.layers.listed import ListedConfig
from moedist.moe.capacity import CapacityConfig
from moedist.moe.dispatch.padded import PaddedConfig
from moedist.moe.experts.grouped import GroupedConfig
from moedist.moe.experts.loop import LoopConfig
from moedist.moe.layer import MoEConfig
from moedist.moe.report import pack_reports
from moedist.moe.router.contract import Router
from moedist.moe.router.cosine import CosineConfig
from moedist.moe.router.topk import TopKConfig
from moedist.parallel.fully_shard import dim_to_cut
from moedist.train.build import autocast
from moedist.train.checkpoint import CheckpointStore
from moedist.train.config import RunConfig
from moedist.train.evaluate import evaluate
from moedist.train.optimizer.adamw import AdamWConfig
from tests.parity import NUM_EXPERTS, SCENES, compare, many_ranks, one_device
from tests.ranks import Here
from tests.train.measure import Steps, on_global_batch, on_one_device, run_steps, whole
from tests.train.tiny import CONFIG, changed, digest_of, leaves, make_trainer

LAYOUTS = [(1, None), (2, None), (4, None), (1, 1), (1, 2), (1, 4), (2, 2), (2, 4), (4, 4)]
"""(ep, fsdp) on 4 ranks."""
CUT = [(ep, fsdp) for ep, fsdp in LAYOUTS if fsdp is not None]
STEPS = 2


def train(here: Here, config: RunConfig) -> list[tuple[Steps, list[str]]]:
    """Of layouts: what the steps did, and names of the parameters that differ between replicas after them."""
    source, results = config.data.open(), []
    for ep, fsdp in LAYOUTS if config.train.accumulation(4) == 1 else [(2, 2), (2, 4)]:
        mesh = here.mesh_of(ep, fsdp)
        trainer = make_trainer(config, source, mesh)
        steps = run_steps(trainer, STEPS)
        apart = []
        for name, parameter in trainer.model.named_parameters():
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            copies = all_gather(local.detach(), trainer.spread.gradients.spread_of[name].copies)
            apart += [] if (copies == copies[0]).all() else [name]
        results.append((steps, apart))
    return results


@pytest.mark.pitfall("1", "2", "3", "6", "7")
@pytest.mark.parametrize("accumulation", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_every_layout_equals_one_device(ranks, accumulation: int):
    """Pitfalls 1, 2, 3, 6 and 7, with dropping, noise and the clip on: first values, gradients, losses, norms."""
    config = on_global_batch(CONFIG, accumulation)
    expected = on_one_device(config, STEPS)
    assert max(expected.norms) > CONFIG.train.clip_norm, "the clip must act"
    for by_rank in zip(*ranks(4).run(train, config, limit_s=300), strict=True):
        assert all(steps.norms == by_rank[0][0].norms for steps, _ in by_rank), "the same number on every rank"
        for steps, apart in by_rank:
            assert apart == []
            assert steps.losses == pytest.approx(expected.losses, rel=0, abs=1e-12)
            assert steps.norms == pytest.approx(expected.norms, rel=1e-12)
            for name, value in expected.first.items():
                assert torch.equal(steps.first[name], value), name
                worst = (steps.grads[name] - expected.grads[name]).abs().max()
                assert worst <= 1e-12 * max(1.0, expected.grads[name].abs().max().item()), name
                assert (steps.last[name] - expected.last[name]).abs().max() <= 1e-12, name


CASES = {
    "padded": MoEConfig(num_experts=NUM_EXPERTS, dispatch=PaddedConfig(), experts=LoopConfig(hidden_dim=12, bias=True)),
    "shared": MoEConfig(
        num_experts=NUM_EXPERTS,
        capacity=CapacityConfig(factor=1.0),
        experts=GroupedConfig(hidden_dim=12),
        shared_hidden_dim=6,
    ),
    "scalar": MoEConfig(
        num_experts=NUM_EXPERTS, router=CosineConfig(), capacity=CapacityConfig(factor=0.5, drop_policy="token")
    ),
}


def layers(here: Here, case: str) -> float:
    """Worst difference of a layer on its own from one device, over layouts and scenes."""
    worst = 0.0
    for scene in SCENES:
        config = CASES[case]
        expected = one_device(config, scene, here.world)
        for ep, fsdp in CUT:
            got = many_ranks(config, scene, here.mesh_of(ep, fsdp))
            for name, value in got.grad.items():
                assert value is not None, name
                assert not (value[expected.grad[name] == 0] != 0).any(), f"{name} of an idle expert is not exactly 0"
            worst = max(worst, compare(got, expected))
    return worst


@pytest.mark.pitfall("4", "5")
@pytest.mark.parametrize("case", CASES)
def test_empty_ranks_and_idle_experts(ranks, case: str):
    """Pitfalls 4 and 5: ranks with 0, 1, 7 and 24 tokens, and every token to one expert."""
    assert max(ranks(4).run(layers, case, limit_s=120)) <= 1e-12


def objective_alone(here: Here, with_task: bool) -> list[dict[str, Tensor]]:
    """Gradients of the balance losses alone at every layout that cuts, and on one rank's own whole model."""
    source, found = CONFIG.data.open(), []
    for ep, fsdp in [(1, None), *CUT]:
        trainer = make_trainer(CONFIG, source, here.mesh_of(ep, fsdp))
        batches = next(trainer.loader())
        totals = trainer.agree(batches)
        context = StepContext(CONFIG.seed, torch.tensor(0), torch.tensor(totals.num_tokens), training=True)
        output = trainer.model(batches[0], context)
        loss = pack_reports(output.reports).objective()
        if with_task:
            loss = loss + output.logits_BSV.square().mean()
        trainer.engine.backward(loss, last=True)
        for parameter in trainer.model.parameters():  # what lies behind the last router took no part
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        trainer.engine.gradients.sum_copies(trainer.model)
        found.append({name: whole(parameter.grad) for name, parameter in trainer.model.named_parameters()})
    return found


@pytest.mark.parametrize("with_task", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_loss_of_reports_alone_finds_every_weight(ranks, with_task: bool):
    """A backward that begins in a report, whose tensors FSDP must have hooked as it has hooked the logits."""
    for expected, *others in ranks(4).run(objective_alone, with_task, limit_s=120):
        assert expected["blocks.1.ffn.moe.router.weight"].abs().max() > 1e-3
        for got in others:
            for name, value in expected.items():
                assert (got[name] - value).abs().max() <= 1e-12, name


# What lies where


def placed(here: Here, ep: int, fsdp: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """Of every parameter: shape of this rank's piece, and the names of the axes it lies over."""
    model = make_trainer(CONFIG, CONFIG.data.open(), here.mesh_of(ep, fsdp)).model
    assert isinstance(model, FSDPModule)
    return {
        name: (tuple(parameter.to_local().shape), " ".join(parameter.device_mesh.mesh_dim_names))
        for name, parameter in model.named_parameters()
    }


def test_where_the_pieces_lie(ranks):
    """Dense weights over all four; experts (8 of [16, 12]) by two, then cut inside; replicas hold the same."""
    for pieces in ranks(4).run(placed, 2, 4):
        assert pieces["blocks.1.ffn.moe.bank.experts.up"] == ((4, 8, 12), "shard ep")
        assert pieces["blocks.1.ffn.moe.router.weight"] == ((2, 16), "fsdp")
        assert pieces["blocks.0.attention.query.weight"] == ((4, 16), "fsdp")
        assert pieces["head.weight"] == ((37, 4), "fsdp"), "37 rows: cut the other way"
    for pieces in ranks(4).run(placed, 2, 2):
        assert pieces["blocks.1.ffn.moe.bank.experts.up"] == ((4, 16, 12), "replicate shard ep")
        assert pieces["blocks.0.attention.query.weight"] == ((8, 16), "replicate fsdp")


def test_the_dim_that_is_cut():
    for shape, size, dim in (((8, 6), 4, 0), ((6, 8), 4, 1), ((5, 7), 4, 0), ((1, 6, 4), 2, 1), ((5,), 1, 0)):
        assert dim_to_cut(torch.empty(shape), size) == dim


# Evaluation, checkpoints, precision


def evaluated(here: Here) -> list[tuple[float, float]]:
    """Held-out loss after a step, and the training loss of the step after it."""
    config = changed(CONFIG, train={"eval_batches": 2})
    source, found = config.data.open(), []
    for ep, fsdp in [(1, None), (2, 4), (2, 2)]:
        trainer = make_trainer(config, source, here.mesh_of(ep, fsdp))
        loader = trainer.loader()
        trainer.step(loader)
        held_out = evaluate(trainer.model, source, config, trainer.mesh, trainer.progress.step)
        assert all(isinstance(parameter, DTensor) for parameter in trainer.model.parameters()) or fsdp is None
        trainer.step(loader)
        found.append((held_out, trainer.tally.reduce(trainer.mesh.dp).loss))
    return found


@pytest.mark.pitfall("5")
def test_evaluation_leaves_no_gathered_weights(ranks):
    for (held_out, loss), *others in ranks(4).run(evaluated, limit_s=120):
        for other in others:
            assert other == pytest.approx((held_out, loss), abs=1e-12)


def digest(state: dict[str, Any]) -> str:
    parts = hashlib.sha256()
    for name, tensor in sorted(leaves_whole(state).items()):
        parts.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return parts.hexdigest()


def leaves_whole(state: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value.reshape(-1) for name, value in leaves(wholes(state))}


def wholes(state: dict[str, Any]) -> dict[str, Any]:
    return {key: wholes(value) if isinstance(value, dict) else whole(value) for key, value in state.items()}


def pass_on(here: Here, folder: Path) -> list[str]:
    """A state trained at one layout, then loaded and saved by every other in turn: digests of the whole."""
    config, source = CONFIG, CONFIG.data.open()
    found = []
    for step, (ep, fsdp) in enumerate([(2, 4), (4, 4), (2, None), (2, 2), (1, 4)], start=1):
        mesh = here.mesh_of(ep, fsdp)
        trainer = make_trainer(config, source, mesh)
        store = CheckpointStore(folder, slow_axis(mesh, 60.0), None, [].append)
        if step == 1:
            run_steps(trainer, 2)
        else:
            state = trainer.state()
            store.load(folder / f"step_{step - 1:08d}", state)
            trainer.engine.restore(state, 2)
        found.append(digest(trainer.state()))
        if step % 2:  # in the background, while the live weights change
            saving = store.begin(step, trainer.state(), {})
            run_steps(trainer, 1)
            saving.wait(60.0)
        else:
            store.save(step, trainer.state(), {})
    return found


@pytest.mark.slow
def test_checkpoints_pass_through_every_layout(ranks, tmp_path: Path):
    """Weights and moments, to the bit; then on one process."""
    for digests in ranks(4).run(pass_on, tmp_path, limit_s=120):
        assert len(set(digests)) == 1, digests
    assert digest_of(CONFIG, tmp_path / "step_00000001") == digest_of(CONFIG, tmp_path / "step_00000005")


BF16 = changed(
    CONFIG,
    train={"precision": "bf16", "optimizer": AdamWConfig()},
    capacity={"factor": None},
    moe={"experts": GroupedConfig(hidden_dim=16), "router": TopKConfig(top_k=2)},
)


def narrow(here: Here) -> list[tuple[list[float], dict[str, str]]]:
    """Losses in bf16, and the dtypes that a forward pass has seen."""
    source, found = BF16.data.open(), []
    for ep, fsdp in [(2, None), (2, 4), (4, 4), (1, 2)]:
        trainer = make_trainer(BF16, source, here.mesh_of(ep, fsdp))
        seen: dict[str, str] = {}

        def note(module: nn.Module, args: tuple, output: Any = None, seen: dict[str, str] = seen) -> None:
            if output is None:  # before forward: after it the router's unit has let go of what it gathered
                seen["router"] = str(module.weight.dtype)
            elif isinstance(module, Router):
                seen["logits"] = str(output.logits_TE.dtype)
            else:
                seen |= {"query": str(module.weight.dtype), "x": str(output.dtype)}

        trainer.model.blocks[1].ffn.moe.router.register_forward_pre_hook(note)
        trainer.model.blocks[1].ffn.moe.router.register_forward_hook(note)
        trainer.model.blocks[1].attention.query.register_forward_hook(note)
        steps = run_steps(trainer, 3)
        seen["weights"] = str({parameter.dtype for parameter in trainer.model.parameters()})
        seen["gradients"] = str({gradient.dtype for gradient in steps.grads.values()})
        assert autocast(BF16, trainer.mesh)._enabled == (fsdp is None)
        found.append((steps.losses, seen))
    return found


@pytest.mark.slow
def test_bf16_gathers_narrow_weights_and_routes_in_fp32(ranks):
    """Weights fp32, gathered in bf16, gradients summed in fp32; the router's unit and its logits fp32. The losses stay
    within 2 % of autocast's: bf16 keeps 8 bits."""
    for (losses, _), *others in ranks(4).run(narrow, limit_s=120):
        for other, seen in others:
            assert other == pytest.approx(losses, rel=2e-2)
            assert seen == {
                "router": "torch.float32",
                "logits": "torch.float32",
                "query": "torch.bfloat16",
                "x": "torch.bfloat16",
                "weights": "{torch.float32}",
                "gradients": "{torch.float32}",
            }


# Offloading


def offloaded(here: Here) -> list[float]:
    """Worst difference of a last value from the run that keeps all on the device."""
    source, found = CONFIG.data.open(), []
    for ep, fsdp in [(1, 1), (2, 4)]:
        mesh = here.mesh_of(ep, fsdp)
        expected = run_steps(make_trainer(CONFIG, source, mesh), STEPS)
        trainer = make_trainer(dataclasses.replace(CONFIG, engine=NativeConfig(offload=True)), source, mesh)
        got = run_steps(trainer, STEPS)
        found.append(max((got.last[name] - value).abs().max().item() for name, value in expected.last.items()))
        assert trainer.state()["optimizer"]["head.weight"]["exp_avg"].device.type == "cpu"
    return found


@pytest.mark.slow
def test_offloading_changes_nothing(ranks):
    """On a CPU host and device are one, which leaves the way through FSDP's policy to test."""
    assert ranks(4).run(offloaded, limit_s=120) == [[0.0, 0.0]] * 4


def test_offloading_needs_weights_that_are_cut():
    step = CONFIG.train.optimizer_step(4)
    NativeConfig(offload=True).check(step, MeshConfig(fsdp=1), 4)
    with pytest.raises(ConfigError, match="engine.offload = True needs weights that are cut .* Set mesh.fsdp to 2 or"):
        NativeConfig(offload=True).check(step, MeshConfig(ep=2), 4)


def without_moe(here: Here) -> list[list[float]]:
    """Losses of a model whose blocks are all dense, whose metrics are reduced all the same."""
    config = changed(CONFIG, model={"layers": ListedConfig(blocks=(LayerSpec(repeat=2),))})
    found = []
    for fsdp in (None, 4):
        trainer = make_trainer(config, config.data.open(), here.mesh_of(1, fsdp))
        assert not trainer.model.moe_blocks
        found.append(run_steps(trainer, STEPS).losses)
        assert trainer.tally.reduce(trainer.mesh.dp).moe is None
    return found


@pytest.mark.pitfall("31")
def test_metrics_without_a_moe_layer(ranks):
    for whole_weights, cut in ranks(4).run(without_moe, limit_s=120):
        assert cut == pytest.approx(whole_weights, abs=1e-12)
