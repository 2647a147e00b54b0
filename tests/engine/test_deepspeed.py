"""DeepSpeed's engine on gloo ranks: gradients of one device, numbers and checkpoints of the native engine."""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moedist.config import ConfigError, ConfigErrors
from moedist.engine.deepspeed import DeepSpeedConfig, spread_for_deepspeed
from moedist.engine.native import NativeConfig
from moedist.launch.compose import compose
from moedist.launch.validate import accepts, validate
from moedist.mesh import Mesh
from moedist.mesh.collectives import all_gather
from moedist.model.attention.experts.hyperbolic import HyperbolicConfig
from moedist.model.attention.experts.linear import LinearConfig
from moedist.model.attention.experts.standard import StandardConfig
from moedist.model.attention.moe import MixedAttentionConfig
from moedist.model.contract import StepContext
from moedist.moe.capacity import CapacityConfig
from moedist.moe.dispatch.all_to_all import AllToAllConfig
from moedist.moe.dispatch.budget import BudgetConfig
from moedist.moe.dispatch.hierarchical import HierarchicalConfig
from moedist.moe.dispatch.padded import PaddedConfig
from moedist.moe.experts.grouped import GroupedConfig
from moedist.moe.router.contract import Router
from moedist.moe.router.cosine import CosineConfig as CosineRouterConfig
from moedist.moe.router.mlp import MLPConfig
from moedist.nn import MoEAttention, MoEAttentionConfig, MoELayer
from moedist.train.checkpoint.manifest import folder_name
from moedist.train.config import RunConfig
from moedist.train.trainer import Trainer
from tests.ranks import Here
from tests.train.test_parity import Case, Reference, reference, steps_loader
from tests.train.tiny import CONFIG, LENGTH, ROWS, changed, digest_of, leaves, make_trainer

STAGES = (0, 1, 2)
ADAM = {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")}
RATE = 1024.0
"""Of SGD: a weight then moves by its gradient alone, to all of its digits."""


def run_of(
    here: Here, config: RunConfig, folder: Path | None = None, ep: int = 1, ranks_per_node: int | None = None
) -> Trainer:
    """A trainer below torchrun's environment, as DeepSpeed demands it."""
    os.environ.setdefault("LOCAL_RANK", str(here.rank))
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    return make_trainer(config, config.data.open(), here.mesh_of(ep, None, ranks_per_node), folder)


def config_of(engine: Any, world: int = 4, accumulation: int = 2, **train: Any) -> RunConfig:
    """The tiny run in fp32 (unless ``train`` says otherwise), clipped at every step."""
    train = {"precision": "fp32", "global_batch_tokens": world * accumulation * ROWS * LENGTH, **train}
    return dataclasses.replace(changed(CONFIG, train=train), engine=engine)


# Gradients


def case_of(accumulation: int, fancy: bool) -> Case:
    config = changed(CONFIG, train={"precision": "fp32", "clip_norm": 0.05}, capacity={"factor": 0.5})
    if fancy:  # a router with a 0-dim parameter among the rest
        config = changed(
            config,
            train={"activation_checkpointing": "full"},
            moe={
                "router": CosineRouterConfig(top_k=2),
                "dispatch": PaddedConfig(),
                "experts": GroupedConfig(hidden_dim=12),
                "shared_hidden_dim": 6,
            },
            model={"tie_embeddings": True},
        )
    return Case(config, accumulation)


def moved(
    here: Here, ep: int, case: Case, stages: tuple[int, ...], ranks_per_node: int | None = None
) -> list[tuple[float, dict[str, Tensor], float]]:
    """Of each stage: norm, whole change of every parameter by one step of SGD, largest difference between replicas."""
    results = []
    for stage in stages:
        trainer = run_of(here, case.config, ep=ep, ranks_per_node=ranks_per_node)
        mesh, table = trainer.mesh, trainer.spread.gradients
        groups: dict[str, list[Tensor]] = {}
        for name, parameter in trainer.model.named_parameters():
            groups.setdefault(table.spread_of[name].role, []).append(parameter)
        sgd = torch.optim.SGD([{"name": role, "params": those} for role, those in groups.items()], lr=RATE)
        config = DeepSpeedConfig(zero_stage=stage, config={"zero_allow_untested_optimizer": True})
        step = dataclasses.replace(case.config.train.optimizer_step(here.world), accumulation=case.accumulation)
        trainer.engine = config.build(trainer.model, mesh, sgd, table, step)
        with closing(trainer.engine):
            before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
            trainer.engine.set_learning_rate = lambda factor: None  # type: ignore[method-assign]
            num_rows = here.world * case.accumulation * ROWS
            assert trainer.step(steps_loader(here.world, case.accumulation, here.rank, ROWS, num_rows))
            change, apart = {}, 0.0
            for name, parameter in trainer.model.named_parameters():
                grad = (before[name] - parameter.detach()) / RATE
                spread = table.spread_of[name]
                copies = all_gather(grad, spread.copies)
                apart = max(apart, (copies - copies[0]).abs().max().item())
                change[name] = grad if spread.pieces is None else all_gather(grad, spread.pieces).flatten(0, 1)
            results.append((trainer.grad_norm, change if here.rank == 0 else {}, apart))
    return results


def check_gradients(
    ranks: Any,
    ep: int,
    case: Case,
    ranks_per_node: int | None = None,
    world: int = 4,
    stages: tuple[int, ...] = STAGES,
) -> None:
    known: dict[str, Reference] = {}
    _, expected = reference(case, world, known)
    norm = math.sqrt(sum(grad.double().square().sum().item() for grad in expected.values()))
    clip = case.config.train.clip_norm / norm
    assert clip < 0.5, "it clips"
    by_rank = ranks(world).run(moved, ep, case, stages, ranks_per_node, limit_s=180)
    for stage, results in zip(stages, zip(*by_rank, strict=True), strict=True):
        assert len({got for got, _, _ in results}) == 1, "one norm on all ranks"
        assert results[0][0] == pytest.approx(norm, rel=1e-5), f"ZeRO {stage}"
        assert max(apart for _, _, apart in results) == 0, "replicas differ"
        got = results[0][1]
        assert got.keys() == expected.keys()
        for name, grad in expected.items():
            wanted = grad * clip
            difference = (got[name] - wanted).abs().max().item()
            assert difference <= max(1e-5 * wanted.abs().max().item(), 1e-9), f"{name} at ZeRO {stage}, EP {ep}"


@pytest.mark.pitfall("1", "2", "3", "6")
@pytest.mark.parametrize("ep", [*(pytest.param(ep, marks=pytest.mark.slow) for ep in (1, 2)), 4])
def test_gradients_and_clip_are_those_of_one_device(ranks, ep: int):
    """Every stage, three micro-steps, with dropping, padding and noise."""
    check_gradients(ranks, ep, case_of(3, fancy=False))


@pytest.mark.slow
def test_gradients_over_nodes(ranks):
    """A group of experts over two nodes of two ranks."""
    case = case_of(2, fancy=False)
    config = changed(case.config, moe={"dispatch": HierarchicalConfig()})
    check_gradients(ranks, 4, dataclasses.replace(case, config=config), ranks_per_node=2)


@pytest.mark.slow
@pytest.mark.parametrize(("ep", "accumulation"), [(1, 1), (2, 1), (4, 1), (1, 3), (2, 3), (4, 3)])
def test_gradients_of_other_parts(ranks, ep: int, accumulation: int):
    check_gradients(ranks, ep, case_of(accumulation, fancy=True))


def routed_attention(config: RunConfig) -> MixedAttentionConfig:
    return MixedAttentionConfig(
        num_heads=2,
        experts=(StandardConfig(rope_theta=1e4), HyperbolicConfig(learnable=True), LinearConfig(), StandardConfig()),
        router=MLPConfig(hidden_dim=6, noise_std=0.3),
        capacity=CapacityConfig(factor=1.0),
        balance=config.moe.balance,
        dropout=0.2,
        bank="replicated",  # as `auto` is where the run's engine is this one
    )


@pytest.mark.slow
@pytest.mark.parametrize(("world", "ep"), [(2, 1), (2, 2), (4, 2), (4, 4)])
def test_gradients_of_mixtures_of_attention_experts(ranks, world: int, ep: int):
    """Routed attention in every block, beside MoE layers: its experts lie on every rank, as dense weights do."""
    case = case_of(2, fancy=False)
    config = changed(case.config, model={"attention": routed_attention(case.config)})
    check_gradients(ranks, ep, dataclasses.replace(case, config=config), world=world, stages=(0, 1))


@pytest.mark.parametrize(
    ("engine", "refused"),
    [
        ([], False),
        (["engine.zero_stage=0"], False),
        (["engine.zero_stage=2"], True),
        (["+engine.config={zero_optimization: {overlap_comm: true}}"], True),
    ],
)
def test_sums_in_the_order_of_arrival_are_refused_to_mixtures(engine: list[str], refused: bool):
    """Ranks call other experts, and would add up the gradients of unlike ones: at ZeRO 2 they did, without an error."""
    overrides = ["engine=deepspeed", *engine, "launch.nproc=2", "mesh.ep=2"]
    assert accepts(compose(overrides).config, 2)
    composed = compose([*overrides, "model/attention=moe"])
    assert accepts(composed.config, 2) is not refused
    if refused:
        with pytest.raises(ConfigErrors, match=r"model.attention.kind = 'moe' calls experts as tokens choose them"):
            validate(composed.config, composed.mapping, 2)


def test_experts_that_tokens_choose_one_by_one_are_refused_to_scripts():
    layer = MoELayer([nn.Linear(4, 4), nn.Linear(4, 4)], nn.Linear(4, 2), 4)
    attention = MoEAttention(MoEAttentionConfig(dim=4, num_heads=1, num_experts=1, top_k=1, expert_types=("linear",)))
    for model, name in ((nn.Sequential(layer), "0.moe.bank.experts"), (attention, "mixture")):
        with pytest.raises(ValueError, match=f"^{name} calls its experts as tokens choose them"):
            spread_for_deepspeed(model, Mesh.alone())


# Steps


def losses(
    here: Here, config: RunConfig, ep: int, num_steps: int
) -> list[tuple[float, float, dict[str, float], dict[str, list[float]]]]:
    """Loss, norm, learning rates and every expert's norms of weights and gradients of the first steps."""
    trainer = run_of(here, changed(config, train={"log_every": 1}), ep=ep)
    loader = trainer.loader()
    rows = []
    with closing(trainer.engine):
        for _ in range(num_steps):
            trainer.step(loader)
            total = trainer.tally.reduce(trainer.mesh.dp, trainer.measures._square_LE)
            norms = {name: total.extra[name].sqrt().flatten().tolist() for name in trainer.measures._square_LE}
            rows.append((total.loss, trainer.grad_norm, trainer.engine.learning_rates(), norms))
    return rows


def check_steps(
    ranks: Any, engine: DeepSpeedConfig, ep: int, num_steps: int = 4, untold: str | None = None, **train: Any
) -> float:
    """Against the native engine; returns the largest difference of the losses. Norms of experts called ``untold`` are
    not there."""
    native = ranks(4).run(losses, config_of(NativeConfig(), **train), ep, num_steps)[0]
    others = ranks(4).run(losses, config_of(engine, **train), ep, num_steps, limit_s=240)
    assert all(other == others[0] for other in others), "ranks disagree"
    digits = 1e-4 if train.get("precision") != "bf16" else 2e-2
    for mine, (_, norm, rates, norms_of_experts) in zip(native, others[0], strict=True):
        assert norm == pytest.approx(mine[1], rel=digits)
        assert rates == mine[2]
        assert norms_of_experts.keys() == {"weight_norm", "grad_norm"} - {untold}
        for name, norms in norms_of_experts.items():
            assert norms == pytest.approx(mine[3][name], rel=10 * digits, abs=digits * mine[1])
    return max(abs(mine[0] - theirs[0]) for mine, theirs in zip(native, others[0], strict=True))


def test_steps_equal_the_native_engines(ranks):
    """Adam, warm-up, decay, clipping; ZeRO 0 runs the same operations and so gives the same bits."""
    assert check_steps(ranks, DeepSpeedConfig(zero_stage=0), ep=2, num_steps=3) == 0
    assert check_steps(ranks, DeepSpeedConfig(zero_stage=2), ep=2, num_steps=3) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_adam_of_their_json_is_ours(ranks, stage: int):
    assert check_steps(ranks, DeepSpeedConfig(stage, {"optimizer": ADAM}), ep=2, num_steps=2) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(
    "config",
    [
        {"zero_optimization": {"overlap_comm": True}},
        {"zero_optimization": {"round_robin_gradients": True}},
        {"zero_optimization": {"parameter_alignment": True}},
        {"zero_optimization": {"reduce_bucket_size": 500, "allgather_bucket_size": 500}},
        {"zero_optimization": {"use_multi_rank_bucket_allreduce": False}},
        {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}, "zero_force_ds_cpu_optimizer": False},
    ],
    ids=lambda config: next(iter(config["zero_optimization"])),
)
def test_what_is_passed_on_changes_no_number(ranks, stage: int, config: dict[str, Any]):
    untold = "grad_norm" if "round_robin_gradients" in config["zero_optimization"] else None
    assert check_steps(ranks, DeepSpeedConfig(stage, config), ep=2, untold=untold) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_kernels_that_are_compiled(ranks, stage: int):
    """FusedAdam, and the CPU's Adam beside offloading; minutes, where they are compiled for the first time."""
    fused = {"optimizer": {**ADAM, "params": {**ADAM["params"], "torch_adam": False}}}
    assert check_steps(ranks, DeepSpeedConfig(stage, fused), ep=2) <= 1e-5
    if stage > 0:
        offloaded = {"optimizer": ADAM, "zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
        assert check_steps(ranks, DeepSpeedConfig(stage, offloaded), ep=2) <= 1e-5


def routed_in(here: Here, config: RunConfig) -> set[str]:
    """Dtypes of the routers' weights, and of the logits that they make."""
    trainer = run_of(here, config, ep=2)
    found = set()

    def note(router: Router, args: Any, routing: Any) -> None:
        found.add(str(routing.logits_TE.dtype))

    with closing(trainer.engine):
        for module in trainer.model.modules():
            if isinstance(module, Router):
                module.register_forward_hook(note)
                found |= {str(parameter.dtype) for parameter in module.parameters()}
        trainer.step(trainer.loader())
    return found


@pytest.mark.pitfall("28")
def test_bf16_leaves_routers_in_fp32(ranks):
    """And the numbers are the native engine's, to the last bit where nothing is cut."""
    config = {"bf16": {"enabled": "auto"}}
    assert check_steps(ranks, DeepSpeedConfig(0, config), ep=4, num_steps=2, precision="bf16") == 0
    assert check_steps(ranks, DeepSpeedConfig(1, config), ep=4, num_steps=2, precision="bf16") <= 1e-2
    found = ranks(4).run(routed_in, config_of(DeepSpeedConfig(1, config), precision="bf16"))
    assert found == [{"torch.float32"}] * 4


def poisoned(here: Here, poison: float) -> list[tuple[bool, bool, bool]]:
    """Of each stage, after a step whose loss is no number on one rank alone: whether the norm is none, the state is as
    before, and the next step is good again."""
    results = []
    for stage in STAGES:
        trainer = run_of(here, config_of(DeepSpeedConfig(stage)), ep=2)
        with closing(trainer.engine):
            loader = trainer.loader()
            trainer.step(loader)
            before = [value.clone() for _, value in leaves(local(trainer.engine.state()))]
            rates = trainer.engine.learning_rates()
            for place, batch in enumerate(batches := next(loader), start=1):
                context = StepContext(0, torch.tensor(1), torch.tensor(64), training=True)
                loss = trainer.model(batch, context).logits_BSV.square().mean()
                trainer.engine.backward(loss * (poison if here.rank == 1 else 1.0), last=place == len(batches))
            norm = trainer.engine.step()
            after = [value for _, value in leaves(local(trainer.engine.state()))]
            same = all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
            assert trainer.engine.learning_rates() == rates
            trainer.step(loader)
            good = all(value.isfinite().all() for _, value in leaves(local(trainer.engine.state())))
            results.append((not math.isfinite(norm), same, good and math.isfinite(trainer.grad_norm)))
    return results


def local(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: local(value) for key, value in state.items()}
    return state.to_local() if hasattr(state, "to_local") else state


@pytest.mark.parametrize("poison", [float("nan"), pytest.param(float("inf"), marks=pytest.mark.slow)])
def test_a_step_that_is_not_finite_changes_nothing(ranks, poison: float):
    assert ranks(4).run(poisoned, poison) == [[(True, True, True)] * len(STAGES)] * 4


def under_a_budget(here: Here, stage: int, factor: float) -> tuple[float, list[int]]:
    """The worst difference of the state after three steps from all_to_all's, and the attempts of each step."""
    states, attempts = [], []
    for dispatch in (AllToAllConfig(), BudgetConfig(factor)):
        config = changed(
            config_of(DeepSpeedConfig(stage), here.world), moe={"dispatch": dispatch}, capacity={"factor": None}
        )
        trainer = run_of(here, config, ep=2)
        with closing(trainer.engine):
            loader, attempts = trainer.loader(), []
            for _ in range(3):
                before = trainer.measures.spilled_steps
                trainer.step(loader)
                attempts.append(1 + trainer.measures.spilled_steps - before)
            states.append(dict(leaves(local(trainer.engine.state()))))
    plain, budget = states
    return max((value - plain[name]).abs().max().item() for name, value in budget.items()), attempts


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_step_that_spills_is_run_again(ranks, stage: int):
    """Weights and moments, to the bit; the first step alone does not hold its budget."""
    assert ranks(2).run(under_a_budget, stage, 1.2, limit_s=200) == [(0.0, [2, 1, 1])] * 2


# Checkpoints


def trained(
    here: Here, config: RunConfig, ep: int, folder: Path, save_at: int | None, num_steps: int
) -> list[tuple[float, float]]:
    """Losses and router rates from the folder's only checkpoint, or from the start, to step ``num_steps``; saves at
    ``save_at``."""
    trainer = run_of(here, config, folder, ep)
    rows = []
    with closing(trainer.engine):
        if save_at is None:
            trainer.load(next(folder.glob("step_*")))
        loader = trainer.loader()
        while trainer.progress.step < num_steps:
            trainer.step(loader)
            rows.append((trainer.tally.reduce(trainer.mesh.dp).loss, trainer.engine.learning_rates()["router"]))
            if trainer.progress.step == save_at:
                trainer.save(SimpleNamespace(say=lambda line: None, saved=lambda step, path: None))  # type: ignore[arg-type]
    return rows


def check_resume(
    ranks: Any, saver: tuple[int, int, Any], resumers: list[tuple[int, int, Any]], folder: Path, num_steps: int = 3
) -> None:
    """Saved in one layout (world, ep, engine) after two steps; the next steps of each other equal its own."""
    world, ep, engine = saver
    whole = ranks(world).run(trained, config_of(engine, world, accumulation=1), ep, folder, 2, 2 + num_steps)[0]
    for other_world, other_ep, other in resumers:
        config = config_of(other, world=world, accumulation=1)
        same_cut = ranks(other_world).run(trained, config, other_ep, folder, None, 2 + num_steps, limit_s=180)
        for rows in same_cut:
            for (loss, rate), (expected, expected_rate) in zip(rows, whole[2:], strict=True):
                if (other_world, other_ep, other) == saver:
                    assert loss == expected, "bit for bit"
                assert abs(loss - expected) <= 1e-5 and rate == expected_rate, (saver, other_world, other_ep, other)


NATIVE = NativeConfig()
ZERO = [DeepSpeedConfig(stage) for stage in STAGES]


def test_their_checkpoints_are_ours(ranks, tmp_path: Path):
    """Names, shapes, dtypes, and at ZeRO 0, whose numbers are the same, every bit."""
    digests = []
    for engine in (NATIVE, ZERO[0]):
        folder = tmp_path / engine.kind
        ranks(4).run(trained, config_of(engine, accumulation=1), 2, folder, 2, 2)
        digests.append(digest_of(config_of(NATIVE), folder / folder_name(2)))
    assert digests[0] == digests[1]


@pytest.mark.slow
def test_native_to_deepspeed(ranks, tmp_path: Path):
    check_resume(ranks, (4, 4, NATIVE), [(4, 2, ZERO[2]), (2, 2, ZERO[1])], tmp_path)


@pytest.mark.slow
def test_mixtures_of_attention_experts_resume(ranks, tmp_path: Path):
    config = config_of(ZERO[1], world=2, accumulation=1)
    config = changed(config, model={"attention": routed_attention(config)})
    whole = ranks(2).run(trained, config, 2, tmp_path, 2, 4)[0][2:]
    for engine in (ZERO[1], ZERO[0], NATIVE):
        for rows in ranks(2).run(trained, dataclasses.replace(config, engine=engine), 2, tmp_path, None, 4):
            for row, expected in zip(rows, whole, strict=True):
                assert row == pytest.approx(expected, abs=0 if engine is ZERO[1] else 1e-5)


@pytest.mark.slow
def test_deepspeed_to_native_and_to_itself(ranks, tmp_path: Path):
    check_resume(ranks, (4, 2, ZERO[2]), [(4, 2, ZERO[2]), (4, 4, NATIVE), (1, 1, NATIVE)], tmp_path)


SAVERS = [(4, 4, NATIVE), *((4, 4, engine) for engine in ZERO), (4, 1, ZERO[2])]


@pytest.mark.slow
@pytest.mark.pitfall("29")
@pytest.mark.parametrize("place", range(len(SAVERS)), ids=lambda place: str(SAVERS[place]))
def test_every_layout_resumes(ranks, tmp_path: Path, place: int):
    """The next ten losses; each layout meets each engine after some saver."""
    engines = [NATIVE, *ZERO, NATIVE, ZERO[1]]
    layouts = [(4, 4), (4, 2), (4, 1), (2, 2), (2, 1), (1, 1)]
    resumers = [(*layout, engines[(place + i) % len(engines)]) for i, layout in enumerate(layouts)]
    check_resume(ranks, SAVERS[place], resumers, tmp_path, num_steps=10)


SCHEDULES = [
    {"type": "WarmupLR", "params": {"warmup_max_lr": "auto", "warmup_num_steps": 3, "warmup_type": "linear"}},
    {"type": "WarmupDecayLR", "params": {"total_num_steps": "auto", "warmup_max_lr": 0.01, "warmup_num_steps": "auto"}},
    {"type": "WarmupCosineLR", "params": {"total_num_steps": 9, "warmup_num_steps": 2}},
    {"type": "LRRangeTest", "params": {"lr_range_test_min_lr": 1e-3, "lr_range_test_step_size": 2}},
    {"type": "OneCycle", "params": {"cycle_min_lr": 1e-3, "cycle_max_lr": 1e-2, "cycle_first_step_size": 3}},
]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule["type"])
def test_their_schedules_resume(ranks, tmp_path: Path, stage: int, schedule: dict[str, Any]):
    engine = DeepSpeedConfig(stage, {"optimizer": ADAM, "scheduler": schedule})
    check_resume(ranks, (2, 2, engine), [(2, 2, engine), (2, 1, engine), (1, 1, engine)], tmp_path)


def test_rates_are_those_of_the_step_just_done(ranks):
    schedule = {"type": "WarmupLR", "params": {**SCHEDULES[0]["params"], "warmup_num_steps": 4}}
    (rows, _) = ranks(2).run(losses, config_of(DeepSpeedConfig(1, {"scheduler": schedule}), world=2), 2, 6)
    # DeepSpeed counts from -1: a first step at the minimum, then n / 4 of the peak.
    assert [rates["router"] for _, _, rates, _ in rows] == pytest.approx([0, 0, 0.0025, 0.005, 0.0075, 0.01])


def test_auto_that_our_optimizer_does_not_have(ranks):
    optimizer = {"type": "SGD", "params": {"lr": "auto", "momentum": "auto"}}
    assert all(ranks(2).run(refused, config_of(DeepSpeedConfig(1, {"optimizer": optimizer}), world=2)))


def refused(here: Here, config: RunConfig) -> bool:
    with pytest.raises(ConfigError, match="engine.config.optimizer.params.momentum"):
        run_of(here, config, ep=2)
    return True
